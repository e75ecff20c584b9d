"""Runs of a scaling experiment as the trainer leaves them, with losses of a known law."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import yaml

from tasks.scaling_laws.analysis import Analysis, analyse
from tasks.scaling_laws.arms import TRAIN
from tasks.scaling_laws.runs import read_experiment
from trainer import job

DEFAULTS = job.default_settings(TRAIN)
GRID = [(width, steps) for width in (16, 32, 64, 128) for steps in (100, 400, 1600)]


def law(n: int, d: int, floor: float = 1.0) -> float:
    return floor + 30 / n**0.35 + 60 / d**0.3


def write(folder: Path, name: str, loss: float | None = None, times: float = 1.0, **config: Any) -> Path:
    """A finished run as the trainer leaves it, with the law's loss unless another is given."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    config = {**DEFAULTS, "batch_size": 16, "seq_len": 64, "max_steps": 100, **config}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    n, d = 30 * config["width"] ** 2, config["max_steps"] * 1024
    loss = law(n, int(d * times)) if loss is None else loss
    start = {"event": "start", "n_params": n, "flops_per_token": 6.0 * n, "val_sha256": "v"}
    step = {"event": "step", "step": config["max_steps"], "loss": 2.0 + zlib.crc32(name.encode()) * 1e-12}
    validation = {"event": "validation", "step": config["max_steps"], "loss": loss}
    end = {"event": "end", "step": config["max_steps"], "diverged": None}
    lines(run, start, step, validation, end)
    (run / "guards.json").write_text(json.dumps([{"guard": "budget met", "ok": True, "examined": 1, "found": ""}]))
    return run


def lines(run: Path, *events: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def change(run: Path, event: str, **values: Any) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines(run, *(one | values if one["event"] == event else one for one in events))


def grid(folder: Path) -> Path:
    for width, steps in GRID:
        write(folder, f"w{width}_s{steps}", width=width, max_steps=steps)
    return folder


def sweep(folder: Path, kind: str, best: dict[int, float], seeds: int = 2, apart: float = 0.001) -> None:
    for width, vertex in best.items():
        for seed in range(seeds):
            for lr in (0.001, 0.003, 0.01, 0.03, 0.1):
                loss = 2 + 0.05 * math.log(lr / vertex) ** 2 + apart * seed
                write(folder, f"{kind}{width}_{lr}_{seed}", loss, width=width, lr=lr, seed=seed, parametrization=kind)


def analysed(folder: Path) -> Analysis:
    return analyse(read_experiment(folder), bootstrap=40, seed=0)


def lines_of(text: str, words: str) -> list[str]:
    return [line for line in text.splitlines() if words in line]
