"""nvidia-smi's CSV, `--query-gpu=index,name,memory.used,... --format=csv`, alone or within a job's log.

Of a job it says only which cards it had and how much of them was held, by whomever.
"""

from __future__ import annotations

import re

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import LogReader, Span, pattern
from chiplog.ledger.units import size
from chiplog.record import State

HEADER = pattern(rb"^(?:[\w.\[\]% ]+, )*memory\.used \[Mi?B\](?:, [\w.\[\]% ]+)*$", b"memory.used [M")
ROW = pattern(rb"^[^,\n]{1,80}(?:, [^,\n]{0,80}){1,20}$", b", ")
UNIT = re.compile(r"\s*\[.*\]")


def sniff(head: bytes, tail: bytes) -> float:
    return 0.9 if HEADER.regex.match(head) else 0.0


def parse(log: LogReader) -> list[Draft]:
    draft = Draft(log.whole, "nvidia-smi")
    cards(draft, log.whole)
    draft.set("state", State.UNKNOWN)
    draft.set("reason", "it speaks of cards and of no job")
    return [draft]


def cards(draft: Draft, span: Span) -> None:
    """Notes the cards in such a table, and the most that was held of one."""
    header = span.first(HEADER)
    if not header:
        return
    names = [UNIT.sub("", name) for name in header.line.split(", ")]
    seen: set[str] = set()
    for found in span.after(header.end).near(ROW):
        cells = dict(zip(names, found.line.split(", "), strict=False))
        held = cells.get("memory.used", "")
        if len(found.line.split(", ")) != len(names) or not size(held):
            continue
        seen.add(cells.get("index") or cells.get("uuid") or cells.get("pci.bus_id") or "")
        draft.default("device", cells.get("name"), found)
        if draft.get("mem_kind") in (None, "whole_card"):
            draft.peak(held, "whole_card", found)
    if "" not in seen and seen:
        draft.default("gpus", len(seen), header)
