"""Fits L = E + A / N^alpha + B / D^beta to a table of runs, and says whether these runs can tell its parts.

    python fit.py FILE.csv [--all] [--drop-largest K] [--bootstrap 4000] [--seed 0]

Columns by name: N (parameters), D (tokens) or C_flops (then D = C / 6N), loss. Where they are there, rows with
used_in_fit = 0 are left out and counted unless --all, rows of the same `run` are drawn together in the bootstrap, and
`decayed` = 0 marks points taken before the learning rate had decayed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks.scaling_laws import law
from tasks.scaling_laws.law import Array, Fit
from trainer import job
from trainer.job import UserError

NEEDED = 6  # points: one more than parameters
SAME_RATIO = 1.1  # tokens per parameter that differ by less are one ratio
LEVEL = 0.95  # of the intervals
WIDE = 0.25  # an interval of E wider than this share of the lowest loss leaves it open
LARGEST = 700.0  # of a logarithm that is drawn: more is no number
AT_ONCE = 500  # weightings fitted at once, which bounds memory


def main() -> int:
    """Exit code 0, when the law is printed."""
    parser = argparse.ArgumentParser(description="Fits a scaling law to a table of runs.", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="CSV with the columns N, D or C_flops, loss")
    parser.add_argument("--all", action=argparse.BooleanOptionalAction, default=False, help="used_in_fit = 0 too")
    parser.add_argument("--drop-largest", type=int, default=0, help="leave out the K largest losses")
    parser.add_argument("--bootstrap", type=int, default=4000, help="fits to draws of the runs; 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    arguments = parser.parse_args()
    points = read_points(arguments.file, use_all=arguments.all, drop_largest=arguments.drop_largest)
    print(json.dumps(fit_law(points, arguments.bootstrap, arguments.seed)))
    return 0


@dataclass(frozen=True)
class Points:
    """What is fitted, "point" each, and what was left out."""

    n: Array
    d: Array
    loss: Array
    run: list[str]
    undecayed: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def read_points(file: Path, *, use_all: bool = False, drop_largest: int = 0) -> Points:
    """The rows of a table. Raises UserError for one that is no table, lacks a column or has a wrong number."""
    rows = _rows(file)
    has = set(rows[0])
    if missing := [name for name in ("N", "loss") if name not in has] or ["D"] * (not has & {"D", "C_flops"}):
        raise UserError(
            f"{file} has the columns {', '.join(rows[0])}: it needs N, loss, and D or C_flops; {missing[0]} is missing"
        )
    left_out = {"used_in_fit is 0": 0, "no loss": 0, "the largest losses": 0}
    kept: list[tuple[float, float, float, str, bool]] = []
    for number, row in enumerate(rows, 2):
        if row.get("used_in_fit") == "0" and not use_all:
            left_out["used_in_fit is 0"] += 1
            continue
        loss = _number(row, "loss", file, number, may_fail=True)
        if loss is None:  # diverged, or never validated
            left_out["no loss"] += 1
            continue
        n = _number(row, "N", file, number)
        d = _number(row, "D", file, number) if row.get("D") else _number(row, "C_flops", file, number) / (6 * n)
        kept.append((n, d, loss, row.get("run") or str(number), row.get("decayed") == "0"))
    if drop_largest:
        kept = sorted(kept, key=lambda point: point[2])[: max(0, len(kept) - drop_largest)]
        left_out["the largest losses"] = drop_largest
    if len(kept) < NEEDED:
        raise UserError(f"{file} leaves {len(kept)} points, and a law of 5 parameters needs {NEEDED}: add runs")
    n, d, loss = (np.array([point[i] for point in kept], dtype=float) for i in range(3))
    undecayed = sum(point[4] for point in kept)
    return Points(n, d, loss, [point[3] for point in kept], undecayed, {k: v for k, v in left_out.items() if v})


def fit_law(points: Points, bootstrap: int, seed: int) -> dict[str, Any]:
    """What is printed: law, objective (a sum), intervals, whether the points identify the law, and why or why not."""
    found = law.fit(points.n, points.d, points.loss)
    draws = _bootstrap(points, found, bootstrap, seed)
    laws = (
        np.column_stack([np.exp(np.minimum(draws[:, :3], LARGEST)), draws[:, 3:]]) if len(draws) else np.empty((0, 5))
    )
    ci = {name: _interval(laws[:, i]) for i, name in enumerate(law.NAMES)} if len(laws) else {}
    errors = {name: _spread(laws[:, i]) for i, name in enumerate(law.NAMES)} if len(laws) > 1 else {}
    open_because = why_open(points, found, ci.get("E"))
    alpha, beta = found.law["alpha"], found.law["beta"]
    share = laws[:, 4] / (laws[:, 3] + laws[:, 4]) if len(laws) else laws[:, 0]
    return {
        **found.law,
        "objective": found.objective,
        "ci": ci,
        "ci_level": LEVEL,
        "standard_errors": errors,
        "identifiable": not open_because,
        "why": " ".join(open_because) or _why_known(points, ci.get("E")),
        # Of a compute budget C = 6ND the best N grows as C^a, the best D as C^(1-a).
        "optimal_n_exponent": beta / (alpha + beta),
        "optimal_n_exponent_ci": _interval(share) if len(share) else None,
        "profile_of_E": profile(points, found),
        "n": len(points.loss),
        "n_runs": len(set(points.run)),
        "bootstrap": len(draws),
        "left_out": points.left_out,
    }


def profile(points: Points, found: Fit, steps: int = 21) -> dict[str, list[float]]:
    """The least objective for each of some values of E between 0.2 of it and the lowest loss."""
    floor = np.linspace(0.2 * found.law["E"], 0.995 * points.loss.min(), steps)
    starts = law.fit_given(floor, found.theta, points.n, points.d, points.loss)
    values = law.objective(starts, points.n, points.d, points.loss)
    return {"E": floor.tolist(), "objective": values.tolist()}


def why_open(points: Points, found: Fit, interval: list[float] | None) -> list[str]:
    """Why these points do not identify the law, a sentence each; none where they do."""
    wrong = []
    ratios = np.log(points.d / points.n)
    if math.exp(np.ptp(ratios)) < SAME_RATIO:
        wrong.append(
            f"All {len(ratios)} points have {math.exp(np.median(ratios)):.3g} tokens per parameter, so N and D grow "
            "together and their terms cannot be told apart: it needs at least two token ratios."
        )
    for values, what in ((points.n, "numbers of parameters"), (points.d, "numbers of tokens")):
        if (n := len(np.unique(np.round(np.log(values), 2)))) < 3:
            wrong.append(f"There are only {n} {what}, and the bend of a power law with a floor shows from 3 on.")
    if points.undecayed:
        wrong.append(
            f"{points.undecayed} points were taken before the learning rate had decayed; they lie above the loss that "
            "a run of that length would reach: fit the ends of runs."
        )
    lowest = float(points.loss.min())
    if interval and interval[1] - interval[0] > WIDE * lowest:
        least = round(interval[0], 6)  # a fit goes towards 0 without end
        wrong.append(
            f"The draws leave E anywhere between {least:.3g} and {interval[1]:.3g}, the lowest loss being "
            f"{lowest:.3g}: it needs larger runs, or more of them."
        )
    if found.law["E"] < 1e-3 * lowest:
        wrong.append("The best E is 0: the points show no floor, and the exponents are those of a law without one.")
    return wrong


def _why_known(points: Points, interval: list[float] | None) -> str:
    ratios = points.d / points.n
    words = f"{len(ratios)} points with {ratios.min():.3g} to {ratios.max():.3g} tokens per parameter"
    return f"{words} hold E within {interval[0]:.4g} to {interval[1]:.4g}." if interval else f"{words}."


def _bootstrap(points: Points, found: Fit, n: int, seed: int) -> Array:
    """Fits "draw 5" to draws of as many runs as there are, all points of a run together."""
    names = sorted(set(points.run))
    place = {name: i for i, name in enumerate(names)}
    runs = np.array([place[name] for name in points.run])
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), n)
    weights = counts[:, runs].astype(float)
    parts = [weights[first : first + AT_ONCE] for first in range(0, n, AT_ONCE)]
    fits = [law.refit(found.theta, points.n, points.d, points.loss, part) for part in parts]
    return np.concatenate(fits) if fits else np.empty((0, 5))


def _interval(values: Array) -> list[float]:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def _spread(values: Array) -> float | None:
    """The standard deviation; null where draws that hold nothing let a value grow beyond all numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        spread = float(values.std(ddof=1))
    return spread if math.isfinite(spread) else None


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if "\0" in text:
        raise UserError(f"{file} holds NUL bytes, as a file does that was cut off as it was written: make it again")
    rows = list(csv.DictReader(text.splitlines(), strict=True))
    if not rows:
        raise UserError(f"{file} has no rows below its header: there is nothing to fit")
    return rows


def _number(row: dict[str, str], name: str, file: Path, line: int, may_fail: bool = False) -> Any:
    """A positive number; null for a loss that is none, which a run that diverged leaves."""
    text = (row.get(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        if may_fail and text.lower() in ("", "none", "null"):
            return None
        raise UserError(f"{file} line {line}: {name} is {text!r}; give a number above 0") from None
    if math.isfinite(value) and value > 0:
        return value
    if may_fail and not math.isfinite(value):
        return None
    raise UserError(f"{file} line {line}: {name} is {text}; give a number above 0")


if __name__ == "__main__":
    job.run(main)
