"""The loss of one arm as a power of its compute, L = E + A C^-alpha, and how much compute another arm saves.

The exponent depends on E, which few runs can tell: both are always given together, with the window of compute and the
exponents that other floors would give.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.scaling_laws.runs import Run

Array = NDArray[np.float64]
FLOORS = np.concatenate([[0.0], 1 - np.geomspace(1, 0.005, 80)[1:]])  # of E, as shares of the lowest loss
LEVEL = 0.95
LEAST = 4  # runs of a power law: one more than parameters


@dataclass(frozen=True)
class Power:
    """L = E + A C^-alpha with C in FLOPs, and the window of compute that it was fitted in."""

    e: float
    a: float
    alpha: float
    window: tuple[float, float]
    n: int

    def loss(self, flops: Array) -> Array:
        """Nats a token."""
        return self.e + self.a * flops**-self.alpha

    def compute(self, loss: Array) -> Array:
        """FLOPs that bring the loss down to `loss`; infinite at E and below."""
        above = np.maximum(loss - self.e, 0.0)
        with np.errstate(divide="ignore"):
            return (above / self.a) ** (-1 / self.alpha)


def frontier(runs: Sequence[Run]) -> list[Run]:
    """The runs than which none has a lower loss for as little compute, by compute; of several seeds their mean."""
    seeds: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in runs:
        seeds[run.n, run.d].append(run)
    means = [replace(same[0], loss=sum(run.loss for run in same) / len(same)) for same in seeds.values()]
    best: list[Run] = []
    for run in sorted(means, key=lambda run: (run.flops, run.loss)):
        if not best or run.loss < best[-1].loss:
            best.append(run)
    return best


def fit_power(flops: Array, loss: Array, weights: Array | None = None, e: float | None = None) -> Power:
    """Least squares of log losses: a straight line for each floor, or for the given one, then the best floor."""
    weights = np.ones(len(loss)) if weights is None else weights
    floors = FLOORS * loss[weights > 0].min() if e is None else np.array([e])
    fits = [_line(np.log(flops), loss, floor, weights) for floor in floors]
    best = int(np.argmin([fit[2] for fit in fits]))
    used = flops[weights > 0]
    return Power(float(floors[best]), fits[best][0], fits[best][1], (used.min(), used.max()), len(used))


def power_law(
    runs: Sequence[Run], e: float | None, e_ci: Sequence[float], draws: int, seed: int
) -> dict[str, Any] | None:
    """The law of an arm's frontier; with E from the joint law where that is known. Null for too few runs.

    The interval of alpha holds those that the ends of E's own interval `e_ci` give.
    """
    points = frontier(runs)
    if len(points) < LEAST:
        return None
    flops, loss = _points(points)
    found = fit_power(flops, loss, e=e)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(points), np.full(len(points), 1 / len(points)), draws)
    rows = [row.astype(float) for row in counts if (row > 0).sum() >= LEAST - 1]
    lowest = float(loss.min())
    intervals = [interval(np.array([fit_power(flops, loss, row, floor).alpha for row in rows]))
                 for floor in (e, *(min(end, 0.999 * lowest) for end in e_ci)) if rows]  # fmt: skip
    others = {share: fit_power(flops, loss, e=share * float(loss.min())).alpha for share in (0.0, 0.5, 0.9)}
    return {
        "E": found.e,
        "E_from": "its own points" if e is None else "the joint law",
        "E_known": e is not None,
        "A": found.a,
        "alpha": found.alpha,
        "alpha_ci": [min(low for low, _ in intervals), max(high for _, high in intervals)] if rows else None,
        "alpha_by_E": {f"{share * float(loss.min()):.3g}": alpha for share, alpha in others.items()},
        "window": list(found.window),
        "n": found.n,
    }


def multiplier(
    control: Sequence[Run], arm: Sequence[Run], e: float | None, draws: int, seed: int
) -> dict[str, Any] | str:
    """How many times the arm's compute the control needs for the same loss: geometric mean over the arm's runs.

    The interval draws the runs of both. Only runs whose loss the control's frontier reaches count; in words why there
    is no multiplier.
    """
    points = frontier(control)
    if len(points) < LEAST:
        return f"the control has {len(points)} runs on its frontier, and a power law needs {LEAST}"
    low, high = points[-1].loss, points[0].loss
    inside = [run for run in frontier(arm) if low <= run.loss <= high]
    outside = len(frontier(arm)) - len(inside)
    if not inside:
        return f"no run of it has a loss between {low:.3g} and {high:.3g}, which is what the control reaches"
    flops, loss = _points(points)
    arm_flops, arm_loss = _points(inside)
    logs = _log_ratios(fit_power(flops, loss, e=e), arm_flops, arm_loss)
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(draws):
        counts = rng.multinomial(len(points), np.full(len(points), 1 / len(points))).astype(float)
        if (counts > 0).sum() < LEAST - 1:
            continue
        picked = rng.integers(len(inside), size=len(inside))
        drawn.append(_log_ratios(fit_power(flops, loss, counts, e), arm_flops[picked], arm_loss[picked]).mean())
    kept = np.array([each for each in drawn if np.isfinite(each)])
    return {
        "multiplier": float(np.exp(logs.mean())),
        "ci": np.exp(interval(kept)).tolist() if len(kept) and len(inside) > 1 else None,
        "n": len(inside),
        "n_outside": outside,
        "window": [low, high],
    }


def interval(values: Array) -> list[float]:
    """The middle LEVEL of some values."""
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def _log_ratios(control: Power, flops: Array, loss: Array) -> Array:
    return np.log(control.compute(loss)) - np.log(flops)


def _points(runs: Sequence[Run]) -> tuple[Array, Array]:
    return np.array([run.flops for run in runs], dtype=float), np.array([run.loss for run in runs], dtype=float)


def _line(x: Array, loss: Array, floor: float, weights: Array) -> tuple[float, float, float]:
    """A, alpha and the squares of log losses for one floor; the line's weights make its own squares nearly those."""
    y = np.log(np.maximum(loss - floor, 1e-300))
    w = weights * ((loss - floor) / loss) ** 2
    mean_x, mean_y = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    spread = (w * (x - mean_x) ** 2).sum()
    slope = (w * (x - mean_x) * (y - mean_y)).sum() / spread if spread > 0 else 0.0
    a, alpha = float(np.exp(mean_y - slope * mean_x)), float(-slope)
    with np.errstate(all="ignore"):
        residual = np.log(floor + a * np.exp(-alpha * x)) - np.log(loss)
    squares = float((weights * residual**2).sum())
    return a, max(alpha, 1e-6), squares if np.isfinite(squares) else np.inf
