"""The scaling law L = E + A / N^alpha + B / D^beta: fitted to many weightings of the same points at once.

The objective is that of Hoffmann et al. 2022 (arXiv:2203.15556, appendix D.3): the sum over points of the Huber loss
with delta = 0.001 of log(predicted) - log(observed). It is minimised over (log E, log A, log B, alpha, beta) by a
damped Newton method with exact second derivatives, in a batch: a bootstrap of 4,000 is one problem of 4,000 rows.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3
NAMES = ("E", "A", "B", "alpha", "beta")
# Starts: log E, log A, log B, alpha, beta; about the corners that arXiv:2203.15556 begins from.
GRID = {"e": (-1.0, -0.2, 0.6), "a": (2.0, 6.0, 10.0, 16.0), "b": (2.0, 6.0, 10.0, 16.0), "alpha": (0.2, 0.5, 0.9),
        "beta": (0.2, 0.5, 0.9)}  # fmt: skip
USUAL = np.log([1e8, 1e10])  # N and D that the starts suit; a fit counts both in units that bring their means there
MOST_STEPS = 400
FEW = 1000  # points that all starts are tried on; of more, on SOME of them, and the BEST of these on all
SOME, BEST = 500, 10
NOTHING = 1e-12  # of an objective: less is rounding
AT_ONCE = 120_000  # laws times points that are worked on at once, which bounds memory
LARGEST = 700.0  # of a logarithm: more is no number
SMOOTH = (1.0, 1e-1, 1e-2)  # deltas that the first steps of a start take, so that few points do not hold it


class Fit(NamedTuple):
    """A minimum: (log E, log A, log B, alpha, beta) and the objective there."""

    theta: Array
    objective: float

    @property
    def law(self) -> dict[str, float]:
        """E, A, B, alpha, beta."""
        return dict(zip(NAMES, laws(self.theta).tolist(), strict=True))


def laws(theta: Array) -> Array:
    """E, A, B, alpha, beta of "... 5" minima. What is beyond all numbers, as of a term too steep to tell, is 1e304."""
    return np.concatenate([np.exp(np.minimum(theta[..., :3], LARGEST)), theta[..., 3:]], -1)


def predicted(theta: Array, n: Array, d: Array) -> Array:
    """The losses, "... point", of laws "... 5" at `n` parameters and `d` tokens."""
    return np.exp(_log_sum(_terms(theta, np.log(n), np.log(d)))[0])


def objective(
    theta: Array, n: Array, d: Array, loss: Array, weights: Array | None = None, delta: float = DELTA
) -> Array:
    """The weighted sum of Huber losses, for laws "... 5"; `weights` "... point", or each point once."""
    residual = np.log(predicted(theta, n, d)) - np.log(loss)
    size = np.abs(residual)
    huber = np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    return (huber if weights is None else huber * weights).sum(-1)


def fit(n: Array, d: Array, loss: Array) -> Fit:
    """The best minimum from many starts, polished. All inputs "point" and positive."""
    units = np.array([np.log(n).mean(), np.log(d).mean()]) - USUAL
    found = _fit(np.exp(np.log(n) - units[0]), np.exp(np.log(d) - units[1]), loss)
    theta = found.theta.copy()
    theta[1:3] += theta[3:] * units
    return Fit(theta, found.objective)


def _fit(n: Array, d: Array, loss: Array) -> Fit:
    starts = np.array(list(itertools.product(*GRID.values())))
    if len(loss) > FEW:
        some = np.random.default_rng(0).choice(len(loss), SOME, replace=False)
        starts = _from_far(starts, n[some], d[some], loss[some])
        starts = starts[np.unique(starts.round(3), axis=0, return_index=True)[1]]
        starts = starts[np.argsort(objective(starts, n[some], d[some], loss[some]))[:BEST]]
    found = _from_far(starts, n, d, loss)
    values = objective(found, n, d, loss)
    best = int(np.nanargmin(values))
    return Fit(found[best], float(values[best]))


def refit(starts: Array, n: Array, d: Array, loss: Array, weights: Array) -> tuple[Array, NDArray[np.int64]]:
    """For each row of "row point" weights the lowest minimum "row 5" from some starts "start 5", and which it is from.

    Of minima that are the same the first start's counts.
    """
    points = np.log(n), np.log(d), np.log(loss)
    each = np.stack([_minimised(np.broadcast_to(start, (len(weights), 5)), *points, weights, DELTA, MOST_STEPS)
                     for start in starts])  # fmt: skip
    values = np.stack([objective(found, n, d, loss, weights) for found in each])
    best = (values <= values.min(0) * (1 + 1e-6) + NOTHING).argmax(0)
    return each[best, np.arange(len(weights))], best


def fit_given(floor: Array, theta: Array, n: Array, d: Array, loss: Array) -> Array:
    """The minima "row 5" near `theta` with E held at each of `floor`."""
    starts = np.broadcast_to(theta, (len(floor), 5)).copy()
    starts[:, 0] = np.log(floor)
    return _minimised(starts, np.log(n), np.log(d), np.log(loss), None, DELTA, MOST_STEPS, held=1)


def _from_far(starts: Array, n: Array, d: Array, loss: Array) -> Array:
    """The minima "start 5", with larger deltas at first."""
    points = np.log(n), np.log(d), np.log(loss)
    for delta in SMOOTH:
        starts = _minimised(starts, *points, None, delta, 40)
    return _minimised(starts, *points, None, DELTA, MOST_STEPS)


def _terms(theta: Array, log_n: Array, log_d: Array) -> Array:
    """The logarithms of the three terms of the law, "... 3 point"."""
    e, a, b, alpha, beta = (theta[..., i, None] for i in range(5))
    floor = np.broadcast_to(e, (*theta.shape[:-1], len(log_n)))
    return np.stack([floor, a - alpha * log_n, b - beta * log_d], -2)


def _log_sum(terms: Array) -> tuple[Array, Array]:
    """The logarithm of the sum over the three terms, "... point", and each one's share, "... 3 point"."""
    top = terms.max(-2, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(-2, keepdims=True)
    return (np.log(total) + top)[..., 0, :], parts / total


def _minimised(
    theta: Array, log_n: Array, log_d: Array, log_loss: Array, weights: Array | None, delta: float, steps: int,
    held: int = 0,
) -> Array:  # fmt: skip
    """Newton's method with damping that each row adapts for itself; the first `held` parameters stay as they are."""
    if len(theta) > (rows := max(1, AT_ONCE // len(log_n))):
        parts = [slice(first, first + rows) for first in range(0, len(theta), rows)]
        found = [_minimised(theta[part], log_n, log_d, log_loss, None if weights is None else weights[part], delta,
                            steps, held) for part in parts]  # fmt: skip
        return np.concatenate(found)
    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    value = np.full(len(theta), np.inf)
    value[:] = _value(theta, log_n, log_d, log_loss, weights, delta)
    for _ in range(steps):
        if not len(active):
            break
        w = weights if weights is None else weights[active]
        gradient, hessian = _derivatives(theta[active], log_n, log_d, log_loss, w, delta)
        gradient, hessian = gradient[:, held:], hessian[:, held:, held:]
        scale = np.abs(np.einsum("kii->ki", hessian)) + 1e-12
        eigen, vectors = np.linalg.eigh(hessian / np.sqrt(scale[:, :, None] * scale[:, None, :]))
        # Curvature the wrong way counts by its size, so that every step goes down.
        curve = np.abs(eigen) + damping[active, None]
        inner = np.einsum("kji,kj->ki", vectors, gradient / np.sqrt(scale)) / curve
        step = -np.einsum("kij,kj->ki", vectors, inner) / np.sqrt(scale)
        step *= np.minimum(1.0, 4.0 / (np.abs(step).max(1, keepdims=True) + 1e-300))
        tried = theta[active].copy()
        tried[:, held:] += step
        new = _value(tried, log_n, log_d, log_loss, w, delta)
        better = new < value[active]
        moved = active[better]
        gain = value[moved] - new[better]
        theta[moved], value[moved] = tried[better], new[better]
        damping[moved] *= 0.2
        damping[active[~better]] *= 5.0
        small = np.abs(step).max(1) < 1e-11
        done = small | (damping[active] > 1e12)
        done[better] |= gain <= 1e-15 * value[moved] * (damping[moved] < 1e-6)
        active = active[~done]
    return theta


def _value(theta: Array, log_n: Array, log_d: Array, log_loss: Array, weights: Array | None, delta: float) -> Array:
    residual = _log_sum(_terms(theta, log_n, log_d))[0] - log_loss
    size = np.abs(residual)
    huber = np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    found = (huber if weights is None else huber * weights).sum(-1)
    return np.where(np.isfinite(found), found, np.inf)


def _derivatives(
    theta: Array, log_n: Array, log_d: Array, log_loss: Array, weights: Array | None, delta: float
) -> tuple[Array, Array]:
    """Gradient "row 5" and Hessian "row 5 5" of the objective."""
    log_sum, share = _log_sum(_terms(theta, log_n, log_d))
    residual = log_sum - log_loss
    pull, curve = np.clip(residual, -delta, delta), (np.abs(residual) <= delta).astype(float)
    if weights is not None:
        pull, curve = pull * weights, curve * weights
    # Terms are exp(floor), exp(a - alpha log n), exp(b - beta log d): by each parameter the slope of the law's
    # logarithm is the share of its term, times -log n or -log d for the exponents; second slopes stay in one term.
    powers_n, powers_d = (np.stack([np.ones_like(x), -x, x**2], -1) for x in (log_n, log_d))
    by_term = share * pull[:, None, :]
    floor, of_n, of_d = by_term[:, 0].sum(-1), by_term[:, 1] @ powers_n, by_term[:, 2] @ powers_d
    gradient = np.stack([floor, of_n[:, 0], of_d[:, 0], of_n[:, 1], of_d[:, 1]], -1)
    second = np.zeros((len(theta), 5, 5))
    second[:, 0, 0] = floor
    for i, j, moments in ((1, 3, of_n), (2, 4, of_d)):
        second[:, i, i], second[:, j, j] = moments[:, 0], moments[:, 2]
        second[:, i, j] = second[:, j, i] = moments[:, 1]
    jacobian = np.concatenate([share, -share[:, 1:] * np.stack([log_n, log_d])], 1)
    outer = (jacobian * (curve - pull)[:, None, :]) @ jacobian.transpose(0, 2, 1)
    return gradient, outer + second
