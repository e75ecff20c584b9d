"""Two processes that train one model, on the CPU with gloo: what one computes, and what either lives through."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.helpers import ROOT, adapter, defaults, events, finetune, same, start, write_splits
from trainer.job import UserError
from trainer.micro import given

SCRIPT = "recipes/lora_finetune_distributed.py"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@pytest.fixture
def several(settings: dict, tmp_path: Path) -> dict[str, Any]:
    """Settings for the distributed recipe, with validation."""
    data = {"dataset": str(write_splits(tmp_path / "words.json")), "val_split": "validation"}
    return {**defaults("lora_finetune_distributed"), **settings, **data, "run_val_every_n_steps": 4, "max_steps": 12}


def start_two(
    settings: dict, out: Path, names: tuple[str, str, str] = TORCHRUN, script: str | Path = SCRIPT
) -> list[subprocess.Popen[str]]:
    """Both processes of a run, as torchrun or Slurm starts them on one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(script, settings, out, **where, **dict(zip(names, (str(rank), "2", str(rank)), strict=True)))
        for rank in (0, 1)
    ]


def ended(jobs: list[subprocess.Popen[str]]) -> list[int]:
    """Their exit codes; what they said where one had a traceback or was ended by a signal of its own."""
    logs = [job.communicate(timeout=200)[1] for job in jobs]
    assert "Traceback" not in logs[0] + logs[1], logs
    assert all(job.returncode >= 0 for job in jobs), logs
    return [job.returncode for job in jobs]


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_grad_norm": 0.5, "shard_model": True},
        {"clip_grad_norm": 0.5, "shard_model": False},
        {"packed": True, "batch_size": 2, "micro_batch_size": 1, "shard_model": False},
    ],
    ids=str,
)
def test_two_processes_compute_what_one_does_at_the_same_batch(changes: dict, several: dict, tmp_path: Path):
    settings = several | changes | {"lr": 0.002}
    assert ended(start_two(settings, tmp_path / "two", SLURM)) == [0, 0]
    finetune(settings, tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").iterdir()} - {"config.yaml"} == {
        path.name for path in (tmp_path / "one").iterdir()
    }
    for kind in ("step", "validation"):
        one, two = (events(tmp_path / name, kind) for name in ("one", "two"))
        assert [e["step"] for e in one] == [e["step"] for e in two]
        for ours, theirs in zip(one, two, strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
            assert theirs["label_tokens"] == ours["label_tokens"] and theirs["samples"] == ours["samples"]
    assert events(tmp_path / "two", "start")[0]["world_size"] == 2
    one, two = (adapter(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)


def test_processes_stop_after_the_same_step_are_killed_and_end_with_the_same_bits(several: dict, tmp_path: Path):
    """Whether they hold the model whole or divide it, and one kind goes on from the other's checkpoint."""
    settings = several | {"lora_dropout": 0.2, "max_steps": 60, "epochs": 10, "run_val_every_n_steps": 20}
    assert ended(start_two(settings, tmp_path / "whole")) == [0, 0]
    out = tmp_path / "parts"
    jobs = start_two(settings, out)
    wait_for(out, 7, jobs)
    jobs[1].send_signal(signal.SIGUSR1)  # the other process gets none
    assert ended(jobs) == [75, 75]
    stopped = events(out, "step")[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{stopped}"]
    jobs = start_two(settings | {"shard_model": False}, out)
    wait_for(out, stopped + 4, jobs)
    for job in jobs:
        job.kill()
        job.communicate()
    assert ended(start_two(settings, out)) == [0, 0]
    for folder in ("adapter", "best"):
        assert same(adapter(tmp_path / "whole", folder), adapter(out, folder))


def wait_for(out: Path, step: int, jobs: list[Any]) -> None:
    """Until that step is recorded, or a process has ended."""
    while all(job.poll() is None for job in jobs):
        if (out / "metrics.jsonl").exists() and any(e["step"] >= step for e in events(out, "step")):
            return
        time.sleep(0.005)


def driver(folder: Path, lines: str) -> Path:
    """A script that runs the recipe after `lines`, which may change its modules."""
    script = folder / "driver.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT / 'recipes')!r}, {str(ROOT)!r}]\n"
        "from trainer import job\n"
        "stop = job.Stop()\n"
        "import torch, finetuning\n"
        "from trainer import watch\n"
        f"{lines}"
        f"recipe = Path({str(ROOT / SCRIPT)!r})\n"
        "job.run(lambda: finetuning.main(recipe, stop, distributed=True))\n"
    )
    return script


def short_of_memory(when: str) -> str:
    """Lines that let the process's passes run out of memory in their midst, where `when` holds."""
    return (
        "from torchtune.modules import MultiHeadAttention\n"
        "loss, forward = finetuning.Finetuning._loss, MultiHeadAttention.forward\n"
        "now = []\n"
        "def short(run, part):\n"
        f"    now[:] = [{when}]\n"
        "    return loss(run, part)\n"
        "def attend(attention, *inputs, **more):\n"
        "    if now[0]:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return forward(attention, *inputs, **more)\n"
        "finetuning.Finetuning._loss, MultiHeadAttention.forward = short, attend\n"
    )


@pytest.mark.parametrize(
    ("where", "shard_model"),
    [("run.ranks.rank == 1", True), ("run.ranks.rank == 1", False), ("True", True)],
    ids=["in one that divides the model", "in one that holds it whole", "in both"],
)
def test_too_little_memory_ends_both_processes_with_a_smaller_micro_batch(
    where: str, shard_model: bool, several: dict, tmp_path: Path
):
    settings = several | {"shard_model": shard_model}
    script = driver(tmp_path, short_of_memory(f"{where} and run.step == 2 and len(part.tokens) > 1"))
    out = tmp_path / "run"
    assert ended(start_two(settings, out, script=script)) == [75, 75]
    assert json.loads((out / "deviation.json").read_text()) == {
        "micro_batch_size": 1,
        "asked": 2,
        "reason": "out of memory in step 3 at micro_batch_size 2",
    }
    assert ended(start_two(settings, out, script=script)) == [0, 0]
    assert [(e["step"], e["micro_batch_size"]) for e in events(out, "start")] == [(0, 2), (2, 1)]
    assert [e["step"] for e in events(out, "step")] == [*range(1, 13)]


def test_too_little_memory_for_the_smallest_micro_batch_ends_both_processes_with_words(several: dict, tmp_path: Path):
    script = driver(tmp_path, short_of_memory("run.ranks.rank == 1 and not run.model.training"))
    jobs = start_two(several | {"micro_batch_size": 1}, tmp_path / "run", script=script)
    logs = [job.communicate(timeout=100)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [1, 1], logs
    errors = [line for line in "".join(logs).splitlines() if "error" in line.lower()]
    assert len(errors) == 1, logs
    assert errors[0].startswith("error: out of memory in the validation after step 4 at micro_batch_size 1, the small")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_4"]


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_killed_leaves_no_other_waiting(gone: int, several: dict, tmp_path: Path):
    jobs = start_two(several | {"epochs": 300, "max_steps": 3000}, tmp_path)
    wait_for(tmp_path, 3, jobs)
    jobs[gone].kill()
    jobs[1 - gone].communicate(timeout=100)
    jobs[gone].communicate()
    assert jobs[1 - gone].returncode == 1


@pytest.mark.parametrize(
    ("gone", "words"), [(0, "the other processes do not answer: start again"), (1, "process 1 is gone: start again")]
)
def test_a_process_that_falls_silent_ends_the_other(gone: int, words: str, several: dict, tmp_path: Path):
    """As one does that dies beside NCCL, whose kernels wait on: gloo's sockets stay open here."""
    script = driver(tmp_path, "watch.SILENT_S, watch.LEAVING_S = 3.0, 1.0\n")
    jobs = start_two(several | {"epochs": 300, "max_steps": 3000}, tmp_path / "run", script=script)
    wait_for(tmp_path / "run", 3, jobs)
    jobs[gone].send_signal(signal.SIGSTOP)
    _, log = jobs[1 - gone].communicate(timeout=100)
    jobs[gone].kill()
    jobs[gone].communicate()
    assert jobs[1 - gone].returncode == 1
    assert log.splitlines()[-1] == f"error: {words}"


@pytest.mark.parametrize(
    ("settings_change", "environment", "words"),
    [
        ({}, {"RANK": "0", "WORLD_SIZE": "2"}, "2 processes cannot meet without MASTER_ADDR and MASTER_PORT"),
        ({"max_steps": 1}, {"SLURM_NTASKS": "1"}, ""),
    ],
    ids=["nowhere to meet", "alone"],
)
def test_a_process_says_what_it_lacks_and_needs_nothing_alone(
    settings_change: dict, environment: dict, words: str, several: dict, tmp_path: Path
):
    job = start(SCRIPT, several | settings_change, tmp_path / "run", **environment)
    _, log = job.communicate(timeout=120)
    assert job.returncode == (1 if words else 0), log
    assert words in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("processes", "micro", "words"),
    [
        (3, None, "batch_size 4 cannot be divided by 3 processes"),
        (2, 4, "micro_batch_size 4 does not divide the 2 of batch_size 4 for each of 2 processes: take 1, 2"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(processes: int, micro: int | None, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        given(micro, 4, processes, tmp_path)


def test_one_process_that_would_leave_gpus_idle_is_refused(monkeypatch: pytest.MonkeyPatch):
    ranks = import_module("trainer.ranks")
    monkeypatch.setattr(ranks.job, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="4 GPUs are here and one process was started: start one for each, by srun"):
        ranks.join(None)
