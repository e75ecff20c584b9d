"""Token files and samples: what is text, what is refused, and what is left out and counted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.trainer.helpers import write_tokens
from trainer.job import UserError
from trainer.tokens import open_tokens

TEXTS = ["to be or not to be\n" * 40, "that is the question\n" * 40, "ünïcode — too\n" * 9]


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": "64"}, {"vocab_size": 0}, {"vocab_size": -1}, {"vocab_size": True}, {"dtype": "<f8"},
        {"dtype": ["<u2"]}, {"tokens": [5400, 600]}, {"tokens": {"train": 0}}, {"tokens": {"train": "9"}},
        {"sha256": {"train": "0"}}, {"sha256": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_meta_json_that_cannot_be_is_refused(change: dict, tmp_path: Path):
    file = write_tokens(tmp_path / "tokens") / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    key = next(iter(change))
    with pytest.raises(UserError, match=rf"meta.json cannot be read \({key} is .*\): prepare the tokens anew"):
        open_tokens(file.parent)


def test_tokens_are_those_that_meta_json_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.tokens.BLOCK", 1000)  # the change is in a later block, the highest in an earlier one
    folder = write_tokens(tmp_path / "tokens")
    file, meta = folder / "train.bin", folder / "meta.json"
    tokens = open_tokens(folder).split("train").copy()
    tokens[-1] += 1
    tokens.tofile(file)
    with pytest.raises(UserError, match=r"train.bin is not what meta.json says: prepare it anew"):
        open_tokens(folder).split("train")
    tokens[7] = 64
    tokens.tofile(file)
    said = json.loads(meta.read_text())
    said["sha256"]["train"] = hashlib.sha256(file.read_bytes()).hexdigest()
    meta.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"train.bin holds token 64 and the vocabulary ends at 63: prepare it anew"):
        open_tokens(folder).split("train")
