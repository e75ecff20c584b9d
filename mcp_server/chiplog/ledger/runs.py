"""What several parsers do alike: choosing the bar that trains, and figures from it."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence

from chiplog.ledger.bars import Bar
from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import Pattern, Span, pattern
from chiplog.ledger.units import number

OTHER_WORK = re.compile(
    r"(?i)\b(?:map|filter|flatten|download|load|fetch|generat|tokeniz|sav|eval|valid|test|sanity|predict|prepar|"
    r"process|convert|cast|pack|creat|extract|upload|writing|merg|resolv|shard|sampl|infer|comput|calibrat|quantiz|"
    r"pre-?load|dataset|(?!(?:pre-?)?train|fine|fit|learn|tun|runn|epoch)\w{3,}ing\b)"
)
OWN_WORK = re.compile(r"(?i)\b(?:train|epoch|step|iter|fit)")
EPOCH_LABEL = re.compile(
    r"(?i)(?:\bepoch:? *\[? *|^(?P<card>)(?=\d+/\d+ +[\d.]+G ))(?P<epoch>\d+)(?: *(?:/|of) *(?P<epochs>\d+))?"
)
EXAMPLES = re.compile(r"(?i)^(?:examples?|[kMG]?i?B|files?|shards?|tables?|rows?|samples?)/s")
WARM_UP = 0.1
LEAP = 10  # steps, and states of a bar, from which a leap is one


def training_bars(bars: Sequence[Bar], planned: int | None = None) -> list[Bar]:
    """Of all bars those of the training loop: of the planned length, else named so, else the longest in time."""
    groups: dict[tuple[str, int | None], list[Bar]] = defaultdict(list)
    for one in bars:
        unit = one.found.get("unit") or ""
        if not EXAMPLES.match(unit) and not OTHER_WORK.search(one.label):
            groups[re.sub(r"-?[\d/.,]+", "#", one.label), one.total].append(one)
    if not groups:
        return []

    def rank(key: tuple[str, int | None]) -> tuple[bool, bool, float]:
        label, total = key
        own = bool(OWN_WORK.search(label))
        return planned is not None and total == planned, own, max(one.elapsed_s or 0.0 for one in groups[key])

    label, total = max(groups, key=rank)
    totals = [other for name, other in groups if name == label and other]
    if total is None and len(totals) == 1:  # tqdm draws no total for what comes after it
        return [*groups[label, totals[0]], *groups[label, None]]
    return groups[label, total]


def trains(one: Bar) -> bool:
    """Whether a bar says that it is the training's, by its label or by a loss."""
    return "loss" in one.after.lower() or bool(OWN_WORK.search(one.label) and not OTHER_WORK.search(one.label))


def take_bars(draft: Draft, bars: Sequence[Bar]) -> None:
    """Steps, planned steps, seconds and speed of a bar that counts optimiser steps, of a run or of an epoch."""
    if not bars:
        return
    last = bars[-1]
    epoch = EPOCH_LABEL.search(last.label)
    draft.per_epoch = epoch is not None
    draft.worked(last.found)
    if epoch and last.total:
        _take_epochs(draft, bars, last, epoch)
    else:
        draft.default("steps", last.done, last.found)
        draft.default("steps_planned", last.total or bars[0].total, last.found)
    timed = [one for one in bars if one.elapsed_s is not None]
    if not timed:
        return
    last = timed[-1]
    if not last.done:
        return
    if not epoch or draft.get("steps") == last.done:  # the bars of earlier epochs counted their own seconds
        draft.default("train_s", last.elapsed_s, last.found)
    first_done = timed[0].done if timed[0].elapsed_s == 0 else 0
    draft.default("resumed_from", _skipped(timed) or (first_done if first_done < last.done else 0))
    if not _began_late(timed):
        take_speed(draft, last.done - (0 if epoch else draft.get("resumed_from") or 0), last.elapsed_s)
    steady(draft, timed)


def _take_epochs(draft: Draft, bars: Sequence[Bar], last: Bar, label: re.Match[str]) -> None:
    """Steps over all epochs, of a bar whose label counts them from 0 or from 1."""
    first = EPOCH_LABEL.search(bars[0].label)
    from_0 = first is not None and int(first["epoch"]) == 0
    epoch, epochs, total = int(label["epoch"]), label["epochs"], last.total or 0
    draft.default("epoch", float(epoch), last.found)
    if label["card"] is not None:  # ultralytics counts from 0 or from 1, as its version does
        draft.default("epochs", int(epochs), last.found)
        return
    draft.default("steps", (epoch - (0 if from_0 else 1)) * total + last.done, last.found)
    if epochs:
        draft.default("epochs", int(epochs), last.found)
        draft.default("steps_planned", int(epochs) * total, last.found)
        draft.per_epoch = epoch < int(epochs) - (1 if from_0 else 0)
    elif draft.get("steps") == last.done:
        draft.default("steps_planned", last.total, last.found)


def _skipped(timed: Sequence[Bar]) -> int | None:
    """Steps that a resumed run only counted: its bar leaps from 0 far faster than it goes on."""
    if len(timed) < LEAP or timed[0].done:
        return None
    leap, last = timed[1], timed[-1]
    passed = (last.elapsed_s or 0.0) - (leap.elapsed_s or 0.0)
    pace = (last.done - leap.done) / passed if passed > 0 else None
    fast = pace and leap.done > 20 * pace * max(leap.elapsed_s or 0.0, 1.0)
    return leap.done - 1 if fast and leap.done > LEAP else None


def _began_late(timed: Sequence[Bar]) -> bool:
    """Whether a bar counted from a step above 0 that the log does not show: far faster at first than it says."""
    first, last = timed[0], timed[-1]
    if not first.elapsed_s or not first.per_s or first.done <= 0.5 * last.done:
        return False
    early = first.done / first.elapsed_s > 3 * first.per_s
    return early and bool(last.elapsed_s and last.per_s and last.done / last.elapsed_s > 1.3 * last.per_s)


def take_speed(draft: Draft, steps: float, seconds: float | None) -> None:
    """Mean steps a second of this run."""
    if seconds and steps > 0:
        draft.default("mean_steps_per_s", steps / seconds)


def steady(draft: Draft, bars: Sequence[Bar]) -> None:
    """Median speed between states of a bar after the first tenth of the steps."""
    rates = [
        (later.done - one.done) / (later.elapsed_s - one.elapsed_s)
        for one, later in itertools.pairwise(bars)
        if one.elapsed_s is not None
        and later.elapsed_s is not None
        and later.done > one.done
        and later.elapsed_s - one.elapsed_s >= 1
        and one.done >= WARM_UP * (later.total or bars[-1].done)
    ]
    if len(rates) >= 3:
        draft.default("steps_per_s", statistics.median(rates))


def take_losses(draft: Draft, span: Span, wanted: Pattern) -> None:
    """First and last loss; the pattern's group is `loss`."""
    if first := span.first(wanted, far=True):
        draft.set("loss_first", number(first["loss"]), first)
    if last := span.last(wanted, far=True):
        draft.set("loss_last", number(last["loss"]), last)
        draft.worked(last)


WORK = [
    pattern(rb"\d+%\|[^|\n]*\| *[1-9][\d.]*[kM]?/", b"%|"),
    pattern(rb"(?i:loss)[\"']?[=: ]+[\"']?[\d.]", b"oss"),
    pattern(rb"Traceback \(most recent call last\):", b"Traceback (most"),
]


def distinct(span: Span, starts: Sequence[int]) -> list[int]:
    """Of the places where a run is announced, those before which another one did or lost something.

    Every rank may announce the same run.
    """
    kept: list[int] = []
    for start in starts:
        between = Span(span.log, kept[-1], start) if kept else None
        if between is None or any(between.last(sign) for sign in WORK):
            kept.append(start)
    return kept
