"""Predicted against actual: the error of a run, the report over many, the drift alarm, and time limits."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from chiplog.calibration import EXPERIMENTS_PER_FALSE_ALARM, Drift, calibration, drifts, in_words
from chiplog.ledger import Ledger
from chiplog.ledger.parse import parse_log
from chiplog.past_runs import calibration_report
from chiplog.record import Prediction, Record, State, Usage
from tests.core.test_cli import chiplog, plan
from tests.core.test_flow import answer, calls

EDGE = NormalDist().inv_cdf(0.95)
FIRST = datetime(2026, 11, 1, tzinfo=UTC)


def a_run(
    number: int = 0, *, told: tuple[float, float, float] | None = (100, 80, 125), took: float | None = 100,
    memory: tuple[float, float, float] | None = None, peak: int | None = None, kinds: tuple[str | None, str | None] = (
        "reserved", "reserved"), state: State = State.COMPLETED, limit: int | None = None, resumed: bool = False,
    device: str = "A100", basis: str = "scaled", **more: Any,
) -> Record:  # fmt: skip
    """A run of an experiment of its own that ended `number` hours after FIRST."""
    values = {
        "key": f"local:{number}", "experiment": f"e{number}", "run": "r", "kind": "finetune", "recipe": "lora",
        "model": "models/1B", "state": state, "ended": (FIRST + timedelta(hours=number)).isoformat(),
        "usage": Usage(device=device, elapsed_s=took, time_limit_s=limit, resumed=resumed, peak_mem_bytes=peak,
                       mem_kind=kinds[1] if peak else None),  # pyright: ignore[reportArgumentType]
        "predicted": Prediction(elapsed_s=told, peak_mem_bytes=memory, mem_kind=kinds[0], basis=basis,
                                mem_basis="physics"),
    }  # fmt: skip
    return Record.model_validate({**values, **more})


def history(
    rng: random.Random, spread: float, shifts: Sequence[float], runs: int = 1, shared: float = 0
) -> list[Record]:
    """Experiments of `runs` runs each, whose 90 % intervals hold until the log of the actual time is shifted.

    `shared` is the part of the variance that the runs of one experiment have in common.
    """
    told = 100.0, 100 * math.exp(-EDGE * spread), 100 * math.exp(EDGE * spread)
    records = []
    for number, shift in enumerate(shifts):
        common = rng.gauss(0, math.sqrt(shared))
        for run in range(runs):
            took = 100 * math.exp(shift + spread * (common + rng.gauss(0, math.sqrt(1 - shared))))
            records.append(a_run(number, told=told, took=took, key=f"local:{number}.{run}"))
    return records


def test_a_run_that_completed_has_its_error_and_whether_its_interval_held():
    run = a_run(took=80, memory=(2e9, 1e9, 3e9), peak=4_000_000_000)
    assert run.time_outcome and run.mem_outcome
    assert (run.time_outcome.error, run.time_outcome.held) == (0.25, True)
    assert (run.mem_outcome.error, run.mem_outcome.held) == (-0.5, False)
    assert [a_run(took=took).time_outcome.held for took in (79.9, 80, 125, 125.1)] == [False, True, True, False]  # pyright: ignore


@pytest.mark.parametrize(
    "change",
    [{"resumed": True}, {"state": State.FAILED}, {"state": State.CANCELLED}, {"took": None}, {"told": None},
     {"predicted": None}],
    ids=str,
)  # fmt: skip
def test_a_part_of_a_run_a_failed_one_and_an_unknown_figure_have_no_error(change: dict[str, Any]):
    run = a_run(**change)
    assert run.time_outcome is None and calibration([run]).time == []


@pytest.mark.parametrize("kinds", [("reserved", "allocated"), (None, "reserved"), ("reserved", None), (None, None)])
def test_memory_of_different_kinds_is_not_compared(kinds: tuple[str | None, str | None]):
    run = a_run(memory=(2e9, 1e9, 3e9), peak=2_000_000_000, kinds=kinds)
    assert run.mem_outcome is None and calibration([run]).memory == [] and calibration([run]).time


@pytest.mark.parametrize("state", [State.TIMEOUT, State.OUT_OF_MEMORY])
def test_a_run_that_was_cut_short_misses_above_its_interval_and_is_undecided_within_it(state: State):
    runs = [a_run(0), a_run(1, state=state, took=125.1), a_run(2, state=state, took=125), a_run(3, state=state, took=5)]
    (figures, *_) = calibration(runs).time
    assert figures.held and figures.held.value == 0.5
    assert (figures.n, figures.n_decided, figures.n_undecided, figures.mape) == (1, 2, 2, 0.0)


def test_the_report_is_of_all_runs_and_by_device_recipe_model_and_basis():
    runs = [
        a_run(0, took=80),
        a_run(1, took=100),
        a_run(2, took=200, device="H100", basis="same-configuration", model="/data/models/8B"),
        a_run(3, took=50, device="H100", recipe=None, kind="control", memory=(10, 5, 15), peak=8),
    ]
    report = calibration(runs)
    assert [(one.by, one.name, one.n, one.mape) for one in report.time] == [
        ("all", "all", 4, 0.4375),
        ("device", "A100", 2, 0.125), ("device", "H100", 2, 0.75),
        ("recipe", "lora", 3, 0.25), ("recipe", "control", 1, 1.0),
        ("model", "1B", 3, pytest.approx(1.25 / 3)), ("model", "8B", 1, 0.5),
        ("basis", "scaled", 3, pytest.approx(1.25 / 3)), ("basis", "same-configuration", 1, 0.5),
    ]  # fmt: skip
    everything = report.time[0]
    assert (everything.median_ape, everything.median_ratio, everything.n_decided) == (0.375, 0.9, 4)
    assert everything.mean_width == pytest.approx(0.45) and everything.held
    # Clopper and Pearson's interval of 2 in 4, from tables.
    assert [round(end, 4) for end in (everything.held.low, everything.held.high)] == [0.0676, 0.9324]
    assert [(one.by, one.name, one.mape) for one in report.memory] == [
        ("all", "all", 0.25), ("device", "H100", 0.25), ("recipe", "control", 0.25), ("model", "1B", 0.25),
        ("basis", "physics", 0.25),
    ]  # fmt: skip


# Spread of the log of the time, and within how many experiments a shift by 35 % is found in nine of ten histories.
FOUND_WITHIN = {0.1: 8, 0.15: 15, 0.25: 50}  # 90 % intervals of 85-118 %, 78-128 % and 66-151 % of the value


@pytest.mark.parametrize("factor", [1.35, 1 / 1.35])
@pytest.mark.parametrize(("spread", "within"), FOUND_WITHIN.items())
def test_a_shift_by_a_third_is_found_with_its_direction_size_and_date(spread: float, within: int, factor: float):
    rng, found, dates = random.Random(5), [], []
    for _history in range(100):
        shifts = [0.0] * 30 + [math.log(factor)] * within
        if alarm := calibration(history(rng, spread, shifts)).drift:
            found.append(alarm[0].ratio)
            dates.append(alarm[0].since)
    assert len(found) >= 90
    assert all((ratio > 1) == (factor > 1) for ratio in found)
    assert sorted(found)[len(found) // 2] == pytest.approx(factor, rel=0.1)
    assert sorted(dates)[len(dates) // 2] == "2026-11-02"  # 30 hours after FIRST


@pytest.mark.parametrize("spread", [0.05, 0.25, 1.0])
@pytest.mark.parametrize(("histories", "experiments", "runs", "shared"), [(520, 40, 1, 0.0), (150, 20, 8, 0.9)])
def test_without_a_shift_false_alarms_are_no_more_frequent_than_stated(
    spread: float, histories: int, experiments: int, runs: int, shared: float
):
    rng, alarms = random.Random(7), 0
    for _ in range(histories):
        records = history(rng, spread, [0.0] * experiments, runs, shared)
        alarms += any(drifts("time", records[: runs * seen]) for seen in range(1, experiments + 1))
    assert alarms <= histories * experiments / EXPERIMENTS_PER_FALSE_ALARM


def test_few_runs_raise_no_alarm_and_a_drift_that_was_mended_is_forgotten():
    beyond = [a_run(number, took=150) for number in range(5)]
    assert calibration(beyond[:3]).drift == []
    assert calibration(beyond).drift == [
        Drift(of="time", device="A100", recipe="lora", since="2026-11-01", ratio=1.5, experiments=5, runs=5)
    ]
    long = [a_run(number, took=150) for number in range(60)]
    assert calibration(long).drift and calibration([*long, *(a_run(n) for n in range(60, 75))]).drift == []


def test_a_shift_by_less_than_a_tenth_is_no_drift():
    assert calibration([a_run(number, took=109) for number in range(100)]).drift == []


def test_each_device_and_recipe_is_watched_alone_and_memory_too():
    shifted = [a_run(n, took=100, device="H100", memory=(10, 9, 11), peak=14) for n in range(8)]
    sound = [a_run(n + 50, took=100, memory=(10, 9, 11), peak=10) for n in range(50)]
    (alarm,) = calibration([*sound, *shifted]).drift
    assert (alarm.of, alarm.device, alarm.ratio) == ("memory", "H100", 1.4)
    assert alarm.words == (
        "runs of lora on H100 hold 1.40x the memory that was foretold since 2026-11-01 (8 experiments, 8 runs)"
    )


def test_a_limit_that_cuts_slow_runs_off_does_not_make_forecasts_seem_too_slow():
    rng = random.Random(3)
    took = [100 * math.exp(0.2 * rng.gauss(0, 1)) for _ in range(400)]
    told = 100.0, 72.0, 139.0
    runs = [
        a_run(n, told=told, took=min(t, 91), limit=91, state=State.TIMEOUT if t > 91 else State.COMPLETED)
        for n, t in enumerate(took)
    ]
    assert calibration(runs).time[0].n_undecided > 200
    assert calibration(runs).drift == []


def test_hours_asked_for_are_set_against_hours_used():
    runs = [
        a_run(0, took=3600, limit=7200),
        a_run(1, took=3600, limit=5400, resumed=True),
        a_run(2, took=3600, limit=3600, state=State.TIMEOUT),
        a_run(3, took=5, limit=36_000, state=State.FAILED),
        a_run(4, took=3600),
        a_run(5, took=1800, limit=36_000, experiment=None, run=None, predicted=None),
    ]
    ours, others = calibration(runs).hours
    assert (ours.whose, ours.n, ours.asked_h, ours.used_h, ours.median_ratio) == ("planned here", 3, 4.5, 3.0, 1.75)
    assert ours.n_timed_out == 1 and ours.timed_out.value == pytest.approx(1 / 3)
    assert (others.whose, others.n, others.median_ratio, others.n_timed_out) == ("other", 1, 20.0, 0)


def test_sacct_says_the_time_limit(tmp_path: Path):
    table = tmp_path / "sacct.txt"
    rows = ["1|COMPLETED|00:30:00|1-02:00:00", "2|COMPLETED|00:30:00|UNLIMITED", "3|TIMEOUT|01:00:00|Partition_Limit"]
    table.write_text("\n".join(["JobID|State|Elapsed|Timelimit", *rows, "1.batch|COMPLETED|00:30:00|", ""]))
    assert [record.usage.time_limit_s for record in parse_log(table).records] == [93_600, None, None]


def test_the_report_reads_as_tables(workspace: Path):
    runs = [a_run(n, took=150, limit=300, memory=(2**31, 2**30, 2**32), peak=2**31) for n in range(5)]
    Ledger().put(runs)
    found = calibration_report()
    assert found.summary == in_words(calibration(runs), 50)
    lines = found.summary.splitlines()
    assert "| – | all | 5 | 33.3 | 33.3 | 1.50 | 0.0 (0.0-52.2) of 5 | 45.0 | 0 |" in lines
    assert "| device | A100 | 5 | 0.0 | 0.0 | 1.00 | 100.0 (47.8-100.0) of 5 | 150.0 | 0 |" in lines
    assert (
        "Drift: runs of lora on A100 take 1.50x the time that was foretold since 2026-11-01 (5 experiments, 5 runs)."
        in lines
    )
    assert "| planned here | 5 | 0.42 | 0.21 | 2.00 | 0.0 (0.0-52.2) of 5 |" in lines
    cut = calibration_report(limit=2)
    assert "and 3 more" in cut.summary and len(cut.report.time) == 2


def test_without_a_prediction_the_report_says_how_to_get_one(workspace: Path):
    found = chiplog("backtest").stdout
    assert "No run that completed has a prediction yet. submit_experiment stores one" in found


def test_backtest_without_a_table_is_the_report_and_takes_no_option_of_a_table(workspace: Path):
    Ledger().put([a_run(n) for n in range(3)])
    printed = json.loads(chiplog("backtest", "--json").stdout)
    assert printed == json.loads(calibration_report().model_dump_json()) and printed["report"]["time"][0]["n"] == 3
    for option in (("--protocol", "cold"), ("--sweeps", "sweeps.json")):
        assert "are for a table" in chiplog("backtest", *option, code=2).stderr
    assert "calibration-report" not in chiplog("--help").stdout


def test_a_run_keeps_its_limit_and_prediction_and_shows_its_error(lab: Path):
    for name in ("first", "second"):
        plan(name, "--time-limit-s", "60")
        chiplog("setup-experiment-dirs", name)
        chiplog("submit-experiment", name, "--confirm")
        chiplog("experiment-status", name, "--wait-s", "60")

    async def steps(client: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        collected = await answer(client, "collect_records", experiment="second")
        shown = await answer(client, "show_run", key=collected["records"][0]["key"])
        return collected, shown, await answer(client, "calibration_report")

    collected, shown, report = calls(steps)
    first = Record.model_validate(collected["records"][0])
    assert first.predicted and first.time_outcome and first.mem_outcome and first.time_outcome.error is not None
    assert (first.predicted.mem_kind, first.predicted.mem_basis) == ("host_rss", "same-configuration")
    assert first.usage.time_limit_s == 60
    line = next(line for line in collected["summary"].splitlines() if line.startswith(f"{first.run}: predicted"))
    assert f", {round(100 * first.time_outcome.error):+} %" in line and "; memory predicted" in line and "+0 %" in line
    assert line.removeprefix(f"{first.run}: ") in shown["summary"]
    figures = {(one["by"], one["name"]): one["n"] for one in report["report"]["time"]}
    assert figures["all", "all"] == figures["device", "cpu"] >= 3  # of the first there may be predictions too
    assert report["report"]["hours"][0]["n"] == 6
