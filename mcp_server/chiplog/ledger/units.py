"""Numbers as logs print them: sizes, durations, counts, rates."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime

UNITS = {
    "": 1, "b": 1, "bytes": 1, "byte": 1,
    "k": 2**10, "kb": 10**3, "kib": 2**10, "m": 2**20, "mb": 10**6, "mib": 2**20,
    "g": 2**30, "gb": 10**9, "gib": 2**30, "t": 2**40, "tb": 10**12, "tib": 2**40,
}  # fmt: skip
DURATIONS = {"ms": 0.001, "m": 60, "h": 3600, "s": 1}
LARGEST = 2**62  # no count is
COUNTS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SIZE = re.compile(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([A-Za-z]*)\s*")
_COUNT = re.compile(r"([\d.]+)([kKMGBT]?)")
_CLOCK = re.compile(r"(?:(\d+)(?:-| ?days?, *| ?d *))?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")


def size(text: str, binary: bool = False) -> float | None:
    """Bytes of `2.41 GiB`, `512MB`; with `binary`, MB and GB stand for MiB and GiB, as torch and CUDA print them."""
    match = _SIZE.fullmatch(text.replace(",", ""))
    unit = match.group(2).lower() if match else "?"
    if not match or unit not in UNITS:
        return None
    value = number(match.group(1))
    factor = UNITS[unit[0] + "ib"] if binary and len(unit) == 2 and unit[1] == "b" else UNITS[unit]
    return None if value is None else value * factor


def number(text: str | None) -> float | None:
    """A number, `nan` and `inf` too; null for what is none."""
    try:
        return None if text is None else float(text.replace(",", "").replace("_", ""))
    except ValueError:
        return None


def whole(text: str | None) -> int | None:
    """A whole number, with or without commas; `1.5k` is 1500."""
    match = _COUNT.fullmatch((text or "").replace(",", ""))
    value = number(match.group(1)) if match else None
    value = None if value is None or not match else value * COUNTS[match.group(2)]
    return None if value is None or not value < LARGEST else round(value)


def seconds(text: str | None) -> float | None:
    """Seconds of `1-02:03:04`, `01:55`, `0:01:55.20`, `1 day, 2:03:04`; null for what is none."""
    match = _CLOCK.fullmatch((text or "").strip())
    if not match:
        return None
    days, hours, minutes, rest = (float(part) if part else 0.0 for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def duration(text: str | None) -> float | None:
    """Seconds of a clock, `1:02:03`, or of words, `38.57 seconds`, `2.5 h`, `1440 ms`; null for what is none."""
    if not text or ":" in text:
        return seconds(text)
    match = re.fullmatch(r"([\d.]+) ?([a-z]*)", text.strip().lower())
    value = number(match.group(1)) if match else None
    factor = next((f for unit, f in DURATIONS.items() if match and match.group(2).startswith(unit)), 1)
    return None if value is None else value * factor


_STAMP = re.compile(r"((?:\d\d)?\d\d-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?")


def stamp(text: str) -> datetime | None:
    """The first time in a line, ISO 8601 or as `logging` writes it."""
    match = _STAMP.search(text)
    with suppress(ValueError):
        return (
            datetime.fromisoformat(f"{match[1]:0>10}T{match[2]}.{(match[3] or '0').ljust(6, '0')}") if match else None
        )
    return None
