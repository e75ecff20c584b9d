"""Does the best learning rate stay as a model grows, and is wider never worse? muP against the standard rules.

    python -m benchmarks.transfer [transformer-adamw ...] [--first-seed 4]

Sweeps learning rates at three widths over a few seeds, on the sources of Python's standard library, and prints for each
arm by how much the best moves over four times the width, and by how much a wider model was worse at any learning rate
up to the best. tests/trainer/test_transfer.py holds Transformers to it; what LSTMs do is reported.

Under SGD large batches have their best learning rate where training nearly diverges, which is chance. Batches of two
sequences have it well below, for more steps and seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tasks.scaling_laws.data import sources, write
from tasks.scaling_laws.learning_rates import Best, best_lr
from trainer import job
from trainer.job import Stop
from trainer.prepare import from_files
from trainer.sweep import sweep

ROOT = Path(__file__).resolve().parents[1]
WIDTHS, KINDS = (32, 64, 128), ("standard", "mup")
# Powers of two: around the best of the narrowest model, and down to where that of the widest goes by the standard rule.
OCTAVES = {
    "transformer-adamw": range(-9, -2),
    "transformer-sgd": range(-4, 1),
    "lstm-adamw": range(-8, -1),
    "lstm-sgd": range(-2, 4),
}
SEEDS = {"adamw": 2, "sgd": 4}  # how many
ALL = {
    "depth": 2, "base_width": WIDTHS[0], "tied": False, "seq_len": 64, "batch_size": 16, "micro_batch_size": 16,
    "max_steps": 200, "warmup_steps": 20, "val_tokens": 32768, "log_every_n_steps": 50, "overfit_steps": 0,
    "guard_steps": 0, "device": "cpu",
}  # fmt: skip
OF_SGD = {
    "batch_size": 2, "micro_batch_size": 2, "max_steps": 800, "warmup_steps": 80, "momentum": 0.0,
    # A norm that is clipped changes with the width: SGD's steps would too. Adam's do not know it.
    "clip_grad_norm": 0.0,
}  # fmt: skip
HEAD = 16  # of every width


class Cell(NamedTuple):
    """One training of an arm."""

    kind: str
    width: int
    seed: int
    lr: float


Losses = dict[Cell, float]  # NaN where it diverged


class Found(NamedTuple):
    """What an arm shows under one parametrisation."""

    best: dict[int, Best]  # of each width, by the mean over the seeds
    drift: float  # octaves from the narrowest to the widest
    drifts: list[float]  # the same, seed by seed
    worse: float  # nats by which a wider model was above the next narrower at most, at lrs up to the best


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arms", nargs="*", default=list(OCTAVES), help="such as transformer-adamw")
    parser.add_argument("--first-seed", type=int, default=0, help="of each arm; 4: none that was looked at before")
    arguments = parser.parse_args()
    for place, arm in enumerate(arguments.arms):
        with tempfile.TemporaryDirectory() as folder:
            losses = swept(arm, Path(folder), arguments.first_seed)
        if not place:
            widths = " | ".join(f"best lr at {width}" for width in WIDTHS)
            print(f"| arm | rules | {widths} | octaves over 4x width (seeds) | wider is worse by at most, nats |")
            print("|---|---|---|---|---|---|---|")
        for kind in KINDS:
            found = judged(losses, kind)
            bests = " | ".join(shown(found.best[width]) for width in WIDTHS)
            drifts = ", ".join(f"{drift:+.2f}" for drift in found.drifts)
            print(f"| {arm} | {kind} | {bests} | {found.drift:+.2f} ({drifts}) | {found.worse:+.4f} |", flush=True)


def shown(best: Best) -> str:
    """A best learning rate; with a star where the parabola has no vertex that counts."""
    return f"2^{math.log2(best.lr):.2f}{'' if best.how == 'vertex' else '*'}"


def swept(arm: str, folder: Path, first_seed: int = 0) -> Losses:
    """The losses of all trainings of an arm. At the base width both parametrisations are the same, and train once."""
    text = folder / "text"
    write(from_files(sources(None, 0), ".py"), text, "bytes", 0)
    cells = [cell for cell in all_cells(arm, first_seed) if cell.kind == "mup" or cell.width > WIDTHS[0]]
    folders = {cell: folder / f"{number}" for number, cell in enumerate(cells)}
    for cell, run in folders.items():
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump(settings(arm, cell, text)))
    order = sorted(folders, key=lambda cell: -cell.width)  # the longest first
    code = sweep([folders[cell] for cell in order], len(os.sched_getaffinity(0)), Stop())
    assert code == 0, "a training failed"
    losses = {cell: last_loss(run) for cell, run in folders.items()}
    return losses | {cell._replace(kind="standard"): losses[cell] for cell in cells if cell.width == WIDTHS[0]}


def all_cells(arm: str, first_seed: int) -> Iterator[Cell]:
    """Every training that is compared."""
    for kind in KINDS:
        for width in WIDTHS:
            for seed in range(first_seed, first_seed + SEEDS[arm.split("-")[1]]):
                yield from (Cell(kind, width, seed, 2.0**octave) for octave in OCTAVES[arm])


def settings(arm: str, cell: Cell, text: Path) -> dict[str, Any]:
    """Every setting of one training."""
    architecture, optimizer = arm.split("-")
    own = {"heads": cell.width // HEAD} if architecture == "transformer" else {"depth": 1}
    chosen = {"architecture": architecture, "optimizer": optimizer, "parametrization": cell.kind, "dataset": str(text)}
    own |= OF_SGD if optimizer == "sgd" else {}
    rest = {"zero_readout": architecture == "transformer", "width": cell.width, "seed": cell.seed, "lr": cell.lr}
    return job.default_settings(ROOT / "trainer" / "train.yaml") | ALL | own | chosen | rest


def last_loss(run: Path) -> float:
    """The validation loss at the end."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "validation"]
    return float(losses[-1]) if losses and not events[-1].get("diverged") else math.nan


def judged(losses: Losses, kind: str) -> Found:
    """What the losses of an arm say of one parametrisation."""
    lrs, seeds = sorted({cell.lr for cell in losses}), sorted({cell.seed for cell in losses})
    best = {width: found_best(losses, kind, width, seeds) for width in WIDTHS}
    drifts = [octaves(*(found_best(losses, kind, width, [seed]) for width in WIDTHS)) for seed in seeds]
    up_to = max(found_best(losses, kind, WIDTHS[0], [seed]).lr for seed in seeds)
    rises = [
        mean(losses, kind, wide, lr, seeds) - mean(losses, kind, narrow, lr, seeds)
        for narrow, wide in itertools.pairwise(WIDTHS)
        for lr in lrs
        if lr <= up_to
    ]
    worse = max(rise if math.isfinite(rise) else math.inf for rise in rises)
    return Found(best, octaves(*best.values()), drifts, worse)


def octaves(*best: Best) -> float:
    """From the first to the last."""
    return math.log2(best[-1].lr / best[0].lr)


def found_best(losses: Losses, kind: str, width: int, seeds: Sequence[int]) -> Best:
    """The best learning rate of one width, by the mean over the seeds."""
    lrs = sorted({cell.lr for cell in losses})
    found = best_lr(lrs, [mean(losses, kind, width, lr, seeds) for lr in lrs])
    assert found, "every training diverged"
    return found


def mean(losses: Losses, kind: str, width: int, lr: float, seeds: Sequence[int]) -> float:
    """Over the seeds; NaN where one diverged."""
    return sum(losses[Cell(kind, width, seed, lr)] for seed in seeds) / len(seeds)


if __name__ == "__main__":
    main()
