"""A tiny Llama with random weights, a data set of words, and the settings of a short run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.helpers import defaults, make_llama

# Without the packages of a job there is nothing to test here.
collect_ignore_glob = [] if importlib.util.find_spec("torchtune") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on many threads, and sums on other threads round otherwise."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return make_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40 words to train on and 8 to test on, of 2 to 6 letters."""
    made = [("abcdefgh" * 2)[i % 8 : i % 8 + 2 + i % 5] + "xyz"[i % 3] for i in range(48)]
    rows = [{"input": word, "output": word.capitalize()} for word in made]
    file = tmp_path_factory.mktemp("data") / "words.json"
    file.write_text(json.dumps({"train": rows[:40], "test": rows[40:]}))
    return file


@pytest.fixture
def settings(llama: Path, words: Path) -> dict[str, Any]:
    """Complete settings of a short run: 10 steps an epoch, in float32."""
    chosen = {"model": str(llama), "dataset": str(words), "dtype": "fp32", "device": "cpu", "max_seq_len": 64}
    short = {"batch_size": 4, "lora_rank": 4, "lr": 0.01, "warmup_steps": 2, "epochs": 2}
    return {**defaults("evaluate"), **defaults("lora_finetune_single_device"), **chosen, **short}
