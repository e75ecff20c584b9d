"""Progress bars as tqdm draws them: `12%|█▏ | 30/250 [00:14<01:39,  2.22it/s, loss=0.3]`, once a line after blanking.

Notebooks' bars lack the pipes, bars of an unknown length the total, and one that was cut off its end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from chiplog.ledger.reader import Found, Span, pattern
from chiplog.ledger.units import number, seconds, whole

_CLOCK = rb"(?:\d+ days?, *|\d+:)*\d+:\d\d"
BAR = pattern(
    rb"(?:(?P<percent>\d{1,3})%(?:\|[^|\n]{0,600}\|)? *(?P<done>[\d.]+[kMGT]?)/(?P<total>[\d.]+[kMGT]?)"
    rb"|\b(?P<count>[\d.]+[kMGT]?)(?:it|step|batch|ba|ex)s?) *"
    rb"\[(?P<elapsed>" + _CLOCK + rb")(?:<(?P<left>" + _CLOCK + rb"|\?)?)?"
    rb"(?:, *(?P<rate>[\d.]+|\?) *(?P<unit>[^\s,\]\d]+))?(?P<after>[^\]\n]{0,600})",
    b" [",
)
CUT = pattern(  # cut off before its times
    rb"(?P<percent>\d{1,3})%\|[^|\n]{0,600}\| *(?P<done>\d[\d.]*[kMGT]?)/(?P<total>\d[\d.]*[kMGT]?)(?! *\[)", b"%|"
)
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
    if elapsed is None and (not total or abs(100 * done / total - int(found["percent"])) > 1):
        return None  # the total is cut off too
    rate, unit = number(found.get("rate")), found.get("unit") or ""
    per_s = None if not rate else 1 / rate if unit.startswith("s/") else rate if unit.endswith("/s") else None
    label = LABEL.sub("", found.before).strip(" :|")
    return Bar(found, label, done, total, elapsed, per_s, found.get("after") or "")


def bars(span: Span) -> list[Bar]:
    """All bars near either end of a span."""
    found = sorted([*span.near(BAR), *span.near(CUT)], key=lambda one: one.offset)
    return [one for match in found if (one := bar(match))]
