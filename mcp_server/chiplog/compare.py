"""Is a difference shown? Exact intervals for one arm, paired tests for two; pure functions of scores.

Two arms answer the same items, so their answers are compared item by item. Replicates (seeds) must agree as well: a
difference that one training shows and another does not is not a property of the arm. (scipy.stats takes a second to
import, scipy.special a tenth of that.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from chiplog.schema import Frozen

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
ALPHA = 0.05  # p after Holm's adjustment below which a difference is shown


class Interval(Frozen):
    """A value between two ends."""

    value: float = Field(description="The estimate.")
    low: float = Field(description="Lower end.")
    high: float = Field(description="Upper end.")


class Difference(Frozen):
    """First arm less second: of their shares over the same items, or of their mean losses."""

    interval: Interval = Field(description="The difference, with its 95 % interval.")
    p: float = Field(description="Chance of a difference at least this large if the arms were equal.")
    seeds: int = Field(description="Replicates of the arm that has more of them.")


class Comparison(Frozen):
    """Two arms over the same items, or of trainings that make their own models over their seeds."""

    first: str = Field(description="Arm that is compared.")
    second: str = Field(description="Arm or control that it is compared with.")
    against_control: bool = Field(description="Whether the second is the first one's base model.")
    metric: str = Field(description="Criterion.")
    difference: Difference | None = Field(description="First minus second; null if they cannot be compared.")
    p_adjusted: float | None = Field(description="p after Holm's adjustment.")
    shown: bool = Field(description="Whether the difference is shown.")
    words: str = Field(description="The conclusion in one line.")


def proportion(count: int, n: int) -> Interval:
    """Share of `count` in `n` with the exact (Clopper-Pearson) 95 % interval; n of 0 says nothing: 0 to 1."""
    if n == 0:
        return Interval(value=math.nan, low=0.0, high=1.0)
    from scipy.special import betaincinv

    low = betaincinv(count, n - count + 1, (1 - LEVEL) / 2) if count else 0.0
    high = betaincinv(count + 1, n - count, (1 + LEVEL) / 2) if count < n else 1.0
    return Interval(value=count / n, low=float(low), high=float(high))


def paired(
    first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]], *, against_control: bool = False
) -> Difference:
    """Compares two arms; each is a list over seeds of a list over items, the same items in the same order.

    Over items: the exact sign test on per-item means (with one seed each: McNemar's exact test), and the interval of
    Bonett and Price (2012), which adds one item to either side. Over seeds, where an arm has several: Welch's t on
    the per-seed shares. The larger p and the wider interval count. `against_control`: the second was not trained.
    """
    import numpy as np
    from scipy.special import bdtr, ndtri

    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    assert one.ndim == other.ndim == 2 and one.shape[1] == other.shape[1] > 0
    items = one.mean(axis=0) - other.mean(axis=0)
    mean = float(items.mean())
    better, worse = int((items > 0).sum()), int((items < 0).sum())
    p = min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))
    padded = np.append(items, [1.0, -1.0])
    half = (
        float(ndtri((1 + LEVEL) / 2)) * float(np.sqrt((padded**2).mean() - padded.mean() ** 2)) / math.sqrt(len(padded))
    )
    low, high = float(padded.mean()) - half, float(padded.mean()) + half
    shares = one.mean(axis=1), other.mean(axis=1)
    seeds = max(len(shares[0]), len(shares[1]))
    if seeds > 1:
        p_seeds, seed_low, seed_high = _over_seeds(*shares, against_control)
        p, low, high = max(p, p_seeds), min(low, seed_low), max(high, seed_high)
    return Difference(interval=Interval(value=mean, low=max(low, -1.0), high=min(high, 1.0)), p=p, seeds=seeds)


def over_seeds(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compares two arms by one figure a seed, Welch's t alone; each has two seeds or more that are not all equal."""
    import numpy as np

    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    p, low, high = _over_seeds(one, other, against_control=False)
    value = float(one.mean() - other.mean())
    return Difference(interval=Interval(value=value, low=low, high=high), p=p, seeds=max(len(one), len(other)))


def _over_seeds(one: np.ndarray, other: np.ndarray, against_control: bool) -> tuple[float, float, float]:
    """p and interval of the difference of mean shares. A control has no seeds and does not vary; another arm of which
    one training is left is taken to vary as its counterpart does (Crawford and Howell 1998).
    """
    from scipy.special import stdtr, stdtrit

    counts = len(one), len(other)
    spreads = [float(arm.var(ddof=1)) if len(arm) > 1 else 0.0 for arm in (one, other)]
    if 1 in counts and not against_control:
        spreads = [max(spreads)] * 2
    variances = [spread / n for spread, n in zip(spreads, counts, strict=True)]
    difference, error = float(one.mean() - other.mean()), math.sqrt(sum(variances))
    if error == 0.0:  # the seeds agree to the item: they add no doubt, and the items alone decide
        return 0.0, difference, difference
    if 1 in counts:
        freedom = max(counts) - 1
    else:  # Welch-Satterthwaite
        freedom = sum(variances) ** 2 / sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True))
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    return 2 * float(stdtr(freedom, -abs(difference) / error)), difference - half, difference + half


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted
