"""A job's memory and the time of its passes: the physics, shifted by what past runs say of it, with an interval.

An interval's ends are the shift's standard deviation, times quantiles of what this made of runs that were left out: the
errors that it then made, in such deviations, apart for runs of which evidence was near and those of which it was far.
As in conformal prediction (Vovk et al. 2005) no shape of errors is assumed; that it holds for a new table is measured
(backtest.py) and no theorem, since runs of one table are alike.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from chiplog.estimate import memory, speed
from chiplog.estimate.effects import Effects, Observation, Shift, Sizes
from chiplog.estimate.job import Job, style

FIT = Path(__file__).parent / "data" / "fit.json"
Quantity = Literal["memory", "pass"]
COVERAGE = 0.90
USELESS = 1e3  # standard deviation of an observation that tells nothing
NEAR = 0.5  # share of the variance in common with a run on record from which evidence is near


class Measured(NamedTuple):
    """A run that was measured."""

    job: Job
    place: str  # the table, or the cluster
    source: str  # where it stands
    peak_bytes: float | None = None
    pass_s: float | None = None  # seconds of one forward and backward pass
    above_bytes: float | None = None  # what the card has, where it ran out of memory
    rough: bool = False  # whether the figure was rounded or remembered


class Forecast(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float
    spread: float  # standard deviation of its logarithm
    near: bool  # whether runs much like it are on record
    evidence: tuple[str, ...]  # the sources it rests on, the nearest first


class Fit(NamedTuple):
    """What was fitted on public measurements (benchmarks/fit_estimator.py)."""

    sizes: Sizes
    noise: float
    rough: float
    scores: dict[str, dict[str, list[float]]]  # of left-out runs, (log measured - forecast) / spread, near and far
    unsure: float = 0.0  # of a run of which something that decides much was not stated

    def unexplained(self, job: Job, rough: bool = False) -> float:
        """Standard deviation of what no level explains of a job."""
        return math.hypot(self.noise, self.rough if rough else 0.0, self.unsure if job.unsure else 0.0)


@cache
def fitted(quantity: Quantity) -> Fit:
    """The fit that is shipped."""
    values = json.loads(FIT.read_text(encoding="utf-8"))[quantity]
    sizes = Sizes(tuple(map(tuple, values["parts"])), tuple(values["whole"]))
    return Fit(sizes, values["noise"], values["rough"], values["scores"], values["unsure"])


LEVELS: dict[Quantity, tuple[str, ...]] = {
    "memory": ("style", "framework", "method", "family", "model", "recipe", "place", "place_method", "data"),
    "pass": ("framework", "method", "gpu", "family", "model", "recipe", "place", "place_method", "sharding", "dtype"),
}
PARTS: dict[Quantity, tuple[str, ...]] = {"memory": memory.PARTS, "pass": speed.PARTS}


def keys(quantity: Quantity, job: Job, place: str) -> tuple[Hashable, ...]:
    """What a job has in common with others, a key a level; no key holds its batch, length or rank."""
    framework = (job.framework, job.gpus > 1) if quantity == "memory" else job.framework
    every: dict[str, Hashable] = {
        "style": style(job.framework), "framework": framework, "method": (framework, job.method),
        "family": (framework, job.shape.family), "model": (framework, job.model, job.method), "recipe": job.recipe,
        "place": place, "place_method": (place, job.method, job.gpus > 1), "gpu": job.gpu,
        "dtype": (framework, job.dtype),
        "data": None if job.packed else (place, job.data, job.gpu),
        "sharding": (framework, job.sharding) if job.gpus > 1 else None,
    }  # fmt: skip
    return tuple(every[level] for level in LEVELS[quantity])


def computed(quantity: Quantity, job: Job) -> tuple[float, tuple[float, ...]]:
    """What the physics says, and the share of each part."""
    if quantity == "memory":
        held = memory.peak(job)
        return held.total, tuple(part / held.total for part in held)
    passing = speed.one_pass(job)
    return passing.total, passing.shares()


def observe(
    quantity: Quantity, run: Measured, fit: Fit | None = None, about: Effects | None = None
) -> Observation | None:
    """A run beside its physics, to first order about what is known (else about the bare physics); None where it has
    no such figure."""
    measured = run.peak_bytes if quantity == "memory" else run.pass_s
    if not measured:
        return None
    fit = fit or fitted(quantity)
    value, shares = computed(quantity, run.job)
    if about and quantity == "memory":
        shift = about.shift(keys(quantity, run.job, run.place))
        parts = shifted_peak(run.job, shift)
        shares = tuple(float(part) / sum(parts) for part in parts)
        value = sum(parts) / math.exp(float(shift.mean[:-1] @ shares))
    noise = fit.unexplained(run.job, run.rough)
    return Observation(keys(quantity, run.job, run.place), shares, math.log(measured / value), noise, run.source)


def effects(quantity: Quantity, runs: Iterable[Measured], then: Iterable[Measured] = ()) -> Effects:
    """What these runs show; `then` those that follow one another, each to be foretold from what came before it.

    A run that ran out of memory says that it needed more than there was. Of `then`, each run that `tells` of the
    quantity is one observation.
    """
    runs, sizes = list(runs), fitted(quantity).sizes
    before = [one for run in runs if (one := observe(quantity, run))]
    plain, beyond = Effects(before, sizes), []
    if quantity == "memory":
        before = [one for run in runs if (one := observe(quantity, run, about=plain))]
        beyond = [_beyond(run, plain) for run in runs if run.above_bytes]  # outliers by nature, and weighed as such
    after = [observe(quantity, run, about=plain) or _beyond(run, plain) for run in then if tells(quantity, run)]
    return Effects([*before, *beyond, *after], sizes, settled=len(before))


def tells(quantity: Quantity, run: Measured) -> bool:
    """Whether a run says something of the quantity."""
    return bool(run.pass_s if quantity == "pass" else run.peak_bytes or run.above_bytes)


def _beyond(run: Measured, known: Effects) -> Observation:
    """What a run that ran out of memory tells, as an observation: where it, with what is known, would have ended.

    The mean and variance above the limit are those of a normal distribution cut off below (Johnson, Kotz and
    Balakrishnan, Continuous Univariate Distributions, 13.10.1); the observation that leads to them is returned.
    """
    fit, (value, shares) = fitted("memory"), computed("memory", run.job)
    shift = known.shift(keys("memory", run.job, run.place))
    mean, spread = float(shift.mean @ [*shares, 1.0]), shift.spread(shares, fit.unexplained(run.job))
    limit = (math.log((run.above_bytes or value) / value) - mean) / spread
    hazard = _hazard(limit)
    ratio = 1 - hazard * (hazard - limit)  # of the variance that is left
    place = Observation(keys("memory", run.job, run.place), shares, mean, USELESS, run.source)
    if ratio > 1 - 1e-6:
        return place  # it was expected
    variance = spread**2 * ratio / (1 - ratio)
    moved = mean + spread * hazard
    site = moved + (moved - mean) * ratio / (1 - ratio)
    return Observation(place.keys, shares, site, math.sqrt(max(variance, fit.noise**2)), run.source)


def _hazard(z: float) -> float:
    """Density over upper tail of the standard normal; near its asymptote far out."""
    if z > 30:
        return z + 1 / z
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (0.5 * math.erfc(z / math.sqrt(2)))


def forecast(
    quantity: Quantity, job: Job, place: str, known: Effects, *,
    first: int | None = None, coverage: float = COVERAGE, leave_out: str = "",
) -> Forecast:  # fmt: skip
    """What a job will need, from the `first` of the observations.

    `leave_out` is a place whose own left-out forecasts must not widen or narrow this one.
    """
    shift = known.shift(keys(quantity, job, place), first)
    if quantity == "memory":
        parts = shifted_peak(job, shift)
        value, shares = sum(parts) * math.exp(float(shift.mean[-1])), [part / sum(parts) for part in parts]
    else:
        value, shares = computed(quantity, job)
        value *= math.exp(float(shift.mean @ [*shares, 1.0]))
    fit = fitted(quantity)
    spread = shift.spread(shares, fit.unexplained(job))
    near = bool(len(shift.related)) and float(shift.related.max()) >= NEAR
    low, high = (value * math.exp(score * spread) for score in scores(fit, near, coverage, leave_out))
    order = np.argsort(-shift.related, kind="stable")[:8] if len(shift.related) else []
    sources = tuple(known.observations[i].source for i in order if shift.related[i] > 0)
    return Forecast(value, low, high, spread, near, sources)


def shifted_peak(job: Job, shift: Shift) -> tuple[float, ...]:
    """The parts of the peak, each larger by its factor: their sum never falls where a part grows."""
    factors = [float(factor) for factor in np.exp(shift.mean[:-1])]
    moments = memory.moments(job).values()
    return max((tuple(p * f for p, f in zip(parts, factors, strict=True)) for parts in moments), key=sum)


def scores(fit: Fit, near: bool, coverage: float, leave_out: str = "") -> tuple[float, float]:
    """Between which two scores that share of left-out runs lay, each group of them counting alike."""
    groups = [group for place, group in fit.scores["near" if near else "far"].items() if place != leave_out and group]
    return _quantile(groups, (1 - coverage) / 2), _quantile(groups, (1 + coverage) / 2)


def _quantile(groups: Sequence[Sequence[float]], share: float) -> float:
    """The quantile of scores of which those of each group weigh as the root of their number together."""
    weighted = sorted((score, 1 / math.sqrt(len(group))) for group in groups for score in group)
    total = list(np.cumsum([weight for _, weight in weighted]))
    return weighted[min(bisect_left(total, share * total[-1]), len(weighted) - 1)][0]
