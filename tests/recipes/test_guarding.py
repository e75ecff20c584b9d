"""The validity guards of LoRA runs: silent over a sound one, and each fires where it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.helpers import Never, adapter, begin, finetune, load, same
from tests.recipes.test_finetune import AfterStep, sum_steps
from tests.recipes.test_sharding import SEEN
from trainer import guards


def outcomes(out: Path) -> dict[str, dict[str, Any]]:
    return {one["guard"]: one for one in guards.read(out)}


def meddled(settings: dict, out: Path, meddle: Callable[[Any], None]) -> dict[str, dict[str, Any]]:
    """The outcomes of a run that was meddled with before its first step."""
    run = begin(settings, out)
    meddle(run)
    run.train(Never)
    return outcomes(out)


def test_a_sound_run_passes_all_guards_with_the_bits_it_has_without_them(settings: dict, tmp_path: Path):
    finetune(settings, tmp_path / "with")
    found = outcomes(tmp_path / "with")
    assert sorted(found) == sorted(SEEN) and all(one["ok"] and one["examined"] for one in found.values()), found
    assert found["budget met"]["found"] == "80 samples, 2.00 times the corpus"
    finetune(settings | {"guard_steps": 0}, tmp_path / "without")
    assert list(outcomes(tmp_path / "without")) == ["budget met"]
    assert same(adapter(tmp_path / "with"), adapter(tmp_path / "without"))


@pytest.mark.parametrize("stops", [(3, 6), (9, 19)], ids=["before weights are judged", "after"])
def test_a_run_that_goes_on_has_the_guards_of_the_whole_run(stops: tuple[int, ...], settings: dict, tmp_path: Path):
    for step in stops:
        finetune(settings, tmp_path, AfterStep(step - sum_steps(tmp_path)))
    finetune(settings, tmp_path)
    found = outcomes(tmp_path)
    assert sorted(found) == sorted(SEEN) and all(one["ok"] for one in found.values()), found
    assert found["budget met"]["examined"] == 80
    assert "in 7 steps" in found["weights move"]["found"] or stops == (3, 6)  # 2 of warm-up, 5 more


def test_starts_of_too_few_steps_to_judge_leave_the_weights_unjudged(settings: dict, tmp_path: Path):
    for step in range(4, 20, 4):
        finetune(settings | {"warmup_steps": 0}, tmp_path, AfterStep(step - sum_steps(tmp_path)))
    finetune(settings | {"warmup_steps": 0}, tmp_path)
    assert list(outcomes(tmp_path)) == ["optimizer coverage", "frozen stays frozen", "budget met"]


def test_an_adapter_that_bf16_cannot_move_is_seen_and_a_warm_up_is_waited_for(settings: dict, tmp_path: Path):
    stuck = settings | {"dtype": "bf16", "lr": 1e-7, "warmup_steps": 0}
    finetune(stuck, tmp_path / "stuck")
    found = outcomes(tmp_path / "stuck")["weights move"]
    assert not found["ok"] and "lora_a.weight (0.00%)" in found["found"]
    finetune(settings | {"dtype": "bf16", "lr": 0.002, "warmup_steps": 12}, tmp_path / "slow")
    assert outcomes(tmp_path / "slow")["weights move"]["ok"]


def test_a_matrix_that_never_gets_a_gradient_is_named(settings: dict, tmp_path: Path):
    def cut(run: Any) -> None:
        dict(run.model.named_parameters())["layers.1.attn.q_proj.lora_b.weight"].register_hook(torch.zeros_like)

    found = meddled(settings, tmp_path, cut)["gradient reach"]
    assert not found["ok"] and "no gradient in 5 steps: layers.1.attn.q_proj.lora_a.weight" in found["found"]


def test_a_matrix_that_the_optimizer_does_not_have_is_named(settings: dict, tmp_path: Path):
    found = meddled(settings, tmp_path, lambda run: run.optimizer.param_groups[0]["params"].pop())
    assert not found["optimizer coverage"]["ok"] and "in 0" in found["optimizer coverage"]["found"]


def test_a_base_weight_that_changes_by_one_bit_is_named(settings: dict, tmp_path: Path):
    def flip(run: Any) -> None:
        dict(run.model.named_parameters())["norm.scale"].data.view(torch.int32)[3] ^= 1

    found = meddled(settings, tmp_path, flip)["frozen stays frozen"]
    assert not found["ok"] and found["found"] == "frozen parameters changed: norm.scale"


def test_of_a_large_base_weight_a_sample_is_looked_at_and_that_is_said(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(load("recipes/finetuning.py"), "SAMPLE", 100)
    finetune(settings | {"max_steps": 6}, tmp_path)
    found = outcomes(tmp_path)["frozen stays frozen"]
    assert found["ok"] and "bit for bit in the " in found["found"] and "entries that were looked at" in found["found"]


def test_samples_that_were_lost_are_counted(settings: dict, tmp_path: Path):
    def lose(run: Any) -> None:
        run.lines = run.lines[:38]

    found = meddled(settings, tmp_path, lose)["budget met"]
    assert not found["ok"] and found["found"] == "otherwise than planned: 76 samples instead of 80"
