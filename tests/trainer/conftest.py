"""Token files, and the settings of a short training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.helpers import defaults, write_tokens

# Without the packages of a job there is nothing to test here.
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on many threads, and sums on other threads round otherwise."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture
def settings(tokens: Path) -> dict[str, Any]:
    """Complete settings of 30 steps on the CPU."""
    chosen = {"dataset": str(tokens), "device": "cpu", "width": 32, "depth": 2, "seq_len": 16, "batch_size": 8}
    return {**defaults(), **chosen, "max_steps": 30, "lr": 0.01, "warmup_steps": 3}
