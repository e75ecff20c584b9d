"""Token files and samples: what is text, what is refused, and what is left out and counted."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from tests.trainer.helpers import config, write_tokens
from trainer import sample
from trainer.job import UserError
from trainer.models import make
from trainer.prepare import END, from_dataset, from_files, make_tokenizer, prepare
from trainer.tokens import open_tokens

TEXTS = ["to be or not to be\n" * 40, "that is the question\n" * 40, "ünïcode — too\n" * 9]


@pytest.mark.parametrize("validation", [float("nan"), float("inf"), -3.0, 1.0])
def test_a_share_that_is_none_is_refused(validation: float, tmp_path: Path):
    with pytest.raises(UserError, match="give a share of at least 0 and below 1"):
        prepare(["a", "b"], tmp_path / "out", "bytes", validation, seed=0)


@pytest.mark.parametrize("n", [2**20 + 1, 2**32, 10**30, "9" * 5000])
def test_a_vocabulary_beyond_bounds_is_refused(n: object):
    with pytest.raises(UserError, match="and at most 1048576"):
        make_tokenizer(f"bpe:{n}", ["a"])


@pytest.mark.parametrize("content", ["{}", "no json", '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(content: str, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read \(.*\): give a tokenizer.json"):
        make_tokenizer(str(tmp_path / "tokenizer.json"), [])


def test_what_is_no_file_among_texts_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"d.txt cannot be read \(No such file or directory\)"):
        from_files([tmp_path], ".txt")
    (tmp_path / "d.txt").unlink()
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(UserError, match=r"d.txt cannot be read \(Is a directory\)"):
        from_files([tmp_path], ".txt")
    (tmp_path / "c.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(UserError, match=r"byte 1 of .*c.txt is 0xe9, which is no UTF-8: convert the file"):
        from_files([tmp_path], ".txt")


@pytest.mark.parametrize(
    ("out", "words"), [("file/out", "Not a directory"), ("n" * 260, "File name too long"), ("link", "is there already")]
)
def test_a_place_that_cannot_be_written_is_refused(out: str, words: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=words):
        prepare(["a", "b"], tmp_path / out, "bytes", 0.3, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "file"])
def test_only_the_end_of_a_document_is_its_end(tokenizer: str, tmp_path: Path):
    texts = [f"one {END} two {END}" * 20, f"{END}three{END}"]
    if tokenizer == "file":
        tokenizer = str(tmp_path / "tokenizer.json")
        make_tokenizer("bytes", []).save(tokenizer)
    prepare(texts, tmp_path / "out", tokenizer, 0.5, seed=0)
    encoder, folder = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), open_tokens(tmp_path / "out")
    found = [folder.split(name).tolist() for name in ("train", "validation")]
    end = encoder.token_to_id(END)
    assert [(ids.count(end), ids[-1]) for ids in found] == [(1, end)] * 2
    assert sorted(map(encoder.decode, found)) == sorted(texts)


def test_a_vocabulary_that_has_the_end_as_a_word_is_refused(tmp_path: Path):
    Tokenizer(models.WordLevel({"a": 0, END: 1}, unk_token="a")).save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match=r"a document says .* take it out"):
        prepare([END, "a"], tmp_path / "out", str(tmp_path / "words.json"), 0.5, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_with_gaps_is_as_large_as_its_last_token(tmp_path: Path):
    Tokenizer(models.WordLevel({"a": 0, END: 5, "b": 9}, unk_token="a")).save(str(tmp_path / "words.json"))
    prepare(["a", "b"], tmp_path / "out", str(tmp_path / "words.json"), 0.5, seed=0)
    folder = open_tokens(tmp_path / "out")
    assert folder.vocab_size == 10 and {*folder.split("train"), *folder.split("validation")} == {0, 5, 9}


def test_rows_without_text_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from datasets import config as places

    from trainer import prepare as command

    monkeypatch.setattr(places, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    lines = [{"text": "one", "n": 1}, {"text": None, "n": None}, {"text": "two", "n": 2}, {"text": "", "n": 3}]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, out = str(tmp_path / "rows"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare", "--dataset", rows, "--out", str(out)])
    assert command.main() == 0
    assert json.loads(capsys.readouterr().out)["empty_documents"] == 2
    assert open_tokens(out).counts == {"train": 4, "validation": 4}
    with pytest.raises(UserError, match="n of row 1 is 1, no text: mend it, or give --column"):
        from_dataset(rows, "n")
    with pytest.raises(UserError, match=r"nowhere cannot be loaded \(.*\): give a data set"):
        from_dataset(str(tmp_path / "nowhere"), "text")


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


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--top-k", "-3", "top_k is -3: give a whole number of at least 0"),
        ("--tokens", "-5", "tokens is -5: give a whole number of at least 0"),
        ("--temperature", "nan", "temperature is nan: give a number of at least 0"),
        ("--temperature", "inf", "temperature is inf: give a number of at least 0"),
        ("--temperature", "-1", "temperature is -1.0: give a number of at least 0"),
        ("--temperature", "1e-45", "temperature is 1e-45: give 0, or at least 1e-06"),
        ("--seed", str(1 << 64), "seed is 18446744073709551616: give a smaller number"),
        ("--seed", "-1", "seed is -1: give a whole number of at least 0"),
    ],
)
def test_what_no_text_is_written_with_is_refused(
    option: str, value: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["sample", "--run", str(tmp_path), f"{option}={value}"])
    with pytest.raises(UserError, match=re.escape(words)):
        sample.main()


def test_a_model_writes_with_the_tokenizer_it_was_trained_with_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = config(dataset="tokens", width=32, depth=1, seq_len=16, init_std=0.02)
    model = make(settings, 257)
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(settings) | {"shape": model.shape.as_dict()}))
    prepare(TEXTS, tmp_path / "tokens", "bytes", 0.3, seed=0)
    options = ["--prompt", "to be", "--temperature", "1e-6", "--seed", str((1 << 64) - 1)]
    monkeypatch.setattr(sys, "argv", ["sample", "--run", str(tmp_path / "run"), *options])
    monkeypatch.chdir(tmp_path)
    assert sample.main() == 0 and capsys.readouterr().out.startswith("to be")
    make_tokenizer("bpe:300", TEXTS).save(str(tmp_path / "tokens" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"knows \d+ tokens and the model 257: put back"):
        sample.main()
    monkeypatch.chdir(folder)
    with pytest.raises(
        UserError, match=rf"{folder}/tokens/tokenizer.json is not there: sample from the folder in which"
    ):
        sample.main()
