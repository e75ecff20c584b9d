"""A run that ran out of memory goes on with a smaller micro-batch, and the summary says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiplog import tools
from chiplog.deviation import Deviation, after_running_out, read_deviation
from chiplog.plan import Run
from chiplog.record import Record, State


def run(**config: object) -> Run:
    return Run.model_validate(
        {
            "name": "a", "kind": "finetune", "recipe": "r", "model": "m", "dataset": "d", "seed": 0, "varied": {},
            "config": {"batch_size": 12, "micro_batch_size": None, **config}, "resources": {},
        }
    )  # fmt: skip


def ended(state: State) -> Record:
    return Record(key="local:7", job_id="7", state=state)


def note(folder: Path, size: int) -> None:
    (folder / "deviation.json").write_text(json.dumps({"micro_batch_size": size, "asked": 12, "reason": "r"}))


@pytest.mark.parametrize(
    ("config", "noted", "expected"),
    [({}, None, 6), ({"micro_batch_size": 6}, None, 3), ({"micro_batch_size": 3}, None, 1), ({}, 4, 2),
     ({"micro_batch_size": 1}, None, None)],
)  # fmt: skip
def test_the_next_size_is_a_divisor_of_the_batch_and_at_most_half(
    tmp_path: Path, config: dict[str, object], noted: int | None, expected: int | None
):
    if noted:
        note(tmp_path, noted)
    found = after_running_out(run(**config), tmp_path, ended(State.OUT_OF_MEMORY))
    assert (found and found.micro_batch_size) == expected
    if found:
        assert found.asked == (config.get("micro_batch_size") or 12) and "job 7" in found.reason


@pytest.mark.parametrize(
    ("began", "expected"),
    [
        ([(5, 12)], None),  # it was killed on its way out, or found no turn to try the smaller one
        ([(5, 12), (6, 6)], 3),
        ([(5, 12), (6, 6), (7, 12)], None),
        ([(1, 6)], None),  # an earlier attempt tried it, and this one did not get so far
    ],
)
def test_a_size_that_the_recipe_noted_is_not_halved_before_it_was_tried(
    tmp_path: Path, began: list[tuple[int, int]], expected: int | None
):
    note(tmp_path, 6)
    starts = [
        {"event": "start", "started": f"2026-11-20T00:00:0{second}+00:00", "device": "cpu", "setup_s": 1.0,
         "micro_batch_size": size}
        for second, size in began
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in starts))
    last = ended(State.OUT_OF_MEMORY).model_copy(update={"started": "2026-11-20T00:00:04+00:00"})
    found = after_running_out(run(), tmp_path, last)
    assert (found and found.micro_batch_size) == expected


@pytest.mark.parametrize("state", [State.FAILED, State.TIMEOUT, State.CANCELLED, State.COMPLETED])
def test_no_other_end_makes_a_run_deviate(tmp_path: Path, state: State):
    assert after_running_out(run(), tmp_path, ended(state)) is None
    assert after_running_out(run(), tmp_path, None) is None


def test_a_retry_after_running_out_of_memory_keeps_the_batch_and_the_summary_says_so(lab: Path):
    """The recipe here pretends: it is killed for its memory as long as the micro-batch is larger than 2."""
    tools.plan_experiment(
        question="q?", models={"S": "small"}, dataset="data/words.json", gpus=0, name="e", control="none",
        variables={"lora_rank": [4]}, controls={"out_of_memory_above": 2},
    )  # fmt: skip
    tools.setup_experiment_dirs("e")
    tools.submit_experiment("e", confirm=True)
    (row,) = tools.experiment_status("e", wait_s=60).runs
    (record,) = tools.collect_records("e").records
    assert (row.state, record.state) == (State.FAILED, State.OUT_OF_MEMORY)
    tools.submit_experiment("e", confirm=True)
    folder = lab / "experiments" / "e" / "runs" / "rank4"
    assert read_deviation(folder) == Deviation(
        micro_batch_size=2, asked=4, reason=f"job {record.job_id} ran out of memory with 4"
    )
    (row,) = tools.experiment_status("e", wait_s=60).runs
    assert row.state is State.COMPLETED and row.attempt == 2
    said = tools.summarize_experiment("e")
    words = "rank4: micro_batch_size 2 instead of 4, since job"
    assert words in said.summary and words in (lab / "experiments" / "e" / "summary.md").read_text()
