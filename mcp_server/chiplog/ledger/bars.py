"""Progress bars as tqdm draws them: `12%|█▏ | 30/250 [00:14<01:39,  2.22it/s, loss=0.3]`, once a line after blanking.

Notebooks' bars lack the pipes, bars of an unknown length the total, and one that was cut off its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from chiplog.ledger.reader import EDGE, Found, Span, pattern
from chiplog.ledger.units import number, seconds, whole

_CLOCK = rb"(?:\d+ days?, *|\d+:)*\d+:\d\d"
BAR = pattern(
    rb"(?:(?P<percent>\d{1,3})%(?P<drawn>\|[^|\n]{0,600}\|)? *(?P<done>[\d.]+[kMGT]?)/(?P<total>[\d.]+[kMGT]?)"
    rb"|\b(?P<count>[\d.]+[kMGT]?)(?:it|step|batch|ba|ex)s?(?= *\[))"
    rb"(?: *\[(?P<elapsed>" + _CLOCK + rb")(?:<(?P<left>" + _CLOCK + rb"|\?)?)?"
    rb"(?:, *(?P<rate>[\d.]+|\?) *(?P<unit>[^\s,\]\d]+))?(?P<after>[^\]\n]{0,600}))?",
    b"%|",
    b" [",
)
FEW, EACH, ENDS = 64, 8, 3  # of fewer states none is passed over; of more, each 8th and the ends are not
RICH = pattern(  # as rich draws them
    rb"(?:\xe2\x94[\x80-\xbf]|\xe2\x95[\x80-\xbf]){4,400} *(?P<done>\d+)/(?P<total>\d+) +(?P<elapsed>\d+:\d\d:\d\d)"
    rb" \xe2\x80\xa2 (?P<left>[-:\d]+) +(?P<rate>[\d.]+)(?P<unit>it/s)(?P<after>[^\n]{0,600})",
    b"it/s",
)
LEAST = 1 << 14  # bytes at either end that are searched for bars first; then more, up to EDGE
LABEL = re.compile(r"^(?:\d+:|\[\S+\]:?|\([^)]*\))\s*")  # a rank's or an actor's own prefix


@dataclass(frozen=True, slots=True)
class Bar:
    """One state of a bar."""

    found: Found
    label: str  # what stands before it
    done: int
    total: int | None  # null: not known
    elapsed_s: float | None  # null: cut off
    per_s: float | None  # units a second, as shown
    after: str  # what stands after the rate

    @property
    def complete(self) -> bool:
        return self.total is not None and self.done >= self.total


def bar(found: Found) -> Bar | None:
    """The bar in a match of BAR."""
    total = whole(found.get("total"))
    done, elapsed = whole(found.get("done") or found.get("count")), seconds(found.get("elapsed"))
    if done is None or total == 0:
        return None
    if elapsed is None and (not total or not found.get("drawn") or abs(100 * done / total - int(found["percent"])) > 1):
        return None  # cut off so early that the total may be too
    rate, unit = number(found.get("rate")), found.get("unit") or ""
    per_s = None if not rate else 1 / rate if unit.startswith("s/") else rate if unit.endswith("/s") else None
    label = LABEL.sub("", found.before).strip(" :|")
    return Bar(found, label, done, total, elapsed, per_s, found.get("after") or "")


def bars(span: Span, wanted: Callable[[Bar], bool]) -> list[Bar]:
    """The bars at either end of a span: of so much as must be read until a wanted one stands near its end."""
    edge = LEAST
    while True:
        states = span.near(BAR, edge) or span.near(RICH, edge)
        found = [one for match in _thinned(states) if (one := bar(match))]
        if edge >= EDGE or 2 * edge >= len(span):
            return found
        if any(one.found.offset >= span.stop - edge and wanted(one) for one in reversed(found)):
            return found
        edge = min(4 * edge, EDGE)


def _thinned(states: list[Found]) -> list[Found]:
    """Of the states of one bar between its first and its last, each `EACH`th."""
    if len(states) < FEW:
        return states
    marks = [(state.get("total"), int(state.get("percent") or 0)) for state in states]
    kept = states[:ENDS]
    for at in range(ENDS, len(states) - ENDS):
        before, (total, percent), after = marks[at - 1 : at + 2]
        inside = before[0] == total == after[0] and before[1] <= percent <= after[1] and percent < 100
        if at % EACH == 0 or not inside:
            kept.append(states[at])
    return [*kept, *states[-ENDS:]]
