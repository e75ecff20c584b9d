"""Arms of trainings compared by their validation loss: over seeds alone, since nothing else repeats there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from chiplog.compare import ALPHA, Comparison, Difference, holm, over_seeds

MOST_ARMS = 12  # of more, 66 pairs and up, Holm's adjustment leaves nothing to be shown: what varies wants a fit


def compare_losses(
    metric: str, pairs: Sequence[tuple[str, str]], arms: Mapping[str, Sequence[float]], diverged: Collection[str]
) -> list[Comparison]:
    """Each pair by Welch's t over the losses of its seeds, p after Holm's adjustment for those that could be tested.

    Of an arm of which a seed `diverged`, the others would be the lucky ones: it is not tested.
    """
    tested: list[tuple[str, str, Difference | str]] = []
    for one, other in pairs:
        lost = [arm for arm in (one, other) if arm in diverged]
        found = f"a seed of {' and of '.join(lost)} diverged" if lost else _tested(arms[one], arms[other])
        tested.append((one, other, found))
    adjusted = iter(holm([found.p for _, _, found in tested if isinstance(found, Difference)]))
    return [
        _comparison(metric, one, other, found, next(adjusted) if isinstance(found, Difference) else None)
        for one, other, found in tested
    ]


def _tested(one: Sequence[float], other: Sequence[float]) -> Difference | str:
    """The difference, or why it cannot be tested."""
    least = min(len(one), len(other))
    if least < 2:
        return "each was trained once" if max(len(one), len(other)) == 1 else "one of them was trained once"
    if len(set(one)) == 1 and len(set(other)) == 1:
        return "all seeds of each have the same loss, so that nothing tells how much seeds change"
    return over_seeds(one, other)


def _comparison(metric: str, one: str, other: str, found: Difference | str, p: float | None) -> Comparison:
    difference = found if isinstance(found, Difference) else None
    shown = p is not None and p < ALPHA
    if difference is None:
        words = f"{one} against {other}: not shown, since {found}"
    else:
        interval = difference.interval
        value, low, high = (f"{x:+.4g}" for x in (interval.value, interval.low, interval.high))
        verdict = f"{'shown' if shown else 'not shown'} over {difference.seeds} seeds (lower is better)"
        words = f"{one} against {other}: {metric} {value} ({low} to {high}), {verdict}"
    return Comparison(
        first=one, second=other, against_control=False, metric=metric, difference=difference, p_adjusted=p,
        shown=shown, words=words,
    )  # fmt: skip
