"""Fits how far measured runs lie from the physics, and ships the result: evidence.jsonl and fit.json.

    python benchmarks/fit_estimator.py MEASUREMENTS.json

How large the effects of each level are is chosen so that runs of a table that was left out, and runs of a table of
which the earlier rows are known, are as likely as they can be (Student's t, four degrees of freedom; tables count as
the root of their size). The scores of these forecasts are what makes intervals hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from chiplog.estimate import evidence, forecast
from chiplog.estimate.backtest import Protocol, covered, foretold
from chiplog.estimate.effects import Sizes
from chiplog.estimate.forecast import LEVELS, PARTS, Fit, Measured, Quantity
from chiplog.estimate.table import Row, as_row, read_table

START = {"part": 0.3, "level": 0.4, "whole": 0.02, "noise": 0.02, "rough": 0.2, "unsure": 0.1}
DATA_ONLY = {"memory": (0.1, 0.1, 1.0, 1.0)}  # the length of the data moves what grows with it
LARGEST = 0.5  # an effect's standard deviation: more would be no correction of the physics
PRIOR = 0.03  # weight of staying near the start
ROUNDS = 600
TOGETHER = {"memory": 0.5, "pass": 0.0}  # passes are foretold too short by more than too long
NONE = {name: {"none yet": [0.0]} for name in ("near", "far")}


class Problem:
    """The covariance of all residuals of one quantity, as a function of the sizes of effects."""

    def __init__(self, quantity: Quantity, runs: list[Measured]) -> None:
        self.quantity: Quantity = quantity
        blank = Fit(Sizes((), ()), 0.0, 0.0, {})
        pairs = [(run, forecast.observe(quantity, run, blank)) for run in runs]
        self.runs = [run for run, one in pairs if one]
        observed = [one for _, one in pairs if one]
        self.shares = np.array([one.shares for one in observed])
        self.residuals = np.array([one.residual for one in observed])
        self.rough = np.array([run.rough for run in self.runs], float)
        self.unsure = np.array([bool(run.job.unsure) for run in self.runs], float)
        self.places = [run.place for run in self.runs]
        self.same = [
            np.array([[a is not None and a == b for b in column] for a in column])
            for column in zip(*(one.keys for one in observed), strict=True)
        ]
        counts = Counter(self.places)
        self.weights = np.array([1 / math.sqrt(counts[place]) for place in self.places])

    def sizes(self, logs: np.ndarray) -> tuple[Sizes, float, float, float]:
        n_parts, n_levels = len(PARTS[self.quantity]), len(LEVELS[self.quantity])
        values = np.exp(logs)
        parts, levels = values[:n_parts], values[n_parts : n_parts + n_levels]
        whole, (noise, rough, unsure) = values[n_parts + n_levels : -3], values[-3:]
        table = []
        for name, level in zip(LEVELS[self.quantity], levels, strict=True):
            only = DATA_ONLY.get(self.quantity, ()) if name == "data" else ()
            table.append(
                tuple(float(v) for v in np.minimum(parts * level, LARGEST) * (np.array(only) if only else 1.0))
            )
        return Sizes(tuple(table), tuple(float(v) for v in whole)), float(noise), float(rough), float(unsure)

    def start(self) -> np.ndarray:
        n_parts, n_levels = len(PARTS[self.quantity]), len(LEVELS[self.quantity])
        values = [START["part"]] * n_parts + [START["level"]] * n_levels + [START["whole"]] * n_levels
        return np.log([*values, START["noise"], START["rough"], START["unsure"]])

    def left_out(self, logs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Error and spread of each run: its table unknown; the earlier rows of its table known."""
        sizes, noise, rough, unsure = self.sizes(logs)
        kernel = np.diag(noise**2 + (rough * self.rough) ** 2 + (unsure * self.unsure) ** 2)
        for same, parts, whole in zip(self.same, sizes.parts, sizes.whole, strict=True):
            scaled = self.shares * np.array(parts)
            kernel += same * (scaled @ scaled.T + whole**2)
        places, n = np.array(self.places), len(self.places)
        far, far_spread, near, near_spread = (np.zeros(n) for _ in range(4))
        for place in dict.fromkeys(self.places):
            inside, outside = np.where(places == place)[0], np.where(places != place)[0]
            order = np.concatenate([outside, inside])
            root = np.linalg.cholesky(kernel[np.ix_(order, order)])
            white = solve_triangular(root, self.residuals[order], lower=True)
            m = len(outside)
            near[inside], near_spread[inside] = white[m:] * np.diag(root)[m:], np.diag(root)[m:]
            across = root[m:, :m]
            far[inside] = self.residuals[inside] - across @ white[:m]
            far_spread[inside] = np.sqrt(np.diag(kernel)[inside] - (across**2).sum(axis=1))
        return far, far_spread, near, near_spread

    def loss(self, logs: np.ndarray) -> float:
        try:
            far, far_spread, near, near_spread = self.left_out(logs)
        except np.linalg.LinAlgError:
            return 1e3
        total = 0.0
        for error, spread in ((far, far_spread), (near, near_spread)):
            each = np.log(spread) + 2.5 * np.log1p((error / spread) ** 2 / 4)
            total += float(np.average(each, weights=self.weights))
        return total + PRIOR * float(((logs - self.start()) ** 2).mean())

    def fit(self) -> dict[str, Any]:
        found = minimize(self.loss, self.start(), method="Powell", options={"maxfev": ROUNDS, "xtol": 0.05})
        sizes, noise, rough, unsure = self.sizes(found.x)
        return {
            "parts": [[round(v, 4) for v in row] for row in sizes.parts],
            "whole": [round(v, 4) for v in sizes.whole],
            "noise": round(noise, 4), "rough": round(rough, 4), "unsure": round(unsure, 4),
        }  # fmt: skip


def scores(quantity: Quantity, runs: list[tuple[Measured, Row]]) -> dict[str, dict[str, list[float]]]:
    """Of runs whose table, or later rows of it, were left out: how many spreads each lay from its forecast, by whether
    that called its evidence near, and by table."""
    found: dict[str, dict[str, list[float]]] = {"far": {}, "near": {}}
    for protocol in get_args(Protocol):
        errors = []
        for told in foretold(quantity, runs, [], protocol):
            actual = told.run.peak_bytes if quantity == "memory" else told.run.pass_s
            if told.figure and actual:
                error = math.log(actual / told.figure.value)
                tables = found["near" if told.figure.near else "far"]
                tables.setdefault(told.run.place, []).append(round(error / told.figure.scale, 3))
                errors.append(abs(math.expm1(-error)))
        print(
            f"{quantity:7s} {protocol:8s} n {len(errors)}  mean {np.mean(errors):.3f}  median {np.median(errors):.3f}"
        )
    return found


def as_known(row: Row) -> Row:
    """The row with what is known of its table beside what it says: it is evidence, and never asked for by this."""
    facts = {name: value for suite, is_of, given in KNOWN if row.suite == suite and is_of(row) for name, value in given}
    return row.model_copy(update=facts)


# Before transformers 4.36 its own attention kept all scores.
KNOWN = [("unsloth-2023", lambda row: row.framework == "HF", [("attn", "eager")])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits how far measured runs lie from the physics.")
    parser.add_argument("file", type=Path, help="measurements, as JSON")
    source = parser.parse_args().file
    rows = [as_known(as_row(values, Row)) for values in read_table(source)]
    runs, _ = covered(rows)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    head = {"from": source.name, "sha256": digest, "rows": len(rows), "by": "benchmarks/fit_estimator.py"}
    kept = [row.model_dump(exclude_defaults=True) for row in rows]
    evidence.SHIPPED.write_text("\n".join(json.dumps(line) for line in [head, *kept]) + "\n")
    fit: dict[str, Any] = {"from": head}
    for quantity in get_args(Quantity):
        fit[quantity] = {**Problem(quantity, [run for run, _ in runs]).fit(), "scores": NONE}
        fit[quantity]["together"] = TOGETHER[quantity]
    for quantity in get_args(Quantity):
        forecast.FIT.write_text(json.dumps(fit))
        forecast.fitted.cache_clear()
        fit[quantity]["scores"] = scores(quantity, runs)
    forecast.FIT.write_text(json.dumps(fit, indent=1) + "\n")


if __name__ == "__main__":
    main()
