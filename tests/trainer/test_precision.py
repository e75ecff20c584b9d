"""Products in fewer bits, compiled models and repeatable algorithms: what they change, and what they must not."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.helpers import ended, events, made, quiet, same, start, weights


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"max_epochs": 9.0}


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in events(out, "step")]


@pytest.mark.parametrize(
    "changes", [{"dtype": "bf16"}, {"dtype": "bf16", "architecture": "lstm"}, {"dtype": "fp16"}], ids=str
)
def test_fewer_bits_follow_fp32_and_leave_weights_in_it(changes: dict, settings: dict, tmp_path: Path):
    whole = settings | {"architecture": changes.get("architecture", "transformer")}
    assert ended(start(settings | changes, tmp_path / "few"), start(whole, tmp_path / "fp32")) == [0, 0]
    few, fp32 = losses(tmp_path / "few"), losses(tmp_path / "fp32")
    assert few != fp32 and few == pytest.approx(fp32, rel=0.02)
    assert {weight.dtype for weight in weights(tmp_path / "few").values()} == {torch.float32}
    assert all(one["ok"] for one in json.loads((tmp_path / "few" / "guards.json").read_text()))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fewer_bits_go_on_to_the_same_bits(dtype: str, settings: dict, tmp_path: Path):
    settings |= {"dtype": dtype, "max_steps": 60}
    assert ended(start(settings, tmp_path / "whole")) == [0]
    out = tmp_path / "parts"
    job = start(settings, out)
    while job.poll() is None and not ((out / "metrics.jsonl").exists() and len(losses(out)) > 9):
        time.sleep(0.005)
    job.send_signal(signal.SIGUSR1)
    assert ended(job) == [75] and ended(start(settings, out)) == [0]
    assert same(weights(tmp_path / "whole"), weights(out))


def test_gradients_that_fp16_cannot_hold_at_any_scale_end_the_training(settings: dict, tmp_path: Path):
    """The scaler leaves one step after the other out, and halves its scale of 65,536 sixteen times and once more."""
    training = made(settings | {"dtype": "fp16", "max_steps": 40, "overfit_steps": 0}, tmp_path)
    first = next(training.model.parameters())
    first.register_hook(lambda gradient: gradient * float("inf"))
    before = first.detach().clone()
    assert training.train(quiet())
    assert first.equal(before)
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 17, "diverged": True}
    found = {one["guard"]: one["found"] for one in json.loads((tmp_path / "guards.json").read_text()) if not one["ok"]}
    assert found["finite loss"].startswith("diverged: the gradient's norm is") and "at step 18" in found["finite loss"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_as_it_is(settings: dict, tmp_path: Path):
    settings |= {"max_steps": 6}
    assert ended(start(settings | {"compile": True}, tmp_path / "compiled"), start(settings, tmp_path / "eager")) == [
        0,
        0,
    ]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    compiled, eager = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    assert compiled.keys() == eager.keys() and not same(compiled, eager)  # it was compiled: sums round otherwise
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("architecture", ["transformer", "lstm"])
def test_repeatable_algorithms_are_to_be_had_on_a_cpu_at_no_change(architecture: str, settings: dict, tmp_path: Path):
    settings |= {"architecture": architecture, "max_steps": 6}
    runs = [start(settings | {"deterministic": asked}, tmp_path / str(asked)) for asked in (True, False)]
    assert ended(*runs) == [0, 0]
    assert same(weights(tmp_path / "True"), weights(tmp_path / "False"))
