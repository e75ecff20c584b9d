"""Fits L = E + A / N^alpha + B / D^beta to a table of runs, and says whether these runs can tell its parts.

    python fit.py FILE.csv [--all] [--drop-largest K] [--bootstrap 4000] [--seed 0]

table.py says how the table is read: N (parameters), D (tokens) or C_flops (then D = C / 6N), loss. Where they are
there, rows with used_in_fit = 0 are left out and counted unless --all, rows of the same `run` are drawn together in the
bootstrap, and `decayed` = 0 marks points taken before the learning rate had decayed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks.scaling_laws import law
from tasks.scaling_laws.law import Array, Fit
from tasks.scaling_laws.table import Points, read_points
from trainer import job
from trainer.job import UserError

TESTED = 200  # draws that decide whether the points identify the law, where fewer are asked for
FEWEST = 40  # draws of an interval: of fewer, none lies outside 95 %
ONE_LINE = 0.15  # spread of log D about a line in log N; less is one line, on which the terms cannot be told apart
STRAY = 0.1  # share of the points that may lie off a line and leave it one
FAR = 3 * ONE_LINE  # from the line: a stray
FLAT = 1e-6  # of the lowest loss: a term that falls by less over the points does not fall
VAGUE = 4.0  # an exponent whose interval is wider than by this factor is open
LEVEL = 0.95  # of the intervals
WIDE = 0.25  # an interval of E wider than this share of the lowest loss leaves it open
CORNERS = np.array([0.3, 0.6, 0.85, 0.97])  # of the lowest loss: where E is held before draws are fitted from there
OFTEN = 0.01  # share of the draws that a corner must serve better for all to be fitted from there too
LEAST = 9  # points and runs: of 7, intervals miss too often (python -m benchmarks.scaling_fit --coverage)
DRAWS = f"fits to draws of the runs; below {FEWEST}: no intervals"


def main() -> int:
    """Exit code 0, when the law is printed."""
    parser = argparse.ArgumentParser(description="Fits a scaling law to a table of runs.", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="CSV with the columns N, D or C_flops, loss")
    parser.add_argument("--all", action=argparse.BooleanOptionalAction, default=False, help="used_in_fit = 0 too")
    parser.add_argument("--drop-largest", type=whole, default=0, help="leave out the K largest losses")
    parser.add_argument("--bootstrap", type=whole, default=4000, help=DRAWS)
    parser.add_argument("--seed", type=whole, default=0, help="of the draws")
    arguments = parser.parse_args()
    points = read_points(arguments.file, use_all=arguments.all, drop_largest=arguments.drop_largest)
    print(json.dumps(fit_law(points, arguments.bootstrap, arguments.seed)))
    return 0


def whole(text: str) -> int:
    """The number that an option gives. Raises UserError."""
    if not text.isdecimal():
        raise UserError(f"an option is {text!r}: give a whole number of at least 0")
    return int(text)


def fit_law(points: Points, bootstrap: int, seed: int) -> dict[str, Any]:
    """What is printed: law, objective (a sum), intervals, whether the points identify the law, and why or why not."""
    found = law.fit(points.n, points.d, points.loss)
    tested = law.laws(_bootstrap(points, found, max(bootstrap, TESTED), seed))
    laws = tested[: bootstrap if bootstrap >= FEWEST else 0]
    open_because = why_open(points, found, tested)
    alpha, beta = found.law["alpha"], found.law["beta"]
    falls = min(_falls(points, found)) > FLAT and bool((laws[:, 3:] > 0).all())
    return {
        **found.law,
        "objective": found.objective,
        "ci": {name: _interval(laws[:, i]) for i, name in enumerate(law.NAMES)} if len(laws) else {},
        "ci_level": LEVEL,
        "standard_errors": {name: _spread(laws[:, i]) for i, name in enumerate(law.NAMES)} if len(laws) else {},
        "identifiable": not open_because,
        "why": " ".join([*(open_because or [_why_known(points, _interval(tested[:, 0]))]), *points.notes]),
        # Of a compute budget C = 6ND the best N grows as C^a, the best D as C^(1-a); null where a term does not fall.
        "optimal_n_exponent": beta / (alpha + beta) if falls else None,
        "optimal_n_exponent_ci": _interval(laws[:, 4] / laws[:, 3:].sum(1)) if falls and len(laws) else None,
        "profile_of_E": profile(points, found),
        "n": len(points.loss),
        "n_runs": len(set(points.run)),
        "bootstrap": len(laws),
        "left_out": points.left_out,
    }


def profile(points: Points, found: Fit, steps: int = 21) -> dict[str, list[float]]:
    """The least objective for each of some values of E between 0.2 of it and the lowest loss."""
    floor = np.linspace(0.2 * found.law["E"], 0.995 * points.loss.min(), steps)
    starts = law.fit_given(floor, found.theta, points.n, points.d, points.loss)
    values = law.objective(starts, points.n, points.d, points.loss)
    return {"E": floor.tolist(), "objective": values.tolist()}


def why_open(points: Points, found: Fit, laws: Array) -> list[str]:
    """Why these points do not identify the law, a sentence each; none where they do. `laws` "draw 5": the bootstrap."""
    wrong = [*_too_few(points), *_one_line(points)]
    if points.undecayed:
        wrong.append(
            f"{points.undecayed} points were taken before the learning rate had decayed; they lie above the loss that "
            "a run of that length would reach: fit the ends of runs."
        )
    lowest = float(points.loss.min())
    low, high = _interval(laws[:, 0])
    if high - low > WIDE * lowest:
        least = round(low, 6)  # a fit goes towards 0 without end
        wrong.append(
            f"The draws leave E anywhere between {least:.3g} and {high:.3g}, the lowest loss being {lowest:.3g}: it "
            "needs larger runs, or more of them."
        )
    several, falls = (np.ptp(points.n) > 0, np.ptp(points.d) > 0), _falls(points, found)
    for place, (name, what) in enumerate({"alpha": "sizes", "beta": "lengths"}.items()):
        low, high = _interval(laws[:, 3 + place])
        if several[place] and (falls[place] <= FLAT or high <= 0):
            wrong.append(f"The losses do not fall with {'ND'[place]} over these points: it needs other {what}.")
        elif min(low, found.law[name]) <= 0 or high > VAGUE * low:
            wrong.append(f"The draws leave {name} anywhere between {low:.3g} and {high:.3g}: it needs more {what}.")
    return wrong


def _too_few(points: Points) -> Iterator[str]:
    """What the points lack before they are looked at closer."""
    if np.ptp(points.loss) <= 1e-9 * points.loss.max():
        yield "All losses are the same, and a law says how they fall."
    if (n := len({(n, d) for n, d in zip(points.n, points.d, strict=True)})) < LEAST:
        yield f"There are {n} different points; {LEAST} are needed to tell how well a law of 5 parameters is known."
    elif (n := len(set(points.run))) < LEAST:
        yield f"The points are of {n} runs, which vary as one each; {LEAST} are needed to tell how well it is known."
    for values, what in ((points.n, "numbers of parameters"), (points.d, "numbers of tokens")):
        if (n := len(np.unique(np.round(np.log(values), 2)))) < 3:
            yield f"There are only {n} {what}, and the bend of a power law with a floor shows from 3 on."


def _one_line(points: Points) -> Iterator[str]:
    """Says so where all points but a few strays have D as one rising power of N.

    On a falling one, such as a budget of compute, the terms pull apart, and the draws tell how far.
    """
    x, y = np.log(points.n), np.log(points.d)
    if np.ptp(x) < ONE_LINE or np.ptp(y) < ONE_LINE:
        return  # one size or one length, which is said otherwise
    off = np.abs(y - np.polyval(np.polyfit(x, y, 1), x))
    near = np.argsort(off)[: len(off) - math.ceil(STRAY * len(off))]
    if np.ptp(x[near]) < ONE_LINE:
        return
    line = np.polyfit(x[near], y[near], 1)
    off = y - np.polyval(line, x)
    if line[0] <= 0 or np.std(off[near]) >= ONE_LINE:
        return
    if strays := int((np.abs(off) > FAR).sum()):
        which, needs = f"All but {strays} of the {len(x)} points", "more points at other token ratios"
    else:
        which, needs = f"The {len(x)} points have {_ratios(points)} and", "at least two token ratios"
    apart = "where N and D grow together and their terms cannot be told apart"
    yield f"{which} lie on one line, {apart}: it needs {needs}."


def _falls(points: Points, found: Fit) -> list[float]:
    """By how much the terms of N and D fall from the lowest value to the highest, in shares of the lowest loss."""
    ends = [np.log([values.min(), values.max()]) for values in (points.n, points.d)]
    terms = [np.exp(found.theta[1 + i] - found.theta[3 + i] * end) for i, end in enumerate(ends)]
    return [float((term[0] - term[1]) / points.loss.min()) for term in terms]


def _why_known(points: Points, interval: list[float]) -> str:
    return f"{len(points.n)} points with {_ratios(points)} hold E within {interval[0]:.4g} to {interval[1]:.4g}."


def _ratios(points: Points) -> str:
    ratios = points.d / points.n
    return f"{ratios.min():.3g} to {ratios.max():.3g} tokens per parameter"


def _bootstrap(points: Points, found: Fit, n: int, seed: int) -> Array:
    """Fits "draw 5" to draws of as many runs as there are, all points of a run together.

    A draw may have its minimum far from the fit's, such as where E is 0: the first ones are looked for from there too.
    """
    names = sorted(set(points.run))
    place = {name: i for i, name in enumerate(names)}
    runs = np.array([place[name] for name in points.run])
    rng, even = np.random.default_rng(seed), np.full(len(names), 1 / len(names))
    corners = law.fit_given(CORNERS * points.loss.min(), found.theta, points.n, points.d, points.loss)
    starts, fits, better = np.vstack([found.theta, corners]), np.empty((0, 5)), np.empty(0)
    while len(fits) < n:
        if len(fits) >= TESTED and (better > 0).mean() <= OFTEN:
            starts = starts[:1]
        at_once = min(max(1, law.AT_ONCE // len(runs)), n - len(fits), TESTED)
        counts = rng.multinomial(len(names), even, at_once)
        drawn, best = law.refit(starts, points.n, points.d, points.loss, counts[:, runs].astype(float))
        fits, better = np.concatenate([fits, drawn]), np.concatenate([better, best])
    return fits


def _interval(values: Array) -> list[float]:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def _spread(values: Array) -> float | None:
    """The standard deviation; null where draws that hold nothing let a value grow beyond all numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        spread = float(values.std(ddof=1))
    return spread if math.isfinite(spread) else None


if __name__ == "__main__":
    job.run(main)
