"""How long one question takes where 20,000 runs are on record, as ratios to one search of the ledger in the same run.

python benchmarks/query.py
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from chiplog.estimate.case import CaseEstimate, make_case
from chiplog.estimate.gpus import gpus
from chiplog.ledger import Ledger
from chiplog.record import Record, State, Usage
from chiplog.settings import load_settings
from chiplog.sizing import DatasetReports, Sizing

RUNS, REPEATS = 20_000, 15
DEVICES = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L40S", "cpu")
MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen2.5-7B")


def main() -> None:
    """Prints a table in Markdown."""
    argparse.ArgumentParser(description="How long one question takes where 20,000 runs are on record.").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CHIPLOG_HOME"] = os.environ["CHIPLOG_WORKSPACE"] = folder
        ledger = Ledger()
        ledger.put(made(RUNS))
        first = timed(lambda: ask(ledger, 8, inverse=False))
        cases: dict[str, Callable[[], object]] = {
            "one search of the ledger": lambda: ledger.search({"model": MODELS[0]}, limit=20),
            "one estimate": lambda: ask(ledger, random.choice([2, 4, 8, 16]), inverse=False),
            "one estimate with all that would fit": lambda: ask(ledger, 4, inverse=True),
        }
        seconds = {name: statistics.median(timed(call) for _ in range(REPEATS)) for name, call in cases.items()}
    seconds["the first estimate of a process"] = first
    print("| case | ms (median) | times a search |\n|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {1000 * each:.0f} | {each / seconds['one search of the ledger']:.1f} |")
    print(f"\n{RUNS:,} runs on record; torch was {'' if 'torch' in sys.modules else 'not '}imported.")


def made(n: int) -> list[Record]:
    """Runs of four models on four devices, whose peaks and paces are drawn."""
    draw = random.Random(0)
    found = []
    for number in range(n):
        micro = draw.choice([1, 2, 4, 8])
        used = Usage(
            device=draw.choice(DEVICES), gpus=1, steps=100, train_s=30 * micro * draw.lognormvariate(0, 0.2),
            mem_kind="reserved", peak_mem_bytes=int((5 + 4 * micro) * 2**30),
        )  # fmt: skip
        config = {"batch_size": micro, "max_seq_len": 2048, "packed": True, "lora_rank": draw.choice([4, 16, 64])}
        found.append(
            Record(
                key=f"log:{number}",
                framework="torchtune",
                model=draw.choice(MODELS),
                method="lora",
                config=config,
                state=State.COMPLETED,
                started=f"2026-{1 + number % 12:02}-{1 + number % 28:02}",
                usage=used,
            )
        )
    return found


def ask(ledger: Ledger, batch_size: int, *, inverse: bool) -> CaseEstimate:
    """What a LoRA run of 1B would need on an A100."""
    from chiplog.estimate.questions import estimate_case  # as the tool does

    place = Sizing(DatasetReports(), ledger, load_settings()).place("a100-80gb", MODELS[0])
    assert place, "the catalogue has the A100"
    case = {"model": MODELS[0], "gpu": "a100-80gb", "batch_size": batch_size, "seq_len": 2048, "packed": True}
    return estimate_case(make_case(case), place, [*gpus().values()], inverse=inverse)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
