"""How runs that are under way are described: what is left of them, with its interval, and what looks wrong."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from chiplog import tools
from chiplog.engines import Job
from chiplog.jobs import _status_words
from chiplog.ledger.metrics import Event, Start, Step
from chiplog.plan import Resources, Run
from chiplog.progress import describe, training_left
from chiplog.record import Prediction, State


def steps(seconds: list[float], first: int = 1) -> list[Step]:
    return [
        Step(event="step", step=first + i, loss=1.0, tokens=10, seconds=s, peak_mem_bytes=5, mem_kind="host_rss")
        for i, s in enumerate(seconds)
    ]


def start(step: int = 0, total: int = 100) -> Start:
    return Start(event="start", started=datetime.now(UTC), device="cpu", setup_s=1.0, step=step, total_steps=total)


def job(**given: object) -> Job:
    about = {"id": "1", "name": "a", "state": State.RUNNING, "submitted": None, "log": Path("a"), **given}
    return Job.model_validate(about)


def run(limit: int | None = None) -> Run:
    return Run(
        name="a", kind="finetune", recipe="r", model="m", dataset="d", seed=0, varied={}, config={},
        resources=Resources(time_limit_s=limit),
    )  # fmt: skip


def test_what_is_left_is_at_the_steady_speed_and_has_no_interval_after_few_steps():
    early = training_left(steps([9.0, *[2.0] * 9]), 100)
    assert early and early.value == pytest.approx(2.0 * 90) and early.high == math.inf
    late = training_left(steps([9.0] * 5 + [2.0] * 45), 100)
    assert late and late.value == pytest.approx(100) and 90 < late.low < 100 < late.high < 110
    assert training_left([], 100) is None


@pytest.mark.parametrize("wander", [0.0, 0.05])
def test_the_interval_holds_on_made_runs(wander: float):
    """Steps that differ by a fifth, at a speed that wanders every twenty steps."""
    dice, held = random.Random(5), 0
    for _ in range(300):
        pace = [math.exp(dice.gauss(0, wander)) for _ in range(20)]
        seconds = [pace[i // 20] * dice.lognormvariate(0, 0.2) for i in range(400)]
        left = training_left(steps(seconds[:100]), 400)
        assert left
        held += left.low <= sum(seconds[100:]) <= left.high
    assert 0.88 <= held / 300 <= 1.0


def test_a_resumed_run_counts_the_steps_of_its_own_attempt():
    events: list[Event] = [start(), *steps([50.0] * 30), start(step=20), *steps([1.0] * 30, first=21)]
    found = describe("a", job(ran_s=1600.0, restarts=1), 1, "1", events, run(), None)
    assert (found.step, found.total_steps, found.restarts) == (50, 100, 1)
    assert found.training_left_s == pytest.approx(50.0) and found.peak_mem_bytes == 5


def test_a_run_that_will_miss_what_was_foretold_or_its_limit_is_warned_of():
    events: list[Event] = [start(), *steps([1.0] * 50)]
    about = {"ran_s": 60.0, "attempt_s": 60.0}
    said = Prediction(elapsed_s=(70.0, 60.0, 80.0), peak_mem_bytes=None, mem_kind=None, basis="scaled")
    slow = describe("a", job(**about), 1, "1", events, run(limit=90), said).warnings
    assert len(slow) == 2
    assert "slower than predicted: 1:50 min in all, and 70 s (60 s to 80 s) was said" in slow[0]
    assert "will reach its time limit of 1:30 min" in slow[1]
    fine = said.model_copy(update={"elapsed_s": (100.0, 90.0, 120.0)})
    assert describe("a", job(**about), 1, "1", events, run(limit=200), fine).warnings == []


@pytest.mark.parametrize(
    ("events", "part", "takes"),
    [([start()], "run", "1:30 min so far"), ([start(), *steps([20.0] * 4)], "run", "33:30 min in all"),
     ([start(), *steps([1.0] * 50)], "evaluation", "1:30 min so far")],
)  # fmt: skip
def test_a_run_that_took_longer_than_foretold_is_warned_of_though_its_steps_tell_nothing(
    events: list[Event], part: str, takes: str
):
    said = Prediction(elapsed_s=(70.0, 60.0, 80.0), basis="scaled")
    now = describe("a", job(ran_s=90.0, attempt_s=90.0, part=part), 1, "1", events, run(limit=100), said)
    assert now.warnings == [f"slower than predicted: {takes}, and 70 s (60 s to 80 s) was said"]
    ended = describe("a", job(ran_s=90.0, state=State.COMPLETED), 1, "1", events, run(), said)
    assert ended.warnings == []


def test_the_status_says_requeues_memory_so_far_and_what_looks_wrong():
    said = Prediction(elapsed_s=(70.0, 60.0, 80.0), basis="scaled")
    about = {"ran_s": 90.0, "attempt_s": 90.0, "restarts": 2}
    row = describe("a", job(**about), 1, "1", [start(), *steps([20.0] * 4)], run(), said)
    assert _status_words(row) == (
        "a: RUNNING, step 4 of 100, loss 1, 32:00 min of training left, 5 B so far, put back into the queue 2 times\n"
        "  warning: slower than predicted: 33:30 min in all, and 70 s (60 s to 80 s) was said"
    )


def test_of_a_run_that_evaluates_or_has_ended_nothing_is_left():
    events: list[Event] = [start(), *steps([1.0] * 50)]
    for given in ({"state": State.COMPLETED}, {"part": "evaluation"}):
        assert describe("a", job(**given), 1, "1", events, run(), None).training_left_s is None


def test_checkpoints_of_trained_runs_are_pruned_and_no_others(lab: Path):
    tools.plan_experiment(
        question="q?", models={"S": "small"}, dataset="data/words.json", gpus=0, name="e", control="none",
        variables={"lora_rank": [4, 8]},
    )  # fmt: skip
    tools.setup_experiment_dirs("e")
    runs = lab / "experiments" / "e" / "runs"
    for name in ("rank4", "rank8"):
        (runs / name / "checkpoints" / "step_1").mkdir(parents=True)
        (runs / name / "checkpoints" / "step_1" / "state.pt").write_bytes(b"x" * 3000)
    (runs / "rank4" / "DONE").touch()
    with pytest.raises(Exception, match=r"Remove 2\.93 KiB of checkpoints of rank4\?"):
        tools.prune_checkpoints("e")
    answer = tools.prune_checkpoints("e", confirm=True)
    assert (answer.pruned, answer.freed_bytes) == (["rank4"], 3000)
    assert not (runs / "rank4" / "checkpoints").exists() and (runs / "rank8" / "checkpoints" / "step_1").is_dir()
    assert tools.prune_checkpoints("e", confirm=True).pruned == []
