"""How far past runs lie from the physics: effects of framework, recipe, model and place, as one Gaussian process.

The log of measured over computed is a sum of effects. Each level (the framework, the model, ...) shifts each part of
the physics by a factor of its own, and the whole by another; runs that share a level share its effects. What few runs
say is drawn towards nothing; what no run says stays as wide as such effects are. Since an effect belongs to a part, two
batch sizes on record tell the part that grows with the batch from the one that does not.

Bayesian linear regression with random effects; Rasmussen and Williams, Gaussian Processes for Machine Learning, 2.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from threadpoolctl import ThreadpoolController

# These matrices are small, and on a busy login node threads that wait for each other take thirty times as long.
ONE_THREAD = ThreadpoolController().wrap(limits=1, user_api="blas")
OUTLIER = 2.5  # standard deviations beyond which an observation counts less
Array = np.ndarray


@dataclass(frozen=True)
class Observation:
    """A measured run beside what the physics says of it."""

    keys: tuple[Hashable, ...]  # which group it belongs to, a key a level; None: to none
    shares: tuple[float, ...]  # of each part of the physics
    residual: float  # log(measured / computed)
    noise: float  # standard deviation of what no level explains
    source: str = ""  # where it stands, for evidence


class Sizes(NamedTuple):
    """How large effects are: standard deviations on the log scale."""

    parts: tuple[tuple[float, ...], ...]  # of each part, by level
    whole: tuple[float, ...]  # of the whole, by level


class Shift(NamedTuple):
    """What past runs say of a job: the log factor of each part and, last, of the whole; and how sure that is."""

    mean: Array  # (parts + 1,)
    covariance: Array  # (parts + 1, parts + 1)
    related: Array  # (observations,) share of prior variance that each has in common with the job

    def spread(self, shares: Sequence[float], noise: float) -> float:
        """Standard deviation of the log of a job of such shares."""
        weights = np.array([*shares, 1.0])
        return math.sqrt(max(float(weights @ self.covariance @ weights), 0.0) + noise**2)


@dataclass
class Effects:
    """The effects that these observations show."""

    observations: list[Observation]
    sizes: Sizes
    settled: int | None = None  # of how many, the first, it is judged which are outliers; None: of all

    def __post_init__(self) -> None:
        self._parts, self._whole = np.array(self.sizes.parts) ** 2, np.array(self.sizes.whole) ** 2
        n, (n_levels, n_parts) = len(self.observations), self._parts.shape
        self._shares = np.array([o.shares for o in self.observations]).reshape(n, n_parts)
        self._residuals = np.array([o.residual for o in self.observations])
        self._ids: list[dict[Hashable, int]] = [{} for _ in range(n_levels)]
        self._shifts: dict[tuple[Hashable, ...], Shift] = {}
        self._keys = np.array([self._numbered(o.keys) for o in self.observations], int).reshape(n, n_levels)
        if n:
            self._solve()

    def _numbered(self, keys: Sequence[Hashable]) -> list[int]:
        return [-1 if key is None else ids.setdefault(key, len(ids)) for key, ids in zip(keys, self._ids, strict=True)]

    @ONE_THREAD
    def _solve(self) -> None:
        kernel = self._shared(self._keys, self._shares)
        noise = np.array([o.noise**2 for o in self.observations])
        n = len(noise) if self.settled is None else self.settled
        for _ in range(2 if n else 0):
            root = np.linalg.cholesky(kernel[:n, :n] + np.diag(noise[:n]))
            inverse = cho_solve((root, True), np.eye(n))
            left_out = inverse @ self._residuals[:n] / np.diag(inverse)  # how far each lies from what the others say
            z = np.abs(left_out) * np.sqrt(np.diag(inverse))
            noise[:n] = np.where(z > OUTLIER, np.maximum(noise[:n], (left_out / OUTLIER) ** 2), noise[:n])
        self._root = np.linalg.cholesky(kernel + np.diag(noise))
        self._white = solve_triangular(self._root, self._residuals, lower=True)

    def _shared(self, keys: Array, shares: Array) -> Array:
        """Covariance of runs of these keys and shares with all observations."""
        found = np.zeros((len(keys), len(self._keys)))
        for level, (parts, whole) in enumerate(zip(self._parts, self._whole, strict=True)):
            same = (keys[:, level, None] == self._keys[None, :, level]) & (keys[:, level, None] >= 0)
            if same.any():
                found += same * ((shares * parts) @ self._shares.T + whole)
        return found

    @ONE_THREAD
    def and_then(self, more: Sequence[Observation]) -> Effects:
        """What these observations and `more` show; which of those are outliers is not judged."""
        new, n = copy(self), len(self.observations)
        if not n:
            return Effects([*more], self.sizes, settled=0)
        new._shifts = {}
        new.observations, new._ids = [*self.observations, *more], [dict(ids) for ids in self._ids]
        keys = np.array([new._numbered(o.keys) for o in more], int).reshape(len(more), len(self._ids))
        shares = np.array([o.shares for o in more]).reshape(len(more), self._shares.shape[1])
        residuals = np.array([o.residual for o in more])
        new._keys, new._shares = np.vstack([self._keys, keys]), np.vstack([self._shares, shares])
        new._residuals = np.concatenate([self._residuals, residuals])
        shared = new._shared(keys, shares)
        beside = solve_triangular(self._root, shared[:, :n].T, lower=True).T
        corner = np.linalg.cholesky(shared[:, n:] + np.diag([o.noise**2 for o in more]) - beside @ beside.T)
        new._root = np.block([[self._root, np.zeros((n, len(more)))], [beside, corner]])
        white = solve_triangular(corner, residuals - beside @ self._white, lower=True)
        new._white = np.concatenate([self._white, white])
        return new

    def shift(self, keys: Sequence[Hashable]) -> Shift:
        """What the observations say of a job with these keys, which do not hold its batch, length or rank."""
        key = tuple(keys)
        if key not in self._shifts:
            self._shifts[key] = self._shift(key)
        return self._shifts[key]

    @ONE_THREAD
    def _shift(self, keys: Sequence[Hashable]) -> Shift:
        has = np.array([key is not None for key in keys])  # one that a job does not have moves nothing
        prior = np.diag([*self._parts[has].sum(axis=0), self._whole[has].sum()])
        if not self.observations:
            return Shift(np.zeros(len(prior)), prior, np.zeros(0))
        ids = [-2 if key is None else known.get(key, -2) for key, known in zip(keys, self._ids, strict=True)]
        same = self._keys == np.array(ids)  # (observations, levels)
        across = np.column_stack([(same @ self._parts) * self._shares, same @ self._whole])
        white = solve_triangular(self._root, across, lower=True)
        mean = white.T @ self._white
        covariance = prior - white.T @ white
        related = same @ (self._parts.mean(axis=1) + self._whole) / (self._parts.mean(axis=1) + self._whole).sum()
        return Shift(mean, covariance, related)
