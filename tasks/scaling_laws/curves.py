"""What is drawn between the points of an analysis: pure functions, the same for PNG and for the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.scaling_laws import law as laws
from tasks.scaling_laws.runs import Run

Array = NDArray[np.float64]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


def titled(law: dict[str, Any] | None) -> str:
    """The law in one line, and whether it is one; "no law" where there is none."""
    if law is None:
        return "no law"
    return equation(law) + ("" if law["identifiable"] else " (not identified)")


def equation(law: dict[str, Any]) -> str:
    """The law in one line."""
    return f"L = {floored(law['E'])} + {law['A']:.4g} / N^{law['alpha']:.3g} + {law['B']:.4g} / D^{law['beta']:.3g}"


def floored(value: float) -> str:
    """A number that is 0 where a fit went towards it without end."""
    return f"{value:.3g}" if value > 1e-6 else "0"


def predicted(law: dict[str, Any], n: Any, d: Any) -> Array:
    """The law's loss at N parameters and D tokens, in nats a token."""
    theta = np.array([np.log(law["E"]), np.log(law["A"]), np.log(law["B"]), law["alpha"], law["beta"]])
    return laws.predicted(theta, np.atleast_1d(n).astype(float), np.atleast_1d(d).astype(float))


def of_size(law: dict[str, Any], runs: Sequence[Run]) -> tuple[Array, Array]:
    """FLOPs and the law's loss over the lengths of runs of one size."""
    d = np.geomspace(min(run.d for run in runs), max(run.d for run in runs), 40)
    per_token = runs[0].flops / runs[0].d
    return per_token * d, predicted(law, np.full(40, runs[0].n), d)


def best_of_law(law: dict[str, Any], runs: Sequence[Run]) -> tuple[Array, Array, float]:
    """FLOPs, the lowest loss that the law gives for C = 6ND of them, and the exponent of the best N over C.

    Drawn over exact FLOPs, which are near 6ND.
    """
    low, high = min(run.flops for run in runs), max(run.flops for run in runs)
    exact = float(np.exp(np.mean([np.log(run.flops / (6 * run.n * run.d)) for run in runs])))
    alpha, beta = law["alpha"], law["beta"]
    compute = np.geomspace(low, high, 40) / exact
    n = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta)) * (compute / 6) ** (beta / (alpha + beta))
    return exact * compute, predicted(law, n, compute / 6 / n), beta / (alpha + beta)


def parabola(coefficients: Sequence[float], x: Sequence[float]) -> tuple[Array, Array]:
    """A parabola in ln x, its highest power first, over the range of `x`."""
    over = np.geomspace(min(x), max(x), 60)
    a, b, c = coefficients
    return over, a * np.log(over) ** 2 + b * np.log(over) + c


def on_parabola(coefficients: Sequence[float], x: float) -> float:
    """Its value at `x`."""
    return float(parabola(coefficients, [x])[1][0])


def isoflop_title(budgets: Sequence[dict[str, Any]]) -> str:
    """What the points are."""
    return "isoFLOP curves" + ("" if all(one["are_runs"] for one in budgets) else ", losses read between runs")


def of_width(sweep: dict[str, Any], width: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The points of one width of a sweep: those with a loss, and those that diverged."""
    points = [point for point in sweep["points"] if point["width"] == width]
    return [p for p in points if np.isfinite(p["loss"])], [p for p in points if not np.isfinite(p["loss"])]


def by_size(runs: Sequence[Run]) -> list[tuple[int, list[Run]]]:
    """The runs of each number of parameters, smallest first."""
    sizes: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        sizes[run.n].append(run)
    return sorted(sizes.items())


def colour(place: int) -> str:
    """One that is told from its neighbours by all."""
    return COLOURS[place % len(COLOURS)]


def short(n: int) -> str:
    """A number of parameters in few letters."""
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"
