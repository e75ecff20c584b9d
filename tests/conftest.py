"""What all tests share: a workspace of their own, a model folder and a data set made on the spot, without torch."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A change fails for what it did, not for the seed of the day; `--hypothesis-profile=default` tries new examples.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Where the tests run in the background, these are ignored, and so they would be in every child.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
FAKE_RECIPES = ROOT / "tests" / "core" / "fake_recipes"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# Side by side (`make test`), in this order: what waits most and what takes longest first, so that no end is left over.
FOLDERS = ("slurm", "trainer", "recipes", "studies", "core")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {folder: place for place, folder in enumerate(FOLDERS)}
        items.sort(key=lambda item: places.get(item.path.parent.name, 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays whole, for what its tests share; so do all that share the cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "slurm" if file.startswith("tests/slurm/") else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def no_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sacct that knows no job."""
    folder = tmp_path_factory.mktemp("no_jobs")
    (folder / "sacct").write_text("#!/bin/sh\n")
    (folder / "sacct").chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def only_our_slurm(no_jobs: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the Slurm of the machine, which may be there, or be installed and not set up."""
    if not request.node.get_closest_marker("slurm"):
        monkeypatch.setenv("PATH", str(no_jobs), prepend=os.pathsep)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace with its own ledger and queue; the current folder is it."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "chiplog.toml").write_text("")
    monkeypatch.setenv("CHIPLOG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CHIPLOG_WORKSPACE", raising=False)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def lab(workspace: Path) -> Path:
    """A workspace with two model folders, a data set, and recipes that only pretend: no torch, no time."""
    for name, width in (("small", 4), ("large", 8)):
        make_model(workspace / "models" / name, width)
    make_words(workspace / "data" / "words.json")
    (workspace / "recipes").symlink_to(FAKE_RECIPES)
    return workspace


def make_words(file: Path, n_train: int = 20, n_test: int = 10) -> None:
    """A data set of words to capitalise."""
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(n_train + 2 * n_test)]
    rows = [{"input": word, "output": word.capitalize()} for word in words]
    splits = {"train": rows[:n_train], "validation": rows[n_train : n_train + n_test], "test": rows[n_train + n_test :]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(splits))


def make_model(folder: Path, width: int = 4) -> None:
    """A model folder whose files are all there and whole; its weights are zeros."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    letters = [chr(i) for i in range(32, 127)]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "^", "eos_token": "~", "pad_token": "~", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "vocab_size": len(vocabulary),
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": width,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": vocabulary["~"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {"model.embed_tokens.weight": (len(vocabulary), width)})


def write_safetensors(file: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A file of float32 zeros in the safetensors format."""
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)  # zeros that take no room
