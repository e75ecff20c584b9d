"""What a training goes on from: settings that must be the same, folders that are its alone, files that broke."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import yaml

from tests.trainer.helpers import ROOT, ended, events, made, quiet, same, signalled, start, weights
from trainer import checkpoints, job
from trainer.job import UserError
from trainer.micro import fitted
from trainer.ranks import Ranks
from trainer.sample import load_run
from trainer.settings import checked
from trainer.sweep import make_runs
from trainer.train import MemoryRanOut, Training

CPU = Ranks(torch.device("cpu"))


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"overfit_steps": 0, "max_epochs": 9.0, "lr_schedule": "constant"}


def guards(out: Path) -> dict[str, bool]:
    return {one["guard"]: one["ok"] for one in json.loads((out / "guards.json").read_text())}


def test_what_falls_to_the_last_step_is_not_extended(settings: dict, tmp_path: Path):
    assert made(settings | {"lr_schedule": "cosine"}, tmp_path).train(quiet())
    with pytest.raises(UserError, match=r"another max_steps .*cannot be extended"):
        made(settings | {"lr_schedule": "cosine", "max_steps": 40}, tmp_path)


def test_other_validation_data_are_not_mixed_into_a_run(settings: dict, tmp_path: Path):
    assert made(settings, tmp_path).train(quiet())
    with pytest.raises(UserError, match="another val_tokens, validation"):
        made(settings | {"max_steps": 40, "val_tokens": 100}, tmp_path)


def test_a_finished_training_of_other_settings_is_not_taken_for_this_one(settings: dict, tmp_path: Path):
    assert ended(start(settings, tmp_path)) == [0]
    again = start(settings | {"width": 64}, tmp_path)
    assert "was made with another width: put it back, or take another --out" in again.communicate(timeout=100)[1]
    assert again.returncode == 1


def test_a_sweep_overwrites_no_run_of_other_settings(settings: dict, tmp_path: Path):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(settings))
    (run,) = make_runs(base, tmp_path / "out", ["seed=0"])
    (run / "metrics.jsonl").write_text("")
    assert make_runs(base, tmp_path / "out", ["seed=0"]) == [run]
    base.write_text(yaml.safe_dump(settings | {"width": 64}))
    with pytest.raises(UserError, match="another width: put it back, or take another --out"):
        make_runs(base, tmp_path / "out", ["seed=0"])
    assert yaml.safe_load((run / "config.yaml").read_text())["width"] == 32
    (run / "DONE").write_text(json.dumps({"step": settings["max_steps"]}))
    base.write_text(yaml.safe_dump(settings | {"lr_schedule": "constant", "max_steps": 5}))
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"lr_schedule": "constant"}))
    assert make_runs(base, tmp_path / "out", ["seed=0"]) == [run]
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == settings["max_steps"] > 5
    with pytest.raises(UserError, match="two runs would be called"):
        make_runs(base, tmp_path / "out", ["lr=0.1,1e-1"])
    with pytest.raises(UserError, match="seed is given twice"):
        make_runs(base, tmp_path / "out", ["seed=0", "seed=1"])


def test_two_processes_do_not_train_in_one_folder(settings: dict, tmp_path: Path):
    with job.alone(tmp_path):
        second = start(settings, tmp_path)
        assert "another process works in" in second.communicate(timeout=100)[1] and second.returncode == 1
    assert ended(start(settings, tmp_path)) == [0]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refused(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(OSError) if number == errno.EIO else nullcontext(), job.alone(tmp_path):
        assert number == errno.ENOSYS


def test_what_a_killed_sweep_began_saves_and_ends(settings: dict, tmp_path: Path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings | {"max_steps": 100_000, "max_epochs": 1e9}))
    command = [sys.executable, "-m", "trainer.sweep", "--config", str(tmp_path / "base.yaml"), "--vary", "seed=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sweep = subprocess.Popen([*command, "--out", str(tmp_path / "out")], cwd=ROOT, env=environment)
    run = tmp_path / "out" / "seed0"
    give_up = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not events(run, "step"):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    sweep.kill()
    sweep.wait()
    while is_worked_in(run):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert events(run, "checkpoint") and not (run / "DONE").exists()


def is_worked_in(folder: Path) -> bool:
    try:
        with job.alone(folder):
            return False
    except UserError:
        return True


def test_memory_that_ran_out_in_another_process_leaves_the_carried_state(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = made(settings | {"architecture": "lstm"}, tmp_path)
    training._optimizer_step(quiet())
    training.step += 1
    before, tokens = training.state, training.tokens
    assert before is not None
    monkeypatch.setattr(Ranks, "total", lambda self, *values: [*values[:-1], 1.0])
    with pytest.raises(MemoryRanOut, match="in step 2"):
        training._optimizer_step(quiet())
    assert training.state is before and training.tokens == tokens == 8 * 16


class Scarce:
    """Calls what it stands for, but for one call, in which memory runs out."""

    def __init__(self, real: Any, fails: int):
        self.real, self.fails, self.calls = real, fails, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.fails:
            raise torch.OutOfMemoryError("out of memory")
        return self.real(*given, **named)


@pytest.mark.parametrize(
    ("part", "fails", "saved", "when"),
    [
        ("_pass", 4, 1, "in step 2"),  # two micro batches a step
        ("_validation_loss", 1, 2, "in the validation after step 2"),
        ("_update", 2, None, "in the optimizer's part of step 2"),  # after which the weights are those of no step
    ],
)
def test_wherever_memory_runs_out_it_goes_on_with_a_smaller_micro_batch(
    settings: dict, tmp_path: Path, part: str, fails: int, saved: int | None, when: str
):
    settings |= {"micro_batch_size": 4, "batch_size": 8, "max_steps": 3, "run_val_every_n_steps": 2}
    training = made(settings, tmp_path)
    setattr(training, part, Scarce(getattr(training, part), fails))
    assert training.train(quiet()) is False
    deviation = json.loads((tmp_path / "deviation.json").read_text())
    assert deviation == {"micro_batch_size": 2, "asked": 4, "reason": f"out of memory {when} at micro_batch_size 4"}
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == ([saved] if saved else [])
    again = made(settings, tmp_path)
    assert again.step == (saved or 0) and again.micro.size == 2
    assert again.train(quiet()) and (tmp_path / "DONE").exists()
    assert [event["step"] for event in events(tmp_path, "validation")] == [2, 3]


@pytest.mark.parametrize(
    ("part", "when"), [("_optimizer_step", "in the optimizer's part"), ("validate", "in the valid")]
)
def test_memory_that_ran_out_in_another_process_is_heard_of_everywhere(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, when: str
):
    training = made(settings, tmp_path)
    monkeypatch.setattr(Ranks, "total", lambda self, *values: [1.0] if len(values) == 1 else list(values))
    with pytest.raises(MemoryRanOut, match=when):
        getattr(training, part)(*[quiet()] * (part == "_optimizer_step"))
    assert not events(tmp_path, "validation")


def test_no_room_for_all_gradients_together_is_heard_of_everywhere(monkeypatch: pytest.MonkeyPatch):
    weight = torch.nn.Parameter(torch.zeros(3))
    told = []
    monkeypatch.setattr(Ranks, "total", lambda self, *values: told.append(values) or [1.0])
    monkeypatch.setattr(torch, "cat", Scarce(torch.cat, fails=1))
    with pytest.raises(MemoryError):
        Ranks(torch.device("cpu"), world_size=2).add_up([weight])
    assert told == [(True,)]  # before the sum that all would wait in


def test_a_guard_without_room_for_a_copy_fails_and_training_goes_on(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Training, "_first_loss", Scarce(None, fails=1))
    training = made(settings | {"overfit_steps": 5, "max_steps": 2}, tmp_path)
    assert training.train(quiet()) and not guards(tmp_path)["one-batch overfit"]
    assert "overfit_steps 0 leaves this guard out" in (tmp_path / "guards.json").read_text()


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
def test_a_validation_is_the_same_whatever_fits_at_once(settings: dict, tmp_path: Path, architecture: str):
    losses = []
    for size in (8, 2, 1):
        training = made(settings | {"architecture": architecture, "micro_batch_size": size}, tmp_path / str(size))
        losses.append(training._validation_loss())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_last_step_that_ruins_the_weights_is_no_success(settings: dict, tmp_path: Path):
    assert made(settings | {"lr": 1e9, "optimizer": "sgd", "clip_grad_norm": 0.0, "max_steps": 2}, tmp_path).train(
        quiet()
    )
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 2, "diverged": True}
    assert not guards(tmp_path)["finite loss"] and not events(tmp_path, "validation")


def test_gradients_that_are_no_numbers_end_a_training(settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: clip(*given) * math.nan)
    assert made(settings, tmp_path).train(quiet())
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 0, "diverged": True}
    assert not guards(tmp_path)["finite loss"]


def test_a_signal_saves_before_it_validates_and_what_was_due_follows(settings: dict, tmp_path: Path):
    settings = settings | {"run_val_every_n_steps": 1, "max_steps": 3}
    assert not made(settings, tmp_path).train(signalled())
    assert events(tmp_path, "checkpoint") and not events(tmp_path, "validation")
    assert made(settings, tmp_path).train(quiet())
    assert [event["step"] for event in events(tmp_path, "validation")] == [1, 2, 3]


def test_a_run_that_has_more_steps_than_it_needs_is_validated_all_the_same(settings: dict, tmp_path: Path):
    for _ in range(2):
        assert not made(settings, tmp_path).train(signalled())
    assert made(settings | {"max_steps": 1}, tmp_path).train(quiet())
    assert [event["step"] for event in events(tmp_path, "validation")] == [2]
    assert not guards(tmp_path)["budget met"]


def test_text_that_was_not_trained_on_is_not_in_the_budget(settings: dict, tmp_path: Path):
    training = made(settings, tmp_path)
    whole = training.data.batch
    training.data.batch = lambda step, rows: whole(step, range(rows.start, rows.stop // 2))
    assert training.train(quiet())
    assert not guards(tmp_path)["budget met"]


def test_an_interrupted_run_goes_on_with_the_micro_batch_it_had(settings: dict, tmp_path: Path):
    training = made(settings | {"micro_batch_size": None}, tmp_path)
    training.micro = training.micro._replace(size=2)
    assert not training.train(signalled())
    assert made(settings | {"micro_batch_size": None}, tmp_path).micro.size == 2
    config = checked(SimpleNamespace(**settings | {"micro_batch_size": None}))
    assert fitted(config, CPU, tmp_path, 3, lambda size: None).size == 8  # 3 is no part of the batch any more


def test_a_checkpoint_that_broke_names_the_one_before_it(settings: dict, tmp_path: Path):
    settings = settings | {"save_every_n_steps": 10, "keep_checkpoints": 2, "max_steps": 20}
    assert made(settings, tmp_path).train(quiet())
    last = tmp_path / "checkpoints" / "step_20"
    for broken in (b"", (last / "state.pt").read_bytes()[:500], b"\x80\x02\xff" * 40):
        (last / "state.pt").write_bytes(broken)
        with pytest.raises(UserError, match=r"step_20 cannot be read \(.+\): remove it to go on from step_10"):
            made(settings, tmp_path)


def test_a_disk_that_fills_leaves_no_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".step_3.tmp").mkdir()

    def full(_state: dict, file: Path) -> None:
        file.write_bytes(b"a part")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"step_5 could not be written \(.+\): free disk space and start again"):
        checkpoints.save_checkpoint(tmp_path, {"step": 5})
    assert not list(tmp_path.iterdir())


def test_a_signal_during_the_imports_is_remembered(settings: dict, tmp_path: Path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "torch.py").write_text(SIGNALLED)
    assert ended(start(settings, tmp_path / "run", PYTHONPATH=str(tmp_path / "first"))) == [75]
    assert ended(start(settings, tmp_path / "run")) == [0]
    assert ended(start(settings, tmp_path / "whole")) == [0]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# A `torch` that is found first: a signal comes as it is imported, and the import goes on with the real one.
SIGNALLED = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGUSR1)
sys.path.remove(os.path.dirname(__file__))
del sys.modules["torch"]
import torch
"""


def test_a_model_that_lost_a_matrix_is_refused(settings: dict, tmp_path: Path):
    from safetensors.torch import save_file

    assert made(settings, tmp_path).train(quiet())
    load_run(tmp_path)
    kept = weights(tmp_path)
    kept.pop("blocks.0.attention.out.weight")
    save_file(kept, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"model is not whole \((.|\n)*attention.out(.|\n)*\): train again"):
        load_run(tmp_path)
