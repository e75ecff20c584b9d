"""Trainings: the same bits after any interruption, the same losses on several processes, what is left behind."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.helpers import ended, events, same, start, weights

KINDS = [
    {},
    {"architecture": "lstm", "dropout": 0.2},
    {"optimizer": "sgd", "momentum": 0.9, "dropout": 0.1, "lr_schedule": "linear", "micro_batch_size": 2},
]


def pair(settings: dict[str, Any], out: Path) -> list:
    """Both processes of a training, as torchrun starts them on one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        start(settings, out, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in ("0", "1")
    ]


def wait_for(out: Path, step: int, *jobs) -> None:
    """Until that step is recorded, or a process has ended."""
    while all(one.poll() is None for one in jobs):
        if (out / "metrics.jsonl").exists() and any(e["step"] >= step for e in events(out, "step")):
            return
        time.sleep(0.005)


def test_a_training_lowers_the_loss_and_leaves_what_it_says(settings: dict, tmp_path: Path):
    assert ended(start(settings | {"run_val_every_n_steps": 10}, tmp_path / "run")) == [0]
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "guards.json", "checkpoints", "model", "DONE", ".working",
    }  # fmt: skip
    steps, (begun,), (end,) = (events(out, kind) for kind in ("step", "start", "end"))
    assert [e["step"] for e in steps] == list(range(1, 31)) and end["step"] == 30
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    validations = events(out, "validation")
    assert [e["step"] for e in validations] == [10, 20, 30] and validations[-1]["loss"] < validations[0]["loss"]
    assert {e["label_tokens"] for e in validations} == {599} and begun["val_tokens"] == 599
    last = steps[-1]
    assert last["tokens"] == last["padded_tokens"] == 8 * 16 and last["samples"] == 8
    assert last["flops"] == 8 * 16 * begun["flops_per_token"] and last["grad_norm"] > 0 and last["seconds"] > 0
    assert steps[0]["lr"] == pytest.approx(0.01 / 4) and last["lr"] == pytest.approx(0.001)
    assert begun["n_params"] == sum(weight.numel() for weight in weights(out).values())
    outcomes = json.loads((out / "guards.json").read_text())
    assert {one["guard"]: one["ok"] for one in outcomes} == dict.fromkeys(
        ("one-batch overfit", "optimizer coverage", "gradient reach", "weights move", "budget met", "finite loss"), True
    )
    assert ended(start(settings, out)) == [0] and len(events(out, "start")) == 1  # there is nothing to do


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_training_killed_at_any_moment_ends_with_the_same_bits(changes: dict, settings: dict, tmp_path: Path):
    settings = settings | changes | {"save_every_n_steps": 7, "max_steps": 60, "overfit_steps": 0, "max_epochs": 9}
    assert ended(start(settings, tmp_path / "whole")) == [0]
    out = tmp_path / "parts"
    for step in (9, 31):
        job = start(settings, out)
        wait_for(out, step, job)
        job.kill()
        job.communicate()
    job = start(settings, out)
    wait_for(out, 45, job)
    job.send_signal(signal.SIGUSR1)
    assert ended(job) == [75]
    assert ended(start(settings, out)) == [0]
    assert same(weights(tmp_path / "whole"), weights(out))
    assert len(events(out, "start")) == 4
    one, other = ({e["step"]: e["loss"] for e in events(run, "step")} for run in (tmp_path / "whole", out))
    assert one == other and len(one) == 60
    assert events(tmp_path / "whole", "validation")[-1]["loss"] == events(out, "validation")[-1]["loss"]


@pytest.mark.parametrize("changes", KINDS[:2], ids=["transformer", "lstm"])
def test_two_processes_compute_what_one_does_at_the_same_batch(changes: dict, settings: dict, tmp_path: Path):
    settings = settings | changes | {"dropout": 0.0, "optimizer": "sgd", "lr": 0.1, "max_epochs": 9}
    assert ended(start(settings, tmp_path / "one")) == [0]
    out = tmp_path / "two"
    assert ended(*pair(settings, out)) == [0, 0]
    for kind in ("step", "validation"):
        one, two = (events(tmp_path / name, kind) for name in ("one", "two"))
        assert len(one) == len(two) > 0
        for ours, theirs in zip(one, two, strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-6)
    one, two = weights(tmp_path / "one"), weights(out)
    assert events(out, "start")[0]["world_size"] == 2
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)


def test_two_processes_stop_after_the_same_step_and_end_with_the_same_bits(settings: dict, tmp_path: Path):
    settings = settings | {"architecture": "lstm", "dropout": 0.2, "max_steps": 60, "max_epochs": 9}
    assert ended(*pair(settings, tmp_path / "whole")) == [0, 0]
    out = tmp_path / "parts"
    jobs = pair(settings, out)
    wait_for(out, 20, *jobs)
    jobs[1].send_signal(signal.SIGUSR1)
    assert ended(*jobs) == [75, 75]
    assert ended(*pair(settings, out)) == [0, 0]
    assert same(weights(tmp_path / "whole"), weights(out))


def test_a_finished_training_is_extended_to_the_bits_of_a_longer_one(settings: dict, tmp_path: Path):
    settings = settings | {"lr_schedule": "inverse_sqrt"}
    assert ended(start(settings | {"max_steps": 50}, tmp_path / "long")) == [0]
    for steps in (30, 50):
        assert ended(start(settings | {"max_steps": steps}, tmp_path / "run")) == [0]
    assert same(weights(tmp_path / "long"), weights(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "DONE").read_text()) == {"step": 50, "diverged": False}


def test_the_micro_batch_never_changes_the_effective_one(settings: dict, tmp_path: Path):
    for size in (1, 4, None):
        assert ended(start(settings | {"micro_batch_size": size}, tmp_path / str(size))) == [0]
    losses = [[e["loss"] for e in events(tmp_path / name, "step")] for name in ("1", "4", "None")]
    assert losses[0] == pytest.approx(losses[2], abs=1e-4) and losses[1] == pytest.approx(losses[2], abs=1e-4)
    assert [events(tmp_path / name, "start")[0]["micro_batch_size"] for name in ("1", "4", "None")] == [1, 4, 8]


def test_checkpoints_are_kept_as_many_as_asked(settings: dict, tmp_path: Path):
    out = tmp_path / "run"
    assert ended(start(settings | {"save_every_n_steps": 8, "keep_checkpoints": 2}, out)) == [0]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step_24", "step_30"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "nowhere"}, "dataset is 'nowhere', which is not there"),
        ({"seq_len": 6000}, "fewer than one sequence of 6000: lower seq_len"),
        ({"architecture": "lstm", "batch_size": 4000}, "make no 4000 streams of 16: lower batch_size or seq_len"),
        ({"micro_batch_size": 3}, "micro_batch_size 3 does not divide batch_size 8: take 1, 2, 4, 8"),
        ({"val_tokens": 600}, "val_tokens is 600 and the validation split has 599 targets"),
    ],
)
def test_what_cannot_be_trained_ends_with_one_line(changes: dict, words: str, settings: dict, tmp_path: Path):
    job = start(settings | changes, tmp_path / "run")
    _, said = job.communicate(timeout=100)
    assert job.returncode == 1 and "Traceback" not in said
    assert words in said.splitlines()[-1]


def test_a_training_that_diverges_ends_as_a_result_and_the_guards_say_so(settings: dict, tmp_path: Path):
    settings = settings | {"lr": 1e9, "clip_grad_norm": 0.0, "optimizer": "sgd"}
    for _ in range(2):  # and is not started again
        assert ended(start(settings, tmp_path)) == [0]
    assert json.loads((tmp_path / "DONE").read_text())["diverged"] and len(events(tmp_path, "start")) == 1
    fired = {one["guard"]: one["found"] for one in json.loads((tmp_path / "guards.json").read_text()) if not one["ok"]}
    assert "diverged: the loss is" in fired["finite loss"] and "tokens instead of 3,840" in fired["budget met"]


def test_a_checkpoint_of_other_settings_is_refused_by_name(settings: dict, tmp_path: Path):
    assert ended(start(settings, tmp_path / "run")) == [0]
    job = start(settings | {"lr": 0.02, "max_steps": 40}, tmp_path / "run")
    said = job.communicate(timeout=100)[1]
    assert "was made with another max_steps, lr (a learning rate that falls" in said and job.returncode == 1
