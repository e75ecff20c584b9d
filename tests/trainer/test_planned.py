"""The real trainer, planned and run by the tools: what was computed beforehand is what it built and did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chiplog import tools
from chiplog.inputs import check_dataset
from chiplog.record import State
from tests.trainer.helpers import ROOT, write_tokens

QUICK = {"max_steps": 25, "batch_size": 8, "seq_len": 16, "depth": 1, "overfit_steps": 0}


def run_all(name: str) -> None:
    tools.setup_experiment_dirs(name)
    tools.submit_experiment(name, confirm=True)
    assert tools.experiment_status(name, wait_s=200).ok


def test_trainings_get_from_a_plan_to_a_summary_and_tell_of_the_next(workspace: Path):
    write_tokens(workspace / "data" / "text")
    ask: dict[str, Any] = {"question": "How wide?", "recipe": "train", "dataset": "text", "controls": QUICK}
    plan = tools.plan_experiment(**ask, name="widths", variables={"width": [16, 32]})
    assert plan.warnings == []
    run_all("widths")
    events = {}
    for row in plan.rows:
        home = workspace / "experiments" / "widths" / "runs" / row.run
        lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
        events[row.run] = lines
        begun = next(line for line in lines if line["event"] == "start")
        done = [line for line in lines if line["event"] == "step"]
        assert row.n_params == begun["n_params"] and row.tokens == sum(line["tokens"] for line in done)
        assert row.flops == sum(line["flops"] for line in done)
    summary = tools.summarize_experiment("widths")
    assert summary.ok and [row.state for row in summary.rows] == 2 * [State.COMPLETED]
    for row in summary.rows:
        (validated,) = [line for line in events[row.run] if line["event"] == "validation"]
        assert row.val_loss == row.val_loss_best == validated["loss"] and row.tokens == 25 * 8 * 16
    again = tools.plan_experiment(
        **{**ask, "controls": {**QUICK, "lr": 0.01}}, name="next", variables={"width": [16, 24]}
    )
    same, near = (row.estimate.elapsed for row in again.rows)
    assert same and same.basis == "same-configuration" and same.evidence == ["widths/width16"]
    assert near and near.basis == "scaled" and near.low < near.value < near.high


def test_a_training_that_diverges_is_a_result_that_is_named(workspace: Path):
    write_tokens(workspace / "data" / "text")
    controls = {**QUICK, "optimizer": "sgd", "clip_grad_norm": 0.0, "guard_steps": 0, "lr_schedule": "constant"}
    tools.plan_experiment(
        question="Does it hold?", name="high", recipe="train", dataset="text", controls=controls,
        variables={"lr": [0.01, 1e9]},
    )  # fmt: skip
    run_all("high")
    summary = tools.summarize_experiment("high")
    assert [row.diverged is None for row in summary.rows] == [True, False] and summary.rows[1].val_loss is None
    assert any(words.startswith("lr1e9: nothing, since it diverged: the loss is") for words in summary.not_shown)
    assert tools.submit_experiment("high", confirm=True).jobs == {}


def test_what_the_trainer_prepares_is_what_the_planner_takes(workspace: Path, tmp_path: Path):
    from trainer.prepare import prepare

    text = ROOT.joinpath("README.md").read_text().split("\n\n")
    prepare(text, workspace / "data" / "readme", "bytes", 0.1, seed=0)
    found = check_dataset("readme")
    assert found.ok and found.report.tokens.keys() == {"train", "validation"}  # pyright: ignore
    assert "of a vocabulary of 257" in found.summary
