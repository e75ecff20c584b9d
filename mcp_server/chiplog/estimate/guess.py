"""A number that is not sure: what is thought of it, and any quantile of what it may turn out to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from chiplog.estimate.model import BASES, COVERAGE, NAMED, Basis, Estimate

STEPS = 30  # of bisection: shares to a billionth
LARGEST_LOG = 700.0  # of which a float has the exponential


class Guess(NamedTuple):
    """What is thought of a number, and where that comes from."""

    value: float
    quantile: Callable[[float], float]  # by share between 0 and 1; it never falls
    basis: Basis
    evidence: tuple[str, ...] = ()  # the runs, the nearest first
    assumed: tuple[str, ...] = ()
    coverage: float | None = None  # share of the intervals that hold, where that was measured

    def times(self, factor: float) -> Guess:
        """Of so many of it."""
        return self._replace(value=self.value * factor, quantile=lambda share: self.quantile(share) * factor)

    def above(self, least: float, why: str) -> Guess:
        """Where it is known to be more than `least`."""
        return self._replace(
            value=max(self.value, least),
            quantile=lambda share: max(self.quantile(share), least),
            assumed=(*self.assumed, why),
        )

    def risk(self, limit: float) -> float:
        """Chance that it exceeds `limit`."""
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.quantile(middle) <= limit else (low, middle)
        return 1 - low

    def estimate(self) -> Estimate:
        """As it is shown."""
        return Estimate(
            value=self.value,
            low=self.quantile((1 - COVERAGE) / 2),
            high=self.quantile((1 + COVERAGE) / 2),
            coverage=self.coverage,
            basis=self.basis,
            evidence=list(self.evidence[:NAMED]),
            n_evidence=len(self.evidence),
            assumed=list(self.assumed),
        )


def spread_about(centre: float, spread: float, score: Callable[[float], float]) -> Callable[[float], float]:
    """Quantiles of a number whose logarithm lies `spread` times a score of known quantiles from that of `centre`."""
    return lambda share: centre * math.exp(min(score(share) * spread, LARGEST_LOG))


def total(guesses: Sequence[Guess]) -> Guess:
    """Of their sum. What makes one of them long makes all long: a slow node, a busy disk; so quantiles add up."""
    names = tuple(dict.fromkeys(name for guess in guesses for name in guess.evidence))
    return Guess(
        value=sum(guess.value for guess in guesses),
        quantile=lambda share: sum(guess.quantile(share) for guess in guesses),
        basis=BASES[max(BASES.index(guess.basis) for guess in guesses)],
        evidence=names,
        assumed=tuple(dict.fromkeys(text for guess in guesses for text in guess.assumed)),
        coverage=guesses[0].coverage if len({guess.coverage for guess in guesses}) == 1 else None,
    )
