"""What the tests of the trainer do again and again: make token files, give settings, run a training."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import yaml

from trainer import job
from trainer.job import Stop
from trainer.settings import checked

if TYPE_CHECKING:
    from trainer.train import Training

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "trainer" / "train.yaml"


def defaults() -> dict[str, Any]:
    """Every setting with its default."""
    return job.default_settings(SCHEMA)


def config(**changes: Any) -> SimpleNamespace:
    """All settings, these changed."""
    settings = defaults()
    assert set(changes) <= set(settings), set(changes) - set(settings)
    return SimpleNamespace(**settings | changes)


def write_tokens(folder: Path, n: int = 6000, vocab_size: int = 64) -> Path:
    """Token files of a made language, in which each token depends on the one before."""
    import numpy as np

    rng, token, tokens = random.Random(0), 0, []
    for _ in range(n):
        token = (token * 7 + rng.choice((1, 2, 3))) % vocab_size
        tokens.append(token)
    folder.mkdir(parents=True)
    parts = {"train": tokens[: n - 600], "validation": tokens[n - 600 :]}
    for name, part in parts.items():
        np.asarray(part, dtype="<u2").tofile(folder / f"{name}.bin")
    sizes = {name: len(part) for name, part in parts.items()}
    hashes = {name: hashlib.sha256((folder / f"{name}.bin").read_bytes()).hexdigest() for name in parts}
    meta = {"vocab_size": vocab_size, "dtype": "<u2", "tokens": sizes, "sha256": hashes}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def start(settings: dict[str, Any], out: Path, **environment: str) -> subprocess.Popen[str]:
    """A training as a job runs it, with a config.yaml in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "trainer.train", "--config", str(out / "config.yaml"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe)


def made(settings: dict[str, Any], out: Path) -> Training:
    """A training in this process."""
    import torch

    from trainer.ranks import Ranks
    from trainer.train import Training

    out.mkdir(exist_ok=True)
    return Training(checked(SimpleNamespace(**settings)), out, Ranks(torch.device("cpu")))


def signalled(asked: bool = True) -> Stop:
    """As after a signal that came before the first step, without listening for one in the tests' own process."""
    stop = Stop.__new__(Stop)
    stop.asked = asked
    return stop


def quiet() -> Stop:
    """No signal."""
    return signalled(False)


def ended(*jobs: subprocess.Popen[str]) -> list[int]:
    """Their exit codes; an AssertionError for one with a traceback."""
    said = [one.communicate(timeout=200)[1] for one in jobs]
    assert "Traceback" not in "".join(said), said
    return [one.returncode for one in jobs]


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in metrics.jsonl, but for one that is just being written."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()]
    return [line for line in lines if line["event"] == kind]


def weights(out: Path) -> dict[str, Any]:
    """The tensors that a training left."""
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two models are equal bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
