"""IsoFLOP curves: for some budgets the loss of each size, and the size whose loss is lowest.

Budgets are those that at least three sizes were trained with. Where fewer than three are, the loss of a size at a
budget is read between its runs of different lengths, on a line in log loss and log compute, never beyond them. Of each
budget a parabola in ln N: approach 2 of arXiv:2203.15556.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from tasks.scaling_laws.runs import Run

LEAST = 3  # sizes of a parabola
BUDGETS = 5
NEAR = 0.03  # share by which runs of one budget may lie apart, as steps are whole
RANGE = 2.0  # times the least budget that the largest must be, for those between to differ
LEVEL = 0.95


def isoflop(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each budget that LEAST sizes reach: the points (N, loss), whether they are runs or read between runs, the
    parabola, and the best N where it has one.
    """
    sizes = _curves(runs)
    shared = _shared(sorted(flops for curve in sizes.values() for flops, _ in curve))
    at, budgets = (_trained, shared) if len(shared) >= LEAST else (_between, _budgets(sizes))
    found = []
    for budget in budgets:
        points = [(n, at(curve, budget)) for n, curve in sorted(sizes.items())]
        points = [(n, loss) for n, loss in points if loss is not None]
        if len(points) >= LEAST:
            found.append({"flops": budget, "are_runs": at is _trained, "points": points, **_best(points)})
    return found


def growth(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The exponent of best N over compute; null from fewer than LEAST budgets with a best size.

    Budgets share runs, so the interval is of what the exponent is without each size in turn (jackknife); null where it
    is open without one of them.
    """
    exponent = _exponent(isoflop(runs))
    if exponent is None:
        return None
    sizes = {run.n for run in runs}
    without = [_exponent(isoflop([run for run in runs if run.n != n])) for n in sizes]
    known, n = [each for each in without if each is not None], len(sizes)
    if len(known) < n:
        return {"exponent": exponent, "ci": None}
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(known) * math.sqrt(n - 1))
    return {"exponent": exponent, "ci": [exponent - reach, exponent + reach]}


def _exponent(curves: Sequence[dict[str, Any]]) -> float | None:
    known = [(curve["flops"], curve["best_n"]) for curve in curves if curve["best_n"]]
    if len(known) < LEAST:
        return None
    x, y = np.log(np.array(known)).T
    return float(np.polyfit(x, y, 1)[0])


def _curves(runs: Sequence[Run]) -> dict[int, list[tuple[float, float]]]:
    """Of each size: (compute, mean loss over seeds), by compute."""
    losses: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        losses[run.n][run.flops].append(run.loss)
    return {n: sorted((c, sum(each) / len(each)) for c, each in of.items()) for n, of in losses.items()}


def _shared(flops: list[float]) -> list[float]:
    """Budgets of runs: the middles of groups of at least LEAST that lie within NEAR of the one before."""
    ends = [place for place in range(1, len(flops)) if flops[place] > flops[place - 1] * (1 + NEAR)]
    groups = [flops[first:last] for first, last in itertools.pairwise([0, *ends, len(flops)])]
    return [math.exp(sum(map(math.log, group)) / len(group)) for group in groups if len(group) >= LEAST]


def _trained(curve: list[tuple[float, float]], budget: float) -> float | None:
    """The loss of a size's run with this budget."""
    near = [(abs(math.log(flops / budget)), loss) for flops, loss in curve]
    apart, loss = min(near)
    return loss if apart <= NEAR else None


def _budgets(sizes: dict[int, list[tuple[float, float]]]) -> list[float]:
    """Budgets between runs, evenly spaced in the logarithm.

    From what the third smallest size begins with to what the third largest reaches, where that is a range.
    """
    curves = [curve for curve in sizes.values() if len(curve) > 1]
    if len(curves) < LEAST:
        return []
    low = sorted(curve[0][0] for curve in curves)[LEAST - 1]
    high = sorted(curve[-1][0] for curve in curves)[-LEAST]
    return np.geomspace(low, high, BUDGETS).tolist() if high > RANGE * low else []


def _between(curve: list[tuple[float, float]], budget: float) -> float | None:
    x, y = np.log(np.array(curve)).T
    at = math.log(budget)
    if not x[0] - 1e-9 <= at <= x[-1] + 1e-9:
        return None
    return float(np.exp(np.interp(at, x, y)))


def _best(points: list[tuple[int, float]]) -> dict[str, Any]:
    """The parabola in ln N; a best N only where it opens upward with its vertex between the sizes."""
    x, y = np.log([n for n, _ in points]), np.array([loss for _, loss in points])
    middle = x.mean()
    a, b, c = np.polyfit(x - middle, y, 2)
    vertex = middle - b / (2 * a) if a > 0 else math.nan
    inside = x.min() < vertex < x.max()
    parabola = (float(a), float(b - 2 * a * middle), float(c - b * middle + a * middle**2))
    return {"parabola": parabola, "best_n": float(np.exp(vertex)) if inside else None}
