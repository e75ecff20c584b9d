"""The bootstrap of a scaling law: the study's batched Newton fits against scipy's L-BFGS-B, from the same starts.

    python -m benchmarks.scaling_fit [FILE.csv] [--draws 4000] [--scipy 40]
    python -m benchmarks.scaling_fit --coverage      how often intervals of few points hold the law they are made of

scipy fits only the first of the same draws, and its time is scaled to all of them. Without a file the points are made:
240 of a known law with noise. Both minimise the same objective with exact gradients.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from tqdm import tqdm

from tasks.scaling_laws import law
from tasks.scaling_laws.fit import fit_law
from tasks.scaling_laws.law import DELTA, Array
from tasks.scaling_laws.table import Points, read_points


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--scipy", type=int, default=40, help="draws that scipy fits")
    parser.add_argument("--coverage", action="store_true")
    arguments = parser.parse_args()
    if arguments.coverage:
        coverage()
        return
    points = read_points(arguments.file) if arguments.file else made()
    start = law.fit(points.n, points.d, points.loss).theta
    n = len(points.loss)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), arguments.draws).astype(float)

    few = weights[: arguments.scipy]
    began = time.perf_counter()
    theirs = np.array([scipy_fit(start, points, row) for row in few])
    scipy_s = (time.perf_counter() - began) / len(few) * arguments.draws
    began = time.perf_counter()
    parts = np.array_split(weights, max(1, arguments.draws * n // law.AT_ONCE))
    ours = np.concatenate([law.refit(start[None], points.n, points.d, points.loss, part)[0] for part in parts])
    ours_s = time.perf_counter() - began

    reached = [law.objective(found, points.n, points.d, points.loss, few) for found in (ours[: len(few)], theirs)]
    worse = (reached[1] / reached[0] - 1).max()
    print(f"| {arguments.draws:,} fits to draws of {n} points | seconds | times ours |\n|---|---|---|")
    print(f"| batched Newton | {ours_s:.1f} | 1 |")
    print(f"| scipy L-BFGS-B, {len(few)} draws scaled to all | {scipy_s:.1f} | {scipy_s / ours_s:.1f} |")
    print(
        f"\nscipy's objective is up to {worse:.2%} above ours, and at least {(reached[1] / reached[0] - 1).min():.1e}."
    )


def scipy_fit(start: Array, points: Points, weights: Array) -> Array:
    """One fit, as tight as L-BFGS-B gets."""
    log_n, log_d, log_loss = np.log(points.n), np.log(points.d), np.log(points.loss)

    def value(theta: Array) -> tuple[float, Array]:
        terms = np.stack([np.full_like(log_n, theta[0]), theta[1] - theta[3] * log_n, theta[2] - theta[4] * log_d])
        top = terms.max(0)
        parts = np.exp(terms - top)
        total = parts.sum(0)
        residual, share = np.log(total) + top - log_loss, parts / total
        size = np.abs(residual)
        huber = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA))
        pull = weights * np.clip(residual, -DELTA, DELTA)
        slopes = (share[0], share[1], share[2], -share[1] * log_n, -share[2] * log_d)
        # In units of delta squared: else the tolerances, which are absolute, end it at once.
        return float((weights * huber).sum()) / DELTA**2, np.array([(pull * each).sum() for each in slopes]) / DELTA**2

    options = {"maxiter": 2000, "maxfun": 5000, "ftol": 1e-13, "gtol": 1e-9}
    return minimize(value, start, jac=True, method="L-BFGS-B", options=options).x


def coverage(tables: int = 40, draws: int = 200, noise: float = 0.003) -> None:
    """Of tables of some of 3 sizes by 4 token ratios: in how many each parameter's 95 % interval holds its value."""
    true = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    n = np.tile(np.geomspace(1e7, 1e10, 3), 4)
    d = n * np.repeat([2.0, 200.0, 20.0, 60.0], 3)
    print(f"| points | {' | '.join(true)} |\n|---|{'---|' * len(true)}")
    for few in (7, 8, 9, 12):
        held = dict.fromkeys(true, 0)
        for seed in tqdm(range(tables), desc=f"{few} points", leave=False):
            x, y = n[:few], d[:few]
            loss = true["E"] + true["A"] / x ** true["alpha"] + true["B"] / y ** true["beta"]
            loss *= np.exp(noise * np.random.default_rng(seed).standard_normal(few))
            ci = fit_law(Points(x, y, loss, [str(i) for i in range(few)]), draws, seed)["ci"]
            for name, value in true.items():
                held[name] += ci[name][0] <= value <= ci[name][1]
        print(f"| {few} | {' | '.join(f'{count / tables:.0%}' for count in held.values())} |")


def made() -> Points:
    """Points of the law of arXiv:2203.15556 with noise of a hundredth."""
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(5e7), np.log(1e10), 240)), np.exp(rng.uniform(np.log(5e8), np.log(3e11), 240))
    loss = (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * np.exp(0.01 * rng.standard_normal(240))
    return Points(n, d, loss, [str(i) for i in range(240)])


if __name__ == "__main__":
    main()
