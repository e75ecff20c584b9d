"""The best learning rate of each width, and how it moves as models grow.

Of each width a parabola of the loss in ln lr, on the finite points with a loss of at most the lowest + 1. Its vertex
counts if it is of four rates or more, the parabola opens upward, the vertex lies between those points and inside the
swept range by 0.1 decade, and R^2 is at least 0.9; else the best learning rate that was tried. Then straight lines in
logarithms, on width and on parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

NEAR = 1.0  # nats above the lowest loss beyond which points say nothing of the vertex
MARGIN = 0.1  # decades by which the vertex must lie inside the swept range
STRAIGHT = 0.9  # least R^2
LEAST = 4  # learning rates of a parabola: it passes through any three
LEVEL = 0.95
STEADY = 0.5  # octaves by which the best learning rate of a good parametrisation may move
OVER = 4.0  # over so many times the width


@dataclass(frozen=True)
class Best:
    """The best learning rate of a width, and how it was found."""

    lr: float
    how: str  # "vertex" or "grid minimum"
    why: str  # of a grid minimum: why no vertex
    at_edge: bool  # a grid minimum at an end of the swept range: the best may lie beyond
    parabola: tuple[float, float, float] | None  # of ln lr, highest power first
    r2: float | None
    window: tuple[float, float]  # learning rates that the parabola was fitted to
    n: int  # points of it
    n_diverged: int
    doubt_octaves: float  # of a grid minimum: how far the best may lie from it between those that were tried


def best_lr(lrs: ArrayLike, losses: ArrayLike) -> Best | None:
    """Of the points (lr, loss) of one width; a loss that is no number diverged. Null where none is finite."""
    x, y = np.log(np.asarray(lrs, dtype=float)), np.asarray(losses, dtype=float)
    finite = np.isfinite(y)
    if not finite.any():
        return None
    near = finite & (y <= y[finite].min() + NEAR)
    means = {lr: y[finite & (x == lr)].mean() for lr in np.unique(x[finite])}
    grid = float(min(means, key=lambda lr: means[lr]))
    parabola, r2, why, vertex = None, None, f"fewer than {LEAST} learning rates are near the lowest loss", 0.0
    if len(np.unique(x[near])) >= LEAST:
        parabola, r2 = _parabola(x[near], y[near])
        vertex = -parabola[1] / (2 * parabola[0]) if parabola[0] > 0 else math.nan
        why = _why_not(parabola[0], r2, vertex, x, x[near])
    lr = grid if why else vertex
    at_edge = bool(why) and grid in (x.min(), x.max())
    how = "grid minimum" if why else "vertex"
    doubt = _half_step(np.unique(x), grid) if why else 0.0
    window = math.exp(x[near].min()), math.exp(x[near].max())
    return Best(math.exp(lr), how, why, at_edge, parabola, r2, window, int(near.sum()), int((~finite).sum()), doubt)


def lr_law(sizes: Sequence[float], best: Sequence[float]) -> dict[str, Any]:
    """The exponent of best lr over size, with its interval from three sizes on."""
    if len(sizes) < 2:
        return {"exponent": None, "ci": None, "constant": None, "n": len(sizes)}
    x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(best, dtype=float))
    slope, constant = (float(each) for each in np.polyfit(x, y, 1))
    ci = None
    if len(sizes) > 2:
        squares = float(((y - constant - slope * x) ** 2).sum()) / (len(x) - 2)
        error = math.sqrt(squares / float(((x - x.mean()) ** 2).sum()))
        reach = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 2)) * error
        ci = [slope - reach, slope + reach]
    return {"exponent": slope, "ci": ci, "constant": math.exp(constant), "n": len(sizes)}


def sweep_law(widths: Mapping[int, Best], params: Mapping[int, int]) -> dict[str, Any]:
    """Of one arm: the best of each width, and its law in width and in parameters."""
    best = [one.lr for one in widths.values()]
    return {
        "widths": {width: asdict(one) for width, one in widths.items()},
        "in_width": lr_law(list(widths), best),
        "in_params": lr_law([params[width] for width in widths], best),
    }


def ends(widths: Mapping[int, Best]) -> dict[str, Any]:
    """From the least width to the largest: octaves that the best moves, those it is unsure by, and edges it lies at."""
    least, largest = min(widths, default=0), max(widths, default=0)
    if least == largest:
        return {"octaves": None, "doubt": 0.0, "at_edge": []}
    edges = [width for width, one in widths.items() if one.at_edge]
    return {**_moved(widths, least, largest), "at_edge": edges}


def farthest(widths: Mapping[int, Best]) -> dict[str, Any] | None:
    """Of all pairs of widths the one whose best learning rates lie farthest apart for what is allowed; null of one."""
    pairs = [_moved(widths, *pair) for pair in itertools.combinations(sorted(widths), 2)]
    return max(pairs, key=lambda one: abs(one["octaves"]) + one["doubt"] - one["allowed"], default=None)


def allowed(growth: float) -> float:
    """Octaves by which the best learning rate of a good parametrisation may move over `growth` times the width."""
    return STEADY * max(1.0, math.log(growth, OVER))


def _moved(widths: Mapping[int, Best], low: int, high: int) -> dict[str, Any]:
    one, other = widths[low], widths[high]
    octaves, doubt = math.log2(other.lr / one.lr), one.doubt_octaves + other.doubt_octaves
    return {"from": low, "to": high, "octaves": octaves, "doubt": doubt, "allowed": allowed(high / low)}


def _half_step(tried: np.ndarray, at: float) -> float:
    """Half the wider step from a learning rate to the next that were tried, in octaves."""
    place = int(np.argmin(np.abs(tried - at)))
    steps = np.diff(tried[max(place - 1, 0) : place + 2])
    return float(steps.max(initial=0.0)) / 2 / math.log(2)


def _parabola(x: np.ndarray, y: np.ndarray) -> tuple[tuple[float, float, float], float]:
    """Coefficients, highest power first, and R^2, which is 0 where all losses are equal."""
    middle = x.mean()  # else x^2 and x are nearly one line
    a, b, c = np.polyfit(x - middle, y, 2)
    spread = ((y - y.mean()) ** 2).sum()
    left = ((y - np.polyval((a, b, c), x - middle)) ** 2).sum()
    r2 = 1 - float(left / spread) if spread > 0 else 0.0
    return (float(a), float(b - 2 * a * middle), float(c - b * middle + a * middle**2)), r2


def _why_not(a: float, r2: float, vertex: float, swept: np.ndarray, near: np.ndarray) -> str:
    """Why the vertex does not count; empty where it does."""
    margin = MARGIN * math.log(10)
    if a <= 0:
        return "the parabola opens downward"
    if not swept.min() + margin <= vertex <= swept.max() - margin:
        return f"the vertex, {math.exp(min(vertex, 300)):.3g}, is not inside the swept range"
    if not near.min() <= vertex <= near.max():
        return f"the vertex, {math.exp(vertex):.3g}, is beyond what trained to a loss near the lowest"
    return f"R^2 is {r2:.2f}" if r2 < STRAIGHT else ""
