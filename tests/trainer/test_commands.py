"""The trainer's other commands: token files, sweeps, samples, models to and from Hugging Face format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tests.trainer.helpers import ROOT, ended, events, same, start, weights, write_tokens
from trainer.export import bring_back
from trainer.job import UserError
from trainer.prepare import make_tokenizer, prepare
from trainer.sample import generate, load_run
from trainer.sweep import make_runs
from trainer.tokens import Streams, Windows, open_tokens, validation_of

TEXTS = {"a.txt": "to be or not to be\n" * 40, "b.txt": "that is the question\n" * 40, "c.txt": "ünïcode — too\n" * 9}


def run(command: str, *arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"trainer.{command}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_token_files_hold_the_text_and_are_the_same_twice(tokenizer: str, texts: Path, tmp_path: Path):
    for out in ("one", "two"):
        said = run("prepare", "--text", texts, "--tokenizer", tokenizer, "--validation", "0.3", "--out", tmp_path / out)
        assert json.loads(said)["path"] == str(tmp_path / out)
    files = [{file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("one", "two")]
    assert files[0] == files[1]
    folder = open_tokens(tmp_path / "one")
    encoder = Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json"))
    pieces: list[str] = []
    for split in ("train", "validation"):
        text = encoder.decode(folder.split(split).tolist(), skip_special_tokens=False)
        pieces += text.removesuffix("<|end|>").split("<|end|>")
    assert sorted(pieces) == sorted(TEXTS.values())
    assert folder.vocab_size == encoder.get_vocab_size()
    assert folder.vocab_size == 257 if tokenizer == "bytes" else 257 < folder.vocab_size <= 300
    assert "is there already" in run("prepare", "--text", texts, "--out", tmp_path / "one", code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "nowhere"], "nowhere is not there: give files"),
        (["--text", "TEXTS/a.txt"], "1 documents are too few"),
        (["--text", "TEXTS", "--tokenizer", "bpe:10"], "give bpe:N with N of at least 257"),
        (["--text", "TEXTS", "--tokenizer", "none.json"], "is no file: give bytes, bpe:N or the path"),
        (["--text", "TEXTS", "--dataset", "some"], "give --text or --dataset, one of them"),
        ([], "give --text or --dataset, one of them"),
    ],
)
def test_what_cannot_be_prepared_is_said_and_leaves_nothing(arguments: list, words: str, texts: Path, tmp_path: Path):
    given = [str(one).replace("TEXTS", str(texts)) for one in arguments]
    assert words in run("prepare", *given, "--out", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_no_text_is_lost_to_a_tokenizer_that_cuts_or_fills_up(texts: Path, tmp_path: Path):
    encoder = make_tokenizer("bytes", [])
    encoder.enable_truncation(5)
    encoder.enable_padding(length=9)
    encoder.save(str(tmp_path / "cuts.json"))
    for out, tokenizer in (("whole", "bytes"), ("cut", str(tmp_path / "cuts.json"))):
        prepare(list(TEXTS.values()), tmp_path / out, tokenizer, 0.3, seed=0)
    whole, cut = (open_tokens(tmp_path / out).split("train") for out in ("whole", "cut"))
    assert np.array_equal(whole, cut)


def test_a_folder_that_was_cut_off_is_refused(tokens: Path, tmp_path: Path):
    folder = write_tokens(tmp_path / "tokens")
    (folder / "train.bin").write_bytes(b"\0" * 10)
    with pytest.raises(UserError, match=r"does not hold the 5400 tokens of meta.json"):
        open_tokens(folder).split("train")
    (folder / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        open_tokens(folder)
    with pytest.raises(UserError, match="no split 'test', it has train, validation"):
        open_tokens(tokens).split("test")


def test_windows_see_each_token_once_an_epoch_in_another_order_for_each_seed_and_epoch():
    text = np.arange(101, dtype="<u2")
    data = Windows(text, seq_len=10, batch_size=5, seed=0)
    first, second = (torch.cat([data.batch(step, range(5)) for step in steps]) for steps in ((0, 1), (2, 3)))
    for epoch in (first, second):
        assert sorted(epoch[:, :-1].flatten().tolist()) == list(range(100))
        assert epoch[:, 1:].equal(epoch[:, :-1] + 1)
    assert not first.equal(second) and not first.equal(Windows(text, 10, 5, seed=1).batch(0, range(5)))
    parts = [data.batch(1, rows) for rows in (range(0, 2), range(2, 5))]
    assert torch.cat(parts).equal(data.batch(1, range(5)))


def test_streams_go_on_where_they_stopped():
    data = Streams(np.arange(101, dtype="<u2"), seq_len=5, batch_size=4, seed=0)
    assert (data.n_samples, data.pieces) == (20, 5)
    batches = [data.batch(step, range(4)) for step in range(data.pieces)]
    assert torch.cat([batch[:, :-1] for batch in batches], 1).flatten().tolist() == list(range(100))
    assert [data.begins(step) for step in (0, 1, data.pieces)] == [True, False, True]


@pytest.mark.parametrize(("n", "seq_len"), [(37, 10), (40, 10), (5, 10)])
def test_every_model_is_validated_on_the_same_targets(n: int, seq_len: int):
    kept = validation_of(np.arange(60, dtype="<u2"), n)
    for pieces in (kept.windows(seq_len, 3), kept.streams(seq_len, 4), kept.streams(7, 1)):
        targets = torch.cat([piece[:, 1:].flatten() for piece in pieces])
        assert sorted(targets.tolist()) == list(range(1, n + 1))
    assert kept.sha256 == validation_of(np.arange(60, dtype="<u4"), n).sha256
    assert kept.sha256 != validation_of(np.arange(60, dtype="<u2"), n - 1).sha256


def test_a_sweep_trains_each_run_as_alone(settings: dict[str, Any], tmp_path: Path):
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(settings | {"max_steps": 10, "overfit_steps": 0}))
    out = tmp_path / "sweep"
    arguments = ("--config", file, "--out", out, "--vary", "lr=0.01,3e-3", "--vary", "seed=0,1")
    run("sweep", *arguments)
    names = ["lr0.01_seed0", "lr0.01_seed1", "lr0.003_seed0", "lr0.003_seed1"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    alone = settings | {"max_steps": 10, "overfit_steps": 0, "lr": 0.003, "seed": 1}
    assert ended(start(alone, tmp_path / "alone")) == [0]
    assert same(weights(tmp_path / "alone"), weights(out / names[3]))
    run("sweep", *arguments)
    assert all(len(events(out / name, "start")) == 1 for name in names)  # all are done
    assert "there is no setting 'lrr'" in run("sweep", "--config", file, "--out", out, "--vary", "lrr=1", code=1)


def test_a_sweep_names_the_runs_that_failed_and_finishes_the_others(settings: dict[str, Any], tmp_path: Path):
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(settings | {"max_steps": 3, "overfit_steps": 0}))
    said = run("sweep", "--config", file, "--out", tmp_path / "out", "--vary", "heads=2,5", code=1)
    assert "error: heads5 ended with 1: see" in said
    assert "cannot be divided by 5 heads" in (tmp_path / "out" / "heads5" / "log").read_text()
    assert (tmp_path / "out" / "heads2" / "DONE").exists()


@pytest.fixture
def base(settings: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ("lr=[1,2]", r"'\[1' is no value: list values as in lr=0.001,0.003"),
        ("lr=2026-13-01", "'2026-13-01' is no value"),
        ("lr=0.001,-1", "lr-1: lr is -1: give a number of at least 0"),
        ("lr=0.001,word", "lrword: lr is 'word'; expected something like 0.001"),
        ("lr=0.001,", "lrNone: lr is None; expected"),
        ("lr=0.001,1e-3", "two runs would be called lr0.001"),
        ("dataset=a/b,a-b", "two runs would be called dataseta-b: give each value once"),
        ("optimizer=adamw,adan", "optimizeradan: optimizer is 'adan': choose"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_written(
    vary: str, words: str, base: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=words):
        make_runs(base, tmp_path / "out", [vary])
    assert not (tmp_path / "out").exists()


def test_the_runs_of_a_sweep_stay_in_its_folder(base: Path, tmp_path: Path):
    runs = make_runs(base, tmp_path / "out", [f"dataset={tmp_path}/a/tokens,{tmp_path}/b/tokens,../tokens"])
    assert [run.parent for run in runs] == [tmp_path / "out"] * 3 and runs[2].name == "dataset..-tokens"
    assert yaml.safe_load((runs[0] / "config.yaml").read_text())["dataset"] == f"{tmp_path}/a/tokens"


def test_the_settings_of_a_run_that_cannot_go_on_stay_as_they_are(settings: dict[str, Any], base: Path, tmp_path: Path):
    out = tmp_path / "out"
    for schedule in ("cosine", "constant"):
        base.write_text(yaml.safe_dump(settings | {"max_steps": 6}))
        (run,) = make_runs(base, out, [f"lr_schedule={schedule}"])
        (run / "metrics.jsonl").touch()  # it has begun
    base.write_text(yaml.safe_dump(settings | {"max_steps": 9}))
    with pytest.raises(UserError, match=r"was made with another max_steps .*: put it back, or take another --out"):
        make_runs(base, out, ["lr_schedule=constant,cosine"])
    steps = {run.name: yaml.safe_load((run / "config.yaml").read_text())["max_steps"] for run in out.iterdir()}
    assert steps == {"lr_schedulecosine": 6, "lr_scheduleconstant": 6}
    (run,) = make_runs(base, out, ["lr_schedule=constant"])
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 9


GPT2 = {"position": "learned", "bias": True}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "ffn_ratio": 2.0}
MUP = {"parametrization": "mup", "base_width": 16, "tied": False, "base_heads": 4}


@pytest.mark.parametrize(
    "changes",
    [GPT2, GPT2 | {"bias": False, "tied": False}, GPT2 | MUP, LLAMA, LLAMA | MUP, LLAMA | {"tied": False}],
    ids=str,
)
def test_a_model_goes_to_hugging_face_and_back(changes: dict, settings: dict[str, Any], tmp_path: Path):
    """The same logits in transformers, and after coming back."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    short = {"max_steps": 5, "overfit_steps": 0, "heads": 4, "lr": 0.02}
    assert ended(start(settings | short | changes, out)) == [0]
    run("export", "--run", out, "--out", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours, _ = load_run(out)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours.logits(ours(tokens)[0])
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        run("export", "--model", tmp_path / "hf", "--out", tmp_path / "back")
        back, _ = load_run(tmp_path / "back")
        torch.testing.assert_close(back.logits(back(tokens)[0]), expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_counterpart_is_refused(settings: dict[str, Any], tmp_path: Path):
    assert ended(start(settings | {"max_steps": 2, "overfit_steps": 0}, tmp_path / "run")) == [0]
    said = run("export", "--run", tmp_path / "run", "--out", tmp_path / "hf", code=1)
    assert "has no counterpart: GPT-2 is learned, layernorm, pre, gelu" in said and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "changes",
    [{"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_parameters": {"rope_theta": 5e5}}, {"head_dim": 32}],
    ids=str,
)
def test_a_model_that_computes_otherwise_is_not_brought_back(changes: dict, tmp_path: Path):
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    config |= {"vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 16, **changes}
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has \{.*\}, and the trainer \{.*\}: train anew"):
        bring_back(tmp_path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_weights_that_are_not_the_configs_are_not_brought_back(tmp_path: Path):
    """An activation that GPT-2's config.json does not name is another than the trainer's."""
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4, "vocab_size": 5}
    for activation, words in (
        ({}, "gelu_new"),
        ({"activation_function": "gelu"}, "such as blocks.0.attention.out.bias"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | activation))
        save_file({"transformer.wte.weight": torch.ones(5, 8)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=words):
            bring_back(tmp_path, tmp_path / "back")
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="is no whole model"):
        bring_back(tmp_path, tmp_path / "back")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors: give the folder of a model in Hugging Face format"):
        bring_back(tmp_path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("changes", [{}, {"architecture": "lstm"}], ids=["transformer", "lstm"])
def test_a_trained_model_writes_what_it_learnt(changes: dict, settings: dict[str, Any], texts: Path, tmp_path: Path):
    run("prepare", "--text", texts, "--validation", "0.3", "--out", tmp_path / "tokens")
    learns = {"dataset": str(tmp_path / "tokens"), "max_steps": 300, "lr": 0.02, "max_epochs": 99, "overfit_steps": 0}
    assert ended(start(settings | learns | changes, tmp_path / "run")) == [0]
    arguments = ("--run", tmp_path / "run", "--prompt", "to be or", "--tokens", "20", "--temperature", "0")
    assert run("sample", *arguments).startswith("to be or not to be")
    model, _ = load_run(tmp_path / "run")
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    drawn = [generate(model, prompt, 5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2]) and drawn[0].shape == (2, 8)
    assert "is missing: give the folder of a training that has ended" in run("sample", "--run", tmp_path, code=1)
