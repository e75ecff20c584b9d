"""The largest batch that fits: from peaks on record of the same configuration, and the micro-batches that keep a batch.

Memory is affine in the batch, never proportional, and convex, since the peak is the largest of several moments. So a
line is laid through the largest batches on record, never flatter than between the last two, and what lies above it by
the interval of a new observation is taken for possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

CONFIDENCE = 0.95  # one-sided
LEAST_SPREAD = 0.01  # of the largest peak: what repeated runs differ by
POINTS = 6  # of the largest batches
NO_LINE = 0.1  # of the largest peak: peaks that lie off their line by more have other causes than the batch
FURTHEST, FURTHEST_OF_TWO = 3.0, 1.5  # times the largest batch on record
ROUND = 8  # batches beyond twice this are multiples of it


def upper_peak(known: Sequence[tuple[int, float]], batch: int) -> float:
    """Bytes that a batch will hardly exceed, from two or more (batch, bytes) on record of different batches.

    Infinite where those do not follow a line.
    """
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    kept = sorted({x for x, _ in known})[-POINTS:]
    points = sorted(point for point in known if point[0] in kept)
    xs, ys = [float(x) for x, _ in points], [y for _, y in points]
    n, x_mean, y_mean = len(points), fmean(xs), fmean(ys)
    spread_x = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread_x
    at = y_mean + slope * (batch - x_mean)
    before = max((i for i in range(n) if xs[i] < xs[-1]), default=0)
    last = ys[-1] + max(slope, (ys[-1] - ys[before]) / (xs[-1] - xs[before])) * (batch - xs[-1])
    freedom = max(n - 2, 1) + 1  # one for the spread that is known before
    squares = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = math.sqrt((squares + (LEAST_SPREAD * max(ys)) ** 2) / freedom) if n > 2 else LEAST_SPREAD * max(ys)
    if n > 2 and math.sqrt(squares / (n - 2)) > NO_LINE * max(ys):
        return math.inf
    t = float(stdtrit(freedom, CONFIDENCE))
    return max(at, last) + t * spread * math.sqrt(1 / n + (batch - x_mean) ** 2 / spread_x)


def largest_batch(known: Sequence[tuple[int, float]], limit: float) -> int | None:
    """The largest batch that hardly exceeds `limit` bytes; None where no batch on record fits.

    A batch on record that fitted is always taken. Far beyond what is on record nothing is claimed.
    """
    fitted = [batch for batch, peak in known if peak <= limit]
    if not fitted:
        return None
    best, n = max(fitted), len({batch for batch, _ in known})
    if n < 2 or best < max(batch for batch, _ in known):
        return best
    step = 1 if best < 2 * ROUND else ROUND
    furthest = best * (FURTHEST if n > 2 else FURTHEST_OF_TWO)
    batch = best
    while (following := (batch // step + 1) * step) <= furthest and upper_peak(known, following) <= limit:
        batch = following
    return batch


def micro_batches(batch_size: int, largest: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of exactly `batch_size` samples a step, with the largest micro-batch that fits."""
    micro = max(size for size in range(1, min(batch_size, largest) + 1) if batch_size % size == 0)
    return micro, batch_size // micro
