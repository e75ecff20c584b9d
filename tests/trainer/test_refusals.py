"""What a training refuses, in a line that says what to do, before it writes anything or where a file broke."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from tests.trainer.helpers import ROOT, ended, events, quiet, start
from trainer import checkpoints, job, train
from trainer.job import UserError
from trainer.models import make
from trainer.settings import checked


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"overfit_steps": 0, "max_steps": 6, "max_epochs": 9.0, "lr_schedule": "constant"}


@pytest.fixture
def trained(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trains as the command does, in this process: settings that are changed, and the folder's name."""

    def command(name: str = "run", **changes: Any) -> Path:
        out = tmp_path / name
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | changes))
        monkeypatch.setattr(sys, "argv", ["train", "--config", str(tmp_path / "config.yaml"), "--out", str(out)])
        assert train.main(quiet()) == 0
        return out

    return command


def test_a_bit_that_changed_in_a_checkpoint_is_seen(trained, tmp_path: Path):
    """torch itself reads most of them as other weights."""
    file = trained() / "checkpoints" / "step_6" / "state.pt"
    whole, rng = file.read_bytes(), random.Random(0)
    for _ in range(20):
        place = rng.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"step_6 cannot be read \(.+\): remove it to start anew"):
            trained(max_steps=8)
    file.write_bytes(whole)
    assert [event["step"] for event in events(trained(max_steps=8), "start")] == [0, 6]


def test_a_copy_of_a_checkpoint_under_another_name_is_none(trained):
    out = trained()
    shutil.copytree(out / "checkpoints" / "step_6", out / "checkpoints" / "step_6_backup")
    assert [event["step"] for event in events(trained(max_steps=8), "start")] == [0, 6]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step_8", "step_6_backup"}


def test_a_finished_run_whose_checkpoints_are_gone_is_not_begun_anew(trained):
    out = trained()
    shutil.rmtree(out / "checkpoints")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="has ended after step 6 and its checkpoints are gone: take another --out"):
        trained(max_steps=8)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_another_vocabulary_is_another_run(trained, settings: dict[str, Any], tmp_path: Path):
    tokens = shutil.copytree(settings["dataset"], tmp_path / "tokens")
    trained(dataset=str(tokens))
    meta = json.loads((tokens / "meta.json").read_text())
    (tokens / "meta.json").write_text(json.dumps(meta | {"vocab_size": 65}))
    with pytest.raises(UserError, match="made with another vocab_size: put it back, or take another --out"):
        trained(dataset=str(tokens), max_steps=8)


def test_a_model_of_others_is_not_overwritten(trained, tmp_path: Path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a model that no training here made: take another --out"):
        trained()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"model"}


def test_a_record_that_was_cut_off_is_named(trained):
    out = trained()
    for name in ("guards.json", "model/config.json", "DONE"):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(b"")
        with pytest.raises(
            UserError, match=rf"{name} is not JSON .*: it was cut off or changed; remove it, or mend it"
        ):
            trained(max_steps=6 if name == "model/config.json" else 8)
        (out / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2**64}, "seed is 18446744073709551616: give a smaller number"),
        ({"forget_bias": float("nan")}, "forget_bias is nan: give a number of at least"),
        ({"lr": 0.0}, "lr is 0: give a number above 0"),
        ({"init_std": 0}, "init_std is 0: give a number above 0"),
    ],
    ids=str,
)
def test_numbers_that_no_training_can_use_are_refused(changes: dict, words: str, settings: dict):
    with pytest.raises(UserError) as refused:
        checked(SimpleNamespace(**settings | changes))
    assert str(refused.value).startswith(words)


def test_what_only_the_machine_decides_is_refused_too(trained):
    with pytest.raises(UserError, match="an LSTM cannot be trained in fp16 on a CPU: take bf16 or fp32"):
        trained(architecture="lstm", dtype="fp16", device=None if not torch.cuda.is_available() else "cpu")


def test_a_model_beyond_all_memory_is_refused_in_words(settings: dict):
    config = checked(SimpleNamespace(**settings | {"width": 10**6}))
    with pytest.raises(
        UserError, match=r"no memory for a model of 24,\d+,\d+,\d+,\d+ parameters: lower width, depth or"
    ):
        make(config, 64)


def test_a_disk_that_fills_within_a_file_leaves_it_as_it_was_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job.write_text(tmp_path / "a.md", "before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match=r"error: .*a.md could not be used \(No space left on device\): free disk"):
        job.run(lambda: job.write_text(tmp_path / "a.md", "after") or 0)
    assert [file.name for file in tmp_path.iterdir()] == ["a.md"] and (tmp_path / "a.md").read_text() == "before"
    with pytest.raises(SystemExit, match=r"error: the disk could not be used .*: free disk space and start again"):
        job.run(lambda: full(0) or 0)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("Error: No space left on device (os error 28)")],
    ids=["the system's", "safetensors'"],
)
def test_a_disk_that_fills_under_the_model_leaves_none_of_it(
    error: Exception, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(UserError, match=r"model could not be written \(.*No space .*\): free disk space and start"):
            trained()
    out = tmp_path / "run"
    assert not (out / "DONE").exists() and not (out / "model").exists() and not (out / ".model.tmp").exists()
    assert json.loads((trained() / "DONE").read_text())["step"] == 6


@pytest.mark.parametrize("place", ["file/run", "n" * 300, "file"])
def test_a_path_that_cannot_be_used_is_said_in_a_line(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as left:
        job.run(lambda: (tmp_path / place).mkdir(parents=True, exist_ok=True) or 0)
    assert str(left.value).startswith(f"error: {tmp_path}") and "could not be used (" in str(left.value)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        job.run(lambda: int(Path("/nowhere/at/all").read_text()))


def test_ctrl_c_saves_and_a_second_one_ends_at_once(settings: dict, tmp_path: Path):
    settings |= {"max_steps": 5000, "max_epochs": 999.0}
    run = start(settings, tmp_path)
    wait_for(tmp_path, run)
    run.send_signal(signal.SIGINT)
    assert ended(run) == [75]
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == f"step_{events(tmp_path, 'step')[-1]['step']}"

    slow = (
        "import time; from trainer import job; job.run(lambda: job.Stop() and print(1, flush=True) or time.sleep(60))"
    )
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT, **pipes) as waiting:
        assert waiting.stdout and waiting.stderr and waiting.stdout.readline() == "1\n"
        waiting.send_signal(signal.SIGINT)
        assert waiting.stderr.readline() == "\n" and "at once" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(timeout=30) == 130 and "Traceback" not in waiting.stderr.read()


def wait_for(out: Path, run: subprocess.Popen[str]) -> None:
    """Until a step is recorded."""
    while run.poll() is None and not ((out / "metrics.jsonl").exists() and events(out, "step")):
        time.sleep(0.01)
