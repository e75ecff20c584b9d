"""How good the forecasts of our own runs were: error and coverage, drift, and hours asked for against hours used.

Pure functions of records. A run that its time limit or its memory ended is cut short: its figure is at least what it
had reached. Beyond the upper end of its interval that is a miss, below it is undecided and counts as neither.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from chiplog.compare import Interval, proportion
from chiplog.record import Outcome, Record, State
from chiplog.schema import Frozen
from chiplog.tables import cut_note, markdown, span
from chiplog.text import duration, percent, size

Quantity = Literal["time", "memory"]

# A group whose forecasts hold is alarmed falsely, on average, at most once in so many of its experiments.
EXPERIMENTS_PER_FALSE_ALARM = 1000
TOLERANCE = 1.1  # a shift of the middle by less is no drift
# What is watched in either direction: how often a run lies beyond, at most while forecasts hold and once they drifted.
BEYOND_THE_MIDDLE = 0.5, 0.85
BEYOND_THE_INTERVAL = 0.05, 0.4  # of 90 % intervals
ALARM = math.log(4 * EXPERIMENTS_PER_FALSE_ALARM)  # two tests in two directions
MOST = ALARM + math.log(20)  # so that an alarm ends some ten experiments after its drift


class Figures(Frozen):
    """How far the forecasts of some runs lay from what was measured."""

    by: Literal["all", "device", "recipe", "model", "basis"] = Field(description="What the runs have in common.")
    name: str = Field(description="The device, recipe, model or basis.")
    n: int = Field(ge=0, description="Runs that completed.")
    mape: float | None = Field(ge=0, description="Mean of |foretold / actual - 1| over them.")
    median_ape: float | None = Field(ge=0, description="Median of the same.")
    median_ratio: float | None = Field(ge=0, description="Median of actual / foretold.")
    held: Interval | None = Field(description="Share of 90 % intervals that held, with its exact 95 % interval.")
    n_decided: int = Field(ge=0, description="Runs that share is of: n, and those cut short beyond the upper end.")
    n_undecided: int = Field(ge=0, description="Runs cut short before they could leave their interval.")
    mean_width: float | None = Field(ge=0, description="Mean of (high - low) / foretold over all.")


class Drift(Frozen):
    """Forecasts of a device and recipe that do not hold any more."""

    of: Quantity = Field(description="What was foretold.")
    device: str = Field(description="cpu, or the GPU's name.")
    recipe: str = Field(description="Recipe; control for evaluations of a base model.")
    since: str = Field(description="Date at which the first run ended that it shows in.")
    ratio: float = Field(ge=0, description="Median of actual / foretold since then.")
    experiments: int = Field(ge=1, description="Experiments since then.")
    runs: int = Field(ge=1, description="Their runs.")

    @property
    def words(self) -> str:
        """The alarm in one line."""
        does = "take {:.2f}x the time" if self.of == "time" else "hold {:.2f}x the memory"
        return (
            f"runs of {self.recipe} on {self.device} {does.format(self.ratio)} that was foretold since {self.since} "
            f"({self.experiments} experiments, {self.runs} runs)"
        )


class Hours(Frozen):
    """Hours that jobs asked for and used, of those that completed or ran into their time limit."""

    whose: Literal["planned here", "other"] = Field(description="Whether chiplog submitted them.")
    n: int = Field(ge=1, description="Jobs whose limit is known.")
    asked_h: float = Field(ge=0, description="Sum of their limits in hours.")
    used_h: float = Field(ge=0, description="Sum of the hours they took.")
    median_ratio: float | None = Field(ge=0, description="Median of asked / used over those that completed.")
    n_timed_out: int = Field(ge=0, description="Jobs that ran into their limit.")
    timed_out: Interval = Field(description="Their share, with its exact 95 % interval.")


class Calibration(Frozen):
    """All of it."""

    time: list[Figures] = Field(description="Of the seconds of the jobs: all runs first. Parts of runs are left out.")
    memory: list[Figures] = Field(description="Of peak memory, where both figures count the same.")
    drift: list[Drift] = Field(description="Forecasts that do not hold any more.")
    hours: list[Hours] = Field(description="Hours asked for against hours used.")


class Told(NamedTuple):
    """A run with what came of one of its forecasts."""

    record: Record
    outcome: Outcome


def calibration(records: Sequence[Record]) -> Calibration:
    """What these records say of their forecasts and time limits."""
    return Calibration(
        time=_tabled(_told("time", records), lambda record: record.predicted and record.predicted.basis),
        memory=_tabled(_told("memory", records), lambda record: record.predicted and record.predicted.mem_basis),
        drift=[*drifts("time", records), *drifts("memory", records)],
        hours=_hours(records),
    )


def _told(of: Quantity, records: Sequence[Record]) -> list[Told]:
    """The runs that have both figures."""
    outcomes = [(record, record.time_outcome if of == "time" else record.mem_outcome) for record in records]
    return [Told(record, outcome) for record, outcome in outcomes if outcome]


def _tabled(told: Sequence[Told], basis: Callable[[Record], str | None]) -> list[Figures]:
    """The figures of all, then by device, recipe, model and basis, the largest groups first."""
    if not told:
        return []
    found = [_figures("all", "all", told)]
    by: dict[Literal["device", "recipe", "model", "basis"], Callable[[Record], str | None]] = {
        "device": lambda record: record.usage.device,
        "recipe": _recipe,
        "model": lambda record: Path(record.model).name if record.model else None,
        "basis": basis,
    }
    for heading, key in by.items():
        groups: dict[str, list[Told]] = defaultdict(list)
        for one in told:
            groups[key(one.record) or "not known"].append(one)
        found += [_figures(heading, name, groups[name]) for name in sorted(groups, key=lambda n: (-len(groups[n]), n))]
    return found


def _recipe(record: Record) -> str | None:
    return record.recipe or record.kind


def _figures(by: Literal["all", "device", "recipe", "model", "basis"], name: str, told: Sequence[Told]) -> Figures:
    outcomes = [one.outcome for one in told]
    errors = [abs(one.error) for one in outcomes if one.error is not None]
    ratios = [one.actual / one.value for one in outcomes if not one.cut_short]
    held = [one.held for one in outcomes if one.held is not None]
    return Figures(
        by=by,
        name=name,
        n=len(errors),
        mape=statistics.fmean(errors) if errors else None,
        median_ape=statistics.median(errors) if errors else None,
        median_ratio=statistics.median(ratios) if ratios else None,
        held=proportion(sum(held), len(held)) if held else None,
        n_decided=len(held),
        n_undecided=len(outcomes) - len(held),
        mean_width=statistics.fmean((one.high - one.low) / one.value for one in outcomes),
    )


def drifts(of: Quantity, records: Sequence[Record]) -> list[Drift]:
    """The groups of one device and recipe whose recent runs lie beyond what was foretold.

    A time limit below the upper end hides the runs that would leave their interval, so that the others would seem too
    fast: a run with such a limit says nothing here, however it ended.
    """
    groups: dict[tuple[str, str], list[Told]] = defaultdict(list)
    for one in _told(of, records):
        limit = one.record.usage.time_limit_s if of == "time" else None
        if one.outcome.held is not None and one.record.ended and not (limit and limit < one.outcome.high):
            groups[one.record.usage.device or "not known", _recipe(one.record) or "not known"].append(one)
    found = []
    for (device, recipe), members in sorted(groups.items()):
        if recent := _since_drift(members):
            runs = [one for experiment in recent for one in experiment]
            found.append(
                Drift(
                    of=of,
                    device=device,
                    recipe=recipe,
                    since=min(one.record.ended or "" for one in recent[0])[:10],
                    ratio=statistics.median(one.outcome.actual / one.outcome.value for one in runs),
                    experiments=len(recent),
                    runs=len(runs),
                )
            )
    return found


def _since_drift(told: Sequence[Told]) -> list[list[Told]]:
    """The last experiments, from the one on with which a drift began; none if there is no alarm.

    Forecasts of one experiment rest on the same past runs and err alike, so an experiment counts once: as beyond if
    more than half of its runs are. Where forecasts hold, at most half of all runs lie above the middle and one in
    twenty above the interval, and as many below.
    """
    by_name: dict[str | None, list[Told]] = defaultdict(list)
    for one in sorted(told, key=lambda one: one.record.ended or ""):
        by_name[one.record.experiment or one.record.key].append(one)
    experiments = list(by_name.values())
    watched: list[tuple[Callable[[Outcome], bool], tuple[float, float]]] = [
        (lambda one: one.actual > one.value * TOLERANCE, BEYOND_THE_MIDDLE),
        (lambda one: one.actual < one.value / TOLERANCE, BEYOND_THE_MIDDLE),
        (lambda one: one.actual > one.high, BEYOND_THE_INTERVAL),
        (lambda one: one.actual < one.low, BEYOND_THE_INTERVAL),
    ]
    starts = []
    for beyond, shares in watched:
        most = [sum(beyond(one.outcome) for one in runs) > len(runs) / 2 for runs in experiments]
        start = cusum(most, *shares)
        starts += [start] if start is not None else []
    return experiments[min(starts) :] if starts else []


def cusum(events: Sequence[bool], usual: float, shifted: float) -> int | None:
    """Where a run of events began that are more frequent than `usual`, if it lasts and is an alarm; else null.

    The Bernoulli CUSUM (Reynolds and Stoumbos 1999): the sum of the log-likelihood ratios of `shifted` against
    `usual`, restarted at 0. While the chance of each event, given those before, is at most `usual`, each ratio is 1 at
    most in the mean; so the mean time between false alarms is at least exp(ALARM) (Lorden 1971).
    """
    gain = {True: math.log(shifted / usual), False: math.log((1 - shifted) / (1 - usual))}
    height, start = 0.0, 0
    for place, event in enumerate(events):
        if height <= 0:
            height, start = 0.0, place
        height = min(height + gain[event], MOST)
    return start if height >= ALARM else None


def _hours(records: Sequence[Record]) -> list[Hours]:
    """Of jobs planned here and of others. What failed is left out: what it used says nothing of what it needed."""
    found = []
    for whose in ("planned here", "other"):
        jobs = [
            (record, record.usage.time_limit_s, record.usage.elapsed_s)
            for record in records
            if record.state in (State.COMPLETED, State.TIMEOUT) and bool(record.experiment) == (whose == "planned here")
        ]
        known = [(record, asked, used) for record, asked, used in jobs if asked and used]
        if not known:
            continue
        late = sum(record.state is State.TIMEOUT for record, _, _ in known)
        ratios = [asked / used for record, asked, used in known if record.state is State.COMPLETED]
        found.append(
            Hours(
                whose=whose,
                n=len(known),
                asked_h=sum(asked for _, asked, _ in known) / 3600,
                used_h=sum(used for _, _, used in known) / 3600,
                median_ratio=statistics.median(ratios) if ratios else None,
                n_timed_out=late,
                timed_out=proportion(late, len(known)),
            )
        )
    return found


def in_words(report: Calibration, limit: int) -> str:
    """The report as tables of `limit` rows at most."""
    lines: list[str | None] = []
    for heading, figures in (("Time", report.time), ("Memory", report.memory)):
        if figures:
            rows = [_cells(one) for one in figures[:limit]]
            lines += [f"{heading}:", "", markdown(HEADINGS, rows), cut_note(len(figures), limit), ""]
    if report.time or report.memory:
        if any(one.n_undecided for one in (*report.time, *report.memory)):
            lines.append("Undecided: cut short, by time limit or want of memory, before it could leave its interval.")
        lines += [f"Drift: {drift.words}." for drift in report.drift] or ["Drift: none shows."]
    else:
        lines.append(
            "No run that completed has a prediction yet. submit_experiment stores one with each run that the plan "
            "has an estimate for, and collect_records adds what the run took."
        )
    if report.hours:
        lines += ["", "Time limits:", "", markdown(HOURS, [_hours_cells(one) for one in report.hours])]
    return "\n".join(line for line in lines if line is not None)


def against_actual(record: Record) -> str:
    """`predicted 25 s (16-40), actual 30 s, -17 %`, and the same of the memory where the two can be compared."""
    told = record.predicted.elapsed_s if record.predicted else None
    took = duration(record.usage.elapsed_s) if record.state is State.COMPLETED else record.state
    words = f"predicted {span(told, duration)}, actual {took}{_off(record.time_outcome)}"
    if memory := record.mem_outcome:
        foretold = span((memory.value, memory.low, memory.high), size)
        words += f"; memory predicted {foretold}, actual {size(memory.actual)}{_off(memory)}"
    return words


def _off(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    error = "" if outcome.error is None else f", {round(100 * outcome.error):+} %"
    return error + (", not in its interval" if outcome.held is False else "")


HEADINGS = ["by", "of", "n", "MAPE, %", "median error, %", "actual / foretold", "90 % intervals that held, % (95 % CI)",
            "width, %", "undecided"]  # fmt: skip
HOURS = ["jobs", "n", "asked, h", "used, h", "asked / used, median", "timed out, % (95 % CI)"]


def _cells(one: Figures) -> list[str]:
    return [
        "–" if one.by == "all" else one.by,
        one.name,
        str(one.n),
        _percent(one.mape),
        _percent(one.median_ape),
        "–" if one.median_ratio is None else f"{one.median_ratio:.2f}",
        "–" if one.held is None else _share(one.held, one.n_decided),
        _percent(one.mean_width),
        str(one.n_undecided),
    ]


def _hours_cells(one: Hours) -> list[str]:
    ratio = "–" if one.median_ratio is None else f"{one.median_ratio:.2f}"
    return [one.whose, str(one.n), f"{one.asked_h:.2f}", f"{one.used_h:.2f}", ratio, _share(one.timed_out, one.n)]


def _percent(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _share(share: Interval, n: int) -> str:
    return f"{percent(share.value)} ({percent(share.low)}-{percent(share.high)}) of {n}"
