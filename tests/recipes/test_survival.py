"""What a run lives through: signals, kills, too little memory, and being gone on with by another micro batch."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.helpers import Never, adapter, begin, events, finetune, same, start, write_splits
from trainer.job import UserError

SCRIPT = "recipes/lora_finetune_single_device.py"


class Looks:
    """A stop that is asked for from the `n`-th look on."""

    def __init__(self, n: int):
        self.n, self.looked = n, 0

    @property
    def asked(self) -> bool:
        self.looked += 1
        return self.looked >= self.n


def wait_for_steps(job: Any, out: Path, n: int) -> None:
    """Until the job has recorded n steps, or has ended."""
    while job.poll() is None and n_steps(out) < n:
        time.sleep(0.005)


def n_steps(out: Path) -> int:
    """The last step that is recorded."""
    return max((line["step"] for line in events(out, "step")), default=0) if (out / "metrics.jsonl").exists() else 0


def kept(out: Path) -> list[str]:
    return [path.name for path in (out / "checkpoints").iterdir()]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.3, "packed": True, "batch_size": 2},
        {"use_dora": True, "lora_dropout": 0.2, "activation_checkpointing": True, "micro_batch_size": 2},
        {"val_split": "validation", "run_val_every_n_steps": 3, "clip_grad_norm": 0.5},
    ],
    ids=str,
)
def test_a_run_stopped_again_and_again_ends_with_the_same_bits(changes: dict, settings: dict, tmp_path: Path):
    settings |= changes | {"max_steps": 14, "dataset": str(write_splits(tmp_path / "words.json"))}
    finetune(settings, tmp_path / "whole")
    starts = 0
    while not (tmp_path / "parts" / "DONE").exists():
        finetune(settings, tmp_path / "parts", Looks(4))
        starts += 1
    assert starts >= 3
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "parts"))
    for kind, key in (("step", "loss"), ("step", "lr"), ("validation", "loss")):
        whole, parts = ({e["step"]: e[key] for e in events(tmp_path / name, kind)} for name in ("whole", "parts"))
        assert whole == parts
    if "val_split" in changes:
        assert same(adapter(tmp_path / "whole", "best"), adapter(tmp_path / "parts", "best"))


def test_a_job_killed_at_any_moment_and_started_again_ends_with_the_same_bits(settings: dict, tmp_path: Path):
    settings |= {"packed": True, "batch_size": 2, "lora_dropout": 0.1, "epochs": 12, "save_every_n_steps": 17}
    finetune(settings, tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(2):
        job = start(SCRIPT, settings, out)
        wait_for_steps(job, out, n_steps(out) + rng.randint(2, 25))
        job.kill()
        job.communicate()
        assert job.returncode == -signal.SIGKILL
    job = start(SCRIPT, settings, out)
    _, log = job.communicate(timeout=120)
    assert job.returncode == 0, log
    assert same(adapter(tmp_path / "whole"), adapter(out))
    whole, killed = ({e["step"]: e["loss"] for e in events(folder, "step")} for folder in (tmp_path / "whole", out))
    assert whole == killed


def test_steps_that_a_kill_took_are_saved_as_soon_as_they_are_made_again(settings: dict, tmp_path: Path):
    finetune(settings, tmp_path, Looks(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as a killed attempt leaves it, the last line cut off
        for step in (4, 5, 6):
            file.write(json.dumps({"event": "step", "step": step, "loss": 1.0}) + "\n")
        file.write('{"event": "step", "st')
    finetune(settings, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    broken = lines.index('{"event": "step", "st')
    assert json.loads(lines[broken + 1])["event"] == "start"
    after = [json.loads(line) for line in lines[broken + 1 :]]
    assert [e["step"] for e in after if e["event"] == "checkpoint"] == [6, 10, 20]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=str)
def test_a_signal_before_the_first_step_still_lets_one_be_made(number: signal.Signals, settings: dict, tmp_path: Path):
    job = start(SCRIPT, settings | {"epochs": 30}, tmp_path)
    while job.poll() is None and not catches_signals(job.pid):
        time.sleep(0.002)
    job.send_signal(number)
    _, log = job.communicate(timeout=120)
    assert job.returncode == 75, log
    assert n_steps(tmp_path) >= 1 and kept(tmp_path) == [f"step_{n_steps(tmp_path)}"]


def catches_signals(pid: int) -> bool:
    """Whether a process handles SIGUSR1, as the kernel shows it (proc(5), SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def test_a_signal_ends_a_validation_and_the_next_start_makes_it_first(settings: dict, tmp_path: Path):
    data = str(write_splits(tmp_path / "words.json"))
    settings |= {"dataset": data, "val_split": "validation", "run_val_every_n_steps": 4, "max_steps": 8}
    finetune(settings, tmp_path / "whole")
    out = tmp_path / "parts"
    run = begin(settings, out)
    assert not run.train(Looks(5))  # the fifth look is the first of the validation after step 4
    assert kept(out) == ["step_4"] and events(out, "validation") == []
    with pytest.raises(UserError, match="a signal ended the validation after step 4, with which this start began"):
        finetune(settings, out, Looks(1))
    assert kept(out) == ["step_4"]
    finetune(settings, out)
    assert [e["step"] for e in events(out, "validation")] == [4, 8]
    assert [e["loss"] for e in events(out, "validation")] == [
        e["loss"] for e in events(tmp_path / "whole", "validation")
    ]
    assert same(adapter(tmp_path / "whole", "best"), adapter(out, "best"))


def cuda_fails() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def cpu_fails() -> None:
    torch.empty(1 << 50)  # more than any machine has: the allocator's own error


def short_of_memory(run: Any, largest: Callable[[int], int], fail: Callable[[], None] = cuda_fails) -> None:
    """Lets a forward pass run out of memory that has more samples than `largest` says for the steps done."""
    forward = run.model.forward

    def checked_forward(tokens: torch.Tensor, **inputs: Any) -> Any:
        if len(tokens) > largest(run.step):
            fail()
        return forward(tokens, **inputs)

    run.model.forward = checked_forward


@pytest.mark.parametrize("fail", [cuda_fails, cpu_fails])
def test_out_of_memory_lowers_the_micro_batch_and_leaves_the_batch_as_it_is(
    fail: Callable[[], None], settings: dict, tmp_path: Path
):
    settings |= {"batch_size": 6, "lr": 0.001}
    finetune(settings, tmp_path / "whole")
    out = tmp_path / "short"
    for largest in (lambda done: 4, lambda done: 3 if done < 5 else 2):
        run = begin(settings, out)
        short_of_memory(run, largest, fail)
        assert not run.train(Never)
    assert kept(out) == ["step_5"]
    assert json.loads((out / "deviation.json").read_text()) == {
        "micro_batch_size": 1,
        "asked": 6,
        "reason": "out of memory in step 6 at micro_batch_size 3",
    }
    finetune(settings, out)
    began = [(e["step"], e["micro_batch_size"], (e["deviation"] or {}).get("asked")) for e in events(out, "start")]
    assert began == [(0, 6, None), (0, 3, 6), (5, 1, 6)]
    whole, short = ({e["step"]: e for e in events(tmp_path / name, "step")} for name in ("whole", "short"))
    assert whole.keys() == short.keys()
    for step in whole:
        assert short[step]["loss"] == pytest.approx(whole[step]["loss"], abs=1e-5)
        assert short[step]["tokens"] == whole[step]["tokens"] and short[step]["samples"] == 6


def test_out_of_memory_at_a_micro_batch_of_1_ends_the_run_with_words(settings: dict, tmp_path: Path):
    run = begin(settings | {"micro_batch_size": 1}, tmp_path)
    short_of_memory(run, lambda done: 1 if done < 2 else 0)
    with pytest.raises(
        UserError, match="out of memory in step 3 at micro_batch_size 1, the smallest: lower max_seq_le"
    ):
        run.train(Never)
    assert kept(tmp_path) == ["step_2"] and not (tmp_path / "deviation.json").exists()


def test_out_of_memory_in_a_validation_keeps_the_steps_made(settings: dict, tmp_path: Path):
    settings |= {"dataset": str(write_splits(tmp_path / "w.json")), "val_split": "validation", "max_steps": 3}
    run = begin(settings, tmp_path)
    short_of_memory(run, lambda done: 4 if done < 3 else 2)
    assert not run.train(Never)
    assert kept(tmp_path) == ["step_3"]
    assert json.loads((tmp_path / "deviation.json").read_text())["reason"].startswith(
        "out of memory in the validation after step 3"
    )
    finetune(settings, tmp_path)
    assert [e["step"] for e in events(tmp_path, "validation")] == [3]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ('{"micro_batch_size": 3}', r"says micro_batch_size 3, the settings 2: remove it, or let it name one of 1, 2"),
        ('{"micro_batch_size": 4}', r"says micro_batch_size 4, the settings 2"),
        ('{"micro": 1}', "names no micro_batch_size: remove it"),
        ("half", "names no micro_batch_size: remove it"),
    ],
)
def test_a_deviation_that_cannot_be_is_refused(written: str, words: str, settings: dict, tmp_path: Path):
    (tmp_path / "deviation.json").write_text(written)
    with pytest.raises(UserError, match=words):
        begin(settings | {"micro_batch_size": 2}, tmp_path)


def test_a_checkpoint_that_cannot_be_read_is_named(settings: dict, tmp_path: Path):
    finetune(settings, tmp_path, Looks(2))
    state = tmp_path / "checkpoints" / "step_2" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step_2 cannot be read .*: remove it to start anew"):
        begin(settings, tmp_path)
