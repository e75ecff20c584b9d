"""The closed form of memory beside traces of one training step on meta tensors, over a grid of jobs.

python -m benchmarks.memory_trace [WORD of a job's name ...]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from chiplog.estimate.job import Job, Target
from chiplog.estimate.memory import GIB
from tests.recipes.meta_step import computed, job_of, traced

ALL: frozenset[Target] = frozenset({"q", "k", "v", "o", "mlp"})
SOME: frozenset[Target] = frozenset({"q", "v"})
TORCHTUNE = ("llama-3.2-1b", "llama-3-8b", "mistral-7b", "qwen2.5-7b", "gemma-2-2b", "phi-3-mini")
TRANSFORMERS = (
    "llama-3-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "gemma-2b", "gemma-2-2b", "gemma-3-1b", "phi-2", "phi-3-mini",
    "pythia-6.9b", "gpt2-xl", "falcon-7b", "falcon-40b", "falcon-rw-1b", "mpt-7b", "santacoder", "starcoder2-3b",
    "granite-3.0-2b", "olmo-1b", "olmo-2-7b", "stablelm-2-1.6b", "smollm3-3b", "bloom-7b1", "opt-1.3b", "apertus-8b",
    "seed-oss-36b", "t5-large", "flan-t5-xl", "mixtral-8x7b", "qwen3-30b-a3b", "granite-3.0-1b-a400m", "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b",
)  # fmt: skip


def grid() -> Iterator[tuple[str, Job]]:
    """Jobs that differ in model, method, targets, rank, dropout, checkpointing and loss."""
    tune: dict[str, dict[str, Any]] = {
        "LoRA 64 q v o mlp, chunked": {"rank": 64, "targets": ALL - {"k"}, "dropout": False, "loss": "chunked"},
        "LoRA 8 q v, dropout, ckpt": {"rank": 8, "targets": SOME, "checkpointing": "full"},
        "full, chunked": {"method": "full", "loss": "chunked", "micro_batch": 32},
        "full, ckpt": {"method": "full", "checkpointing": "full", "micro_batch": 32},
    }
    peft: dict[str, dict[str, Any]] = {
        "LoRA 16 q v, dropout": {"targets": SOME},
        "LoRA 32 all, ckpt": {"rank": 32, "targets": ALL, "dropout": False, "checkpointing": "full"},
        "LoRA 32 all": {"rank": 32, "targets": ALL, "dropout": False},
        "full": {"method": "full"},
    }
    for framework, models, kinds in (("torchtune", TORCHTUNE, tune), ("peft", TRANSFORMERS, peft)):
        for model, (kind, fields) in itertools.product(models, kinds.items()):
            yield f"{framework} {model} {kind}", job_of(framework, model, **fields)


def main() -> None:
    """Prints a table in Markdown, and the largest deviations."""
    parser = argparse.ArgumentParser(description="The closed form of memory beside traces of one training step.")
    parser.add_argument("words", nargs="*", help="of the names of the jobs to trace; none: all")
    words = parser.parse_args().words
    worst = dict.fromkeys(("layer", "head", "peak", "trained"), 0.0)
    print("| job | layer, B a token | computed | off, % | head, B a token | off, % | peak, GiB | computed | off, % |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, job in grid():
        if not all(word in name for word in words):
            continue
        is_, said = traced(job), computed(job)
        off = {name: 100 * (b / a - 1) for name, a, b in zip(worst, is_, said, strict=True)}
        worst = {name: max(value, off[name], key=abs) for name, value in worst.items()}
        layer, head = f"{is_.layer:.0f} | {said.layer:.0f} | {off['layer']:.2f}", f"{is_.head:.0f} | {off['head']:.2f}"
        peak = f"{is_.peak / GIB:.2f} | {said.peak / GIB:.2f} | {off['peak']:.2f}"
        print(f"| {name} | {layer} | {head} | {peak} |", flush=True)
    print("largest:", ", ".join(f"{field} {value:+.2f} %" for field, value in worst.items()))


if __name__ == "__main__":
    main()
