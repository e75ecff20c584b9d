"""How fast logs are indexed, as ratios to grep and to reading every byte, in one run on one corpus.

    python benchmarks/ledger.py [--files 20000] [--folder FOLDER] [--cold]

Makes a seeded corpus of realistic logs with heavy-tailed sizes (a couple of GB for 20,000 files), reads it with
`grep -E` for the same fields, byte by byte, and into a new ledger; then refreshes the ledger and asks it one question.
Every field is compared with what was written. --cold drops the page cache before each reading, as root only.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from chiplog.ledger import Ledger
from chiplog.ledger.scan import scan
from chiplog.record import Record, State, Usage

FIELDS = (
    r"Running .* with resolved config|_component_:|batch_size:|lora_rank:|Loss: [0-9.]+|\{'loss': |'train_runtime': |"
    r"iteration +[0-9]+/|elapsed time per iteration|max allocated: |Epoch [0-9]+: |Trainer.fit. stopped|"
    r"CUDA out of memory|CANCELLED AT|Traceback \(most recent call last\)|GPU peak memory|SLURM_JOB_ID|\(UUID: |"
    r"Num (examples|Epochs) =|batch size per device|Checkpoint saved in|'eval_loss': "
)
ENDS = ["COMPLETED"] * 6 + ["TIMEOUT", "OUT_OF_MEMORY", "FAILED", "INCOMPLETE"]
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB "
    "of which 1.50 GiB is free."
)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast logs are indexed.")
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the corpus is made, or stands; default: a temporary folder")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each reading")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    truth = make_corpus(folder, arguments.files)
    size = sum(file.stat().st_size for file in folder.rglob("*.out"))
    print(f"{arguments.files} logs, {size / 2**30:.2f} GiB")
    # To /dev/null, grep would stop at a file's first match.
    sink = tempfile.TemporaryFile()  # noqa: SIM115
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.file.unlink(missing_ok=True)
    cases: dict[str, Callable[[], Any]] = {
        "read every byte": lambda: [file.read_bytes() for file in folder.rglob("*.out")] and None,
        "grep -E": lambda: subprocess.run(
            ["grep", "-rhaoE", "--include=*.out", FIELDS, str(folder)], stdout=sink, check=False
        ),
        "index": lambda: scan([folder], ledger),
        "refresh, nothing new": lambda: scan([folder], ledger),
        "open and one query": lambda: Ledger(ledger.file).search({"state": "TIMEOUT"}, sort="-train_s", limit=20),
    }
    took = {}
    for name, case in cases.items():
        if arguments.cold:
            subprocess.run(["sync"], check=True)
            Path("/proc/sys/vm/drop_caches").write_text("3")
        began = time.perf_counter()
        case()
        took[name] = time.perf_counter() - began
    print("| case | seconds | times grep |\n|---|---|---|")
    for name, seconds in took.items():
        print(f"| {name} | {seconds:.3f} | {seconds / took['grep -E']:.3f} |")
    compare(ledger, truth)
    if not arguments.folder:
        shutil.rmtree(folder)


def compare(ledger: Ledger, truth: dict[str, dict[str, Any]]) -> None:
    """Prints how many fields are right, and the first that are wrong."""
    right, wrong = 0, []
    for record in ledger.records():
        for name, value in truth[Path(record.logs[0]).name].items():
            found = figure(record, name)
            same = found == value if not isinstance(value, float) else found is not None and math.isclose(found, value)
            right += same
            if not same:
                wrong.append((record.logs[0], name, value, found))
    print(f"fields right: {right} of {right + len(wrong)}")
    for entry in wrong[:10]:
        print(*entry)


def figure(record: Record, name: str) -> Any:
    """A figure of a record by its name."""
    if name in Usage.model_fields:
        return getattr(record.usage, name)
    return getattr(record, name) if name in Record.model_fields else record.config.get(name)


def make_corpus(folder: Path, n: int) -> dict[str, dict[str, Any]]:
    """Writes the logs that are not there yet; returns what each says."""
    truth = {}
    for number in track(range(n), "Making logs", console=None, disable=not sys.stderr.isatty()):
        dice = random.Random(number)
        name = f"slurm-{100_000 + number}.out"
        first, told = prologue(dice, number) if dice.random() < 0.7 else ("", {})
        lines, said = MAKERS[number % len(MAKERS)](
            dice, min(200_000, round(dice.lognormvariate(5.5, 1.6)) + 3), dice.choice(ENDS)
        )
        truth[name] = {**told, **said}
        file = folder / f"user{number % 7}" / name
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join([first, *lines]).replace("*** JOB 1 ON", f"*** JOB {number} ON")
            file.write_text(text, errors="surrogateescape")
    return truth


def prologue(dice: random.Random, number: int) -> tuple[str, dict[str, Any]]:
    """What a cluster and libraries print before the training: some of it is no text."""
    gpus, device = (
        dice.choice([1, 2, 4, 8]),
        dice.choice(["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "Tesla V100-SXM2-32GB"]),
    )
    cards = "".join(f"GPU {i}: {device} (UUID: GPU-{dice.getrandbits(64):x})\n" for i in range(gpus))
    noise = dice.choice(
        ["", "\0" * 200, "\udcff\udcfe\n", "/lib/python3.11/site-packages/x.py:7: UserWarning: old\n" * 50]
    )
    said = {"job_id": str(number), "gpus": gpus, "device": device}
    return f"SLURM_JOB_ID={number}\n{cards}{noise}\n", said


def ending(end: str, job: int) -> str:
    """The last words of a job that ended so."""
    stamp = "2026-01-02T03:04:05"
    return {
        "TIMEOUT": f"slurmstepd: error: *** JOB {job} ON n1 CANCELLED AT {stamp} DUE TO TIME LIMIT ***\n",
        "OUT_OF_MEMORY": f'Traceback (most recent call last):\n  File "train.py", line 7, in <module>\n{OOM}\n',
        "FAILED": 'Traceback (most recent call last):\n  File "train.py", line 7\nValueError: no such key\n',
    }.get(end, "")


def clock(seconds: int) -> str:
    """As tqdm writes it."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def bar(step: int, total: int, pace: int) -> str:
    """A state of a bar at `pace` seconds a step."""
    share = int(100 * step / total)
    drawn = "█" * (share // 10) + " " * (10 - share // 10)
    left = clock((total - step) * pace)
    return f"{share:3}%|{drawn}| {step}/{total} [{clock(step * pace)}<{left}, {pace:5.2f}s/it]"


def stop_at(dice: random.Random, total: int, end: str) -> int:
    """The last step of a run that ended so."""
    return total if end == "COMPLETED" else dice.randint(1, total - 1)


def torchtune(dice: random.Random, total: int, end: str) -> tuple[Iterator[str], dict[str, Any]]:
    pace, last = dice.randint(1, 5), stop_at(dice, total, end)
    losses = [round(dice.uniform(0.5, 3), 6) for _ in range(2)]
    rank = dice.choice([4, 64])

    def lines() -> Iterator[str]:
        yield "INFO:torchtune.utils._logging:Running LoRAFinetuneRecipeSingleDevice with resolved config:\n\n"
        yield "batch_size: 4\nepochs: 1\nmodel:\n  _component_: torchtune.models.llama3_2.lora_llama3_2_1b\n"
        yield f"  lora_rank: {rank}\n\n"
        yield "INFO:torchtune.utils._logging:Memory stats after model init:\n"
        yield "\tGPU peak memory allocation: 2.41 GiB\n"
        for step in range(1, last + 1):
            loss = losses[0] if step == 1 else losses[1] if step == last else 1.5
            yield f"1|{step}|Loss: {loss}: {bar(step, total, pace)}\r"
        yield "\n" + ending(end, 1)

    said: dict[str, Any] = {"state": end, "steps": last, "steps_planned": total, "train_s": float(last * pace)}
    said |= {"loss_first": losses[0], "loss_last": losses[min(1, last - 1)], "model": "lora_llama3_2_1b"}
    return lines(), {**said, "lora_rank": rank, "micro_batch_size": 4, "method": "lora", "epochs": 1}


def trainer(dice: random.Random, total: int, end: str) -> tuple[Iterator[str], dict[str, Any]]:
    pace, last = dice.randint(1, 5), stop_at(dice, total, end)
    every = max(1, min(10, last))
    final = round(dice.uniform(0.5, 3), 4)

    def lines() -> Iterator[str]:
        yield "***** Running training *****\n  Num examples = 4,000\n  Num Epochs = 1\n"
        yield f"  Instantaneous batch size per device = 8\n  Total optimization steps = {total:,}\n"
        for step in range(1, last + 1):
            yield bar(step, total, pace) + "\r"
            if step % 500 == 0:
                yield f"\n{{'eval_loss': 2.5, 'eval_runtime': 9.1, 'epoch': {step / total:.2f}}}\n"
            if step % every == 0:
                loss = final if step > last - every else 1.5
                yield f"\n{{'loss': {loss}, 'grad_norm': 0.5, 'epoch': {step / total:.2f}}}\n"
        if end == "COMPLETED":
            yield f"\n{{'train_runtime': {last * pace}.5, 'train_loss': 1.25, 'epoch': 1.0}}\n"
        yield "\n" + ending(end, 1)

    said: dict[str, Any] = {"state": end, "steps": last, "steps_planned": total, "loss_last": final}
    said["train_s"] = last * pace + (0.5 if end == "COMPLETED" else 0.0)
    said |= {"micro_batch_size": 8, "n_samples": 4000, "epochs": 1, "val_losses": [2.5] * (last // 500)}
    return lines(), said


def megatron(dice: random.Random, total: int, end: str) -> tuple[Iterator[str], dict[str, Any]]:
    last = stop_at(dice, total, end)
    final = round(dice.uniform(2, 9), 6)

    def lines() -> Iterator[str]:
        yield "using world size: 8, data-parallel-size: 8, tensor-model-parallel size: 1\n"
        for step in range(1, last + 1):
            loss = final if step == last else 9.5
            yield (
                f" iteration {step:8}/{total:8} | consumed samples: {step * 64:12} | "
                f"elapsed time per iteration (ms): 1500.0 | learning rate: 1.500E-04 | global batch size:    64 | "
                f"lm loss: {loss:.6E} | number of nan iterations:   0 |\n"
            )
        yield "[after training is done] datetime: 2026-01-02 03:04:05\n" if end == "COMPLETED" else ending(end, 1)

    return lines(), {"state": end, "steps": last, "steps_planned": total, "loss_last": final, "gpus": 8}


def loop(dice: random.Random, total: int, end: str) -> tuple[Iterator[str], dict[str, Any]]:
    last = stop_at(dice, total, end)
    final = round(dice.uniform(0.5, 3), 4)

    def lines() -> Iterator[str]:
        for step in range(1, last + 1):
            loss = final if step == last else 1.5
            yield f"\x1b[32m2026-01-02 03:04:05\x1b[0m INFO step {step}/{total} loss {loss} lr 1e-4\n"
        yield "Training completed.\n" if end == "COMPLETED" else ending(end, 1)

    return lines(), {"state": end, "steps": last, "steps_planned": total, "loss_last": final}


MAKERS = [torchtune, trainer, megatron, loop]

if __name__ == "__main__":
    assert State.COMPLETED in ENDS
    os.environ.setdefault("CHIPLOG_HOME", tempfile.mkdtemp())
    main()
