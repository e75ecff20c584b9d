"""Numbers as people read them: seconds, bytes, shares."""

from __future__ import annotations

import math


def duration(seconds: float | None) -> str:
    """`25 s`, `12:04 min`, `3:25 h`; `–` for null."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else seconds / 60
    if seconds < 3600:
        return f"{int(minutes)}:{int(seconds % 60):02} min"
    return f"{int(minutes) // 60}:{int(minutes) % 60:02} h"


def size(count: float | None) -> str:
    """Bytes with a binary unit; `–` for null."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def percent(share: float) -> str:
    """A share as a percentage without a sign: 0.745 is `74.5`."""
    return f"{100 * share:.1f}"


def clock(seconds: float) -> str:
    """Slurm's D-HH:MM:SS or HH:MM:SS."""
    days, rest = divmod(round(seconds), 86_400)
    text = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{text}" if days else text
