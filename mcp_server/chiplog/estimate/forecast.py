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
from collections.abc import Callable, Hashable, Iterable
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from chiplog.estimate import memory, speed
from chiplog.estimate.effects import Array, Effects, Observation, Sizes
from chiplog.estimate.job import Job, Measured, style

FIT = Path(__file__).parent / "data" / "fit.json"
Quantity = Literal["memory", "pass"]
Groups = tuple[tuple[float, ...], ...]
COVERAGE = 0.90
ROUNDS = 3  # of finding where to linearise
USELESS = 1e3  # standard deviation of an observation that tells nothing
LEAST_SPREAD = 0.05  # of an interval's scale: what the same run differs by when it is run again
NEAR = 0.5  # share of the variance in common with a run on record from which evidence is near


class Forecast(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float
    spread: float  # standard deviation of its logarithm
    near: bool  # whether runs much like it are on record
    evidence: tuple[str, ...]  # the sources it rests on, the nearest first

    @property
    def scale(self) -> float:
        """What scores are counted in: the standard deviation, and what the same run differs by."""
        return math.hypot(self.spread, LEAST_SPREAD)


class Fit(NamedTuple):
    """What was fitted on public measurements (benchmarks/fit_estimator.py)."""

    sizes: Sizes
    noise: float
    rough: float
    scores: dict[str, dict[str, list[float]]]  # of left-out runs, (log measured - forecast) / spread, near and far
    unsure: float = 0.0  # of a run of which something that decides much was not stated
    together: float = 0.0  # weight of both tails of scores taken together in each end of an interval

    def unexplained(self, job: Job, rough: bool = False) -> float:
        """Standard deviation of what no level explains of a job."""
        return math.hypot(self.noise, self.rough if rough else 0.0, self.unsure if job.unsure else 0.0)


@cache
def fitted(quantity: Quantity) -> Fit:
    """The fit that is shipped."""
    values = json.loads(FIT.read_text(encoding="utf-8"))[quantity]
    sizes = Sizes(tuple(map(tuple, values["parts"])), tuple(values["whole"]))
    return Fit(sizes, values["noise"], values["rough"], values["scores"], values["unsure"], values["together"])


LEVELS: dict[Quantity, tuple[str, ...]] = {
    "memory": ("style", "framework", "method", "family", "model", "recipe", "place", "place_method", "data"),
    "pass": (
        "framework",
        "method",
        "gpu",
        "family",
        "model",
        "recipe",
        "place",
        "place_method",
        "sharding",
        "dtype",
        "group",
    ),
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
        "group": (place, job.group) if job.group else None,
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
    quantity: Quantity, run: Measured, fit: Fit | None = None, about: Effects | None = None, new: bool = False
) -> Observation | None:
    """A run beside its physics, to first order about what is known; None where it has no such figure.

    Without `about`, that is the bare physics. Where `about` does not hold the run (it is `new`), it is what will be
    known with it.
    """
    measured = run.peak_bytes if quantity == "memory" else run.pass_s
    if not measured:
        return None
    fit = fit or fitted(quantity)
    noise = math.hypot(fit.unexplained(run.job, run.rough), run.pass_spread if quantity == "pass" else 0.0)
    place = keys(quantity, run.job, run.place)
    if about is None:
        value, shares = computed(quantity, run.job)
        return Observation(place, shares, math.log(measured / value), noise, run.source)
    shift = about.shift(place)
    before, mean, residual, shares = shift.mean, shift.mean, 0.0, ()
    for _ in range(ROUNDS if new else 1):  # as an iterated Kalman filter does (Bell and Cathey 1993)
        value, shares = _linear(quantity, run.job, mean)
        residual, weights = math.log(measured / value), np.array([*shares, 1.0])
        gain = shift.covariance @ weights / (weights @ shift.covariance @ weights + noise**2)
        mean = before + gain * (residual - float(weights @ before))
    return Observation(place, shares, residual, noise, run.source)


def effects(quantity: Quantity, runs: Iterable[Measured]) -> Effects:
    """What these runs show. One that ran out of memory says that it needed more than there was."""
    runs, sizes = list(runs), fitted(quantity).sizes
    plain = Effects([one for run in runs if (one := observe(quantity, run))], sizes)
    settled = [one for run in runs if (one := observe(quantity, run, about=plain))]
    # Runs that ran out of memory are outliers by nature, and weighed as such.
    beyond = [_beyond(run, plain) for run in runs if quantity == "memory" and run.above_bytes]
    return Effects([*settled, *beyond], sizes, settled=len(settled))


def learnt(quantity: Quantity, known: Effects, run: Measured) -> Effects:
    """What is known with one more run."""
    if not tells(quantity, run):
        return known
    return known.and_then([observe(quantity, run, about=known, new=True) or _beyond(run, known)])


def tells(quantity: Quantity, run: Measured) -> bool:
    """Whether a run says something of the quantity."""
    return bool(run.pass_s if quantity == "pass" else run.peak_bytes or run.above_bytes)


def _beyond(run: Measured, known: Effects) -> Observation:
    """What a run that ran out of memory tells, as an observation: where it, with what is known, would have ended.

    The mean and variance above the limit are those of a normal distribution cut off below (Johnson, Kotz and
    Balakrishnan, Continuous Univariate Distributions, 13.10.1); the observation that leads to them is returned.
    """
    fit, place = fitted("memory"), keys("memory", run.job, run.place)
    shift = known.shift(place)
    value, shares = _linear("memory", run.job, shift.mean)
    mean, spread = float(shift.mean @ [*shares, 1.0]), shift.spread(shares, fit.unexplained(run.job))
    limit = (math.log((run.above_bytes or value) / value) - mean) / spread
    hazard = _hazard(limit)
    ratio = 1 - hazard * (hazard - limit)  # of the variance that is left
    if ratio > 1 - 1e-6:  # it was expected
        return Observation(place, shares, mean, USELESS, run.source)
    variance = spread**2 * ratio / (1 - ratio)
    moved = mean + spread * hazard
    site = moved + (moved - mean) * ratio / (1 - ratio)
    return Observation(place, shares, site, math.sqrt(max(variance, fit.noise**2)), run.source)


def _hazard(z: float) -> float:
    """Density over upper tail of the standard normal; near its asymptote far out."""
    if z > 30:
        return z + 1 / z
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (0.5 * math.erfc(z / math.sqrt(2)))


def forecast(
    quantity: Quantity, job: Job, place: str, known: Effects, *, coverage: float = COVERAGE, leave_out: str = ""
) -> Forecast:
    """What a job will need. `leave_out` is a place whose own left-out forecasts must not widen or narrow this one."""
    shift = known.shift(keys(quantity, job, place))
    value, shares = shifted(quantity, job, shift.mean)
    fit = fitted(quantity)
    spread = shift.spread(shares, fit.unexplained(job))
    near = bool(len(shift.related)) and float(shift.related.max()) >= NEAR
    order = np.argsort(-shift.related, kind="stable")[:8] if len(shift.related) else []
    sources = tuple(known.observations[i].source for i in order if shift.related[i] > 0)
    told = Forecast(value, value, value, spread, near, sources)
    low, high = (value * math.exp(score * told.scale) for score in scores(fit, near, coverage, leave_out))
    return told._replace(low=low, high=high)


def shifted(quantity: Quantity, job: Job, mean: Array) -> tuple[float, tuple[float, ...]]:
    """What the physics says with each part, and the whole, larger by its factor; and the share of each part.

    Of the peak, it is that of the moment when most is then held: it never falls where a part grows.
    """
    *factors, whole = (float(factor) for factor in np.exp(mean))
    if quantity == "pass":
        passing = speed.one_pass(job).times(factors)
        return passing.total * whole, passing.shares()
    moments = memory.moments(job).values()
    held = max((tuple(p * f for p, f in zip(parts, factors, strict=True)) for parts in moments), key=sum)
    return sum(held) * whole, tuple(part / sum(held) for part in held)


def _linear(quantity: Quantity, job: Job, mean: Array) -> tuple[float, tuple[float, ...]]:
    """The value of which, to first order, `shifted` is the product with the factors to the power of the shares."""
    value, shares = shifted(quantity, job, mean)
    return value / math.exp(float(mean @ [*shares, 1.0])), shares


def scores(fit: Fit, near: bool, coverage: float, leave_out: str = "") -> tuple[float, float]:
    """Between which two scores that share of left-out runs lay, each group of them counting alike.

    Where errors are about as large either way, each end rests on both tails in part, since few tables make a tail.
    """
    tables = fit.scores["near" if near else "far"].items()
    groups = tuple(tuple(group) for place, group in tables if place != leave_out and group)
    low, high = _quantile(groups, (1 - coverage) / 2), _quantile(groups, (1 + coverage) / 2)
    either, own = _quantile(groups, coverage, abs), 1 - fit.together
    return own * low - fit.together * either, own * high + fit.together * either


def _quantile(groups: Groups, share: float, of: Callable[[float], float] = float) -> float:
    """The quantile of scores of which those of each group weigh as the root of their number together."""
    values, weights = _ranked(groups, of)
    return values[min(bisect_left(weights, share * weights[-1]), len(values) - 1)]


@lru_cache(maxsize=256)
def _ranked(groups: Groups, of: Callable[[float], float]) -> tuple[list[float], list[float]]:
    """All scores in order, and the weight of each and those before it together."""
    weighted = sorted((of(score), 1 / math.sqrt(len(group))) for group in groups for score in group)
    return [score for score, _ in weighted], list(accumulate(weight for _, weight in weighted))
