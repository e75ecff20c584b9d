"""A table of runs, read by the names of its columns as people write them: what a law is fitted to.

Needs a header with N, loss, and D or C_flops; used_in_fit, run and decayed may be there. Capitals and spaces around
names do not matter, cells are separated by commas, semicolons or tabs, and lines that begin with # are remarks.
"""

from __future__ import annotations

import csv
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.job import UserError

NEEDED = 6  # points: one more than parameters
NAMES = {name.lower(): name for name in ("N", "D", "C_flops", "loss", "used_in_fit", "run", "decayed")}
SEPARATORS = (",", ";", "\t")
YES, NO = ("1", "true", "yes", "y", "t"), ("0", "false", "no", "n", "f")
APART = math.log(1.2)  # of C and 6ND: by more, they contradict each other
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """What is fitted, "point" each, and what was left out."""

    n: Array
    d: Array
    loss: Array
    run: list[str]
    undecayed: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A row of the table, its cells by the names of NAMES, and where it stands."""

    file: Path
    number: int
    cells: dict[str, str]

    def number_of(self, name: str) -> float:
        """A positive number. Raises UserError."""
        text = self.cells.get(name, "")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and value > 0:
            return value
        raise self._wrong(name, "give a number above 0")

    def tokens(self, n: float) -> float:
        """D where C_flops stands for it. Raises UserError."""
        d = self.number_of("C_flops") / 6 / n
        if 0 < d < math.inf:
            return d
        raise self._wrong("C_flops", f"D = C_flops / 6N is {d} there: give a D that is a number above 0")

    @property
    def loss(self) -> float | None:
        """Null for one that is none, as a run leaves that diverged or was never validated. Raises UserError."""
        text = self.cells["loss"].lower()
        try:
            none = text in ("", "none", "null") or not math.isfinite(float(text))
        except ValueError:
            none = False
        return None if none else self.number_of("loss")

    def flag(self, name: str) -> bool:
        """Yes where nothing is said. Raises UserError."""
        text = self.cells.get(name, "").lower()
        with suppress(ValueError):
            text = f"{float(text):g}"  # 1.0, as pandas writes it
        if text in ("", *YES):
            return True
        if text in NO:
            return False
        raise self._wrong(name, "give 1 or 0")

    def _wrong(self, name: str, advice: str) -> UserError:
        return UserError(f"{self.file} line {self.number}: {name} is {self.cells.get(name, '')!r}; {advice}")


def read_points(file: Path, *, use_all: bool = False, drop_largest: int = 0) -> Points:
    """The rows of a table. Raises UserError for one that is no table, lacks a column or has a wrong number."""
    lines = _lines(file)
    left_out = {"used_in_fit is 0": 0, "no loss": 0, "the largest losses": 0}
    kept: list[tuple[float, float, float, str, bool]] = []
    apart, alone = 0, {}  # the first row of equal ones without a run is the run of all
    for line in lines:
        if not line.flag("used_in_fit") and not use_all:
            left_out["used_in_fit is 0"] += 1
            continue
        loss = line.loss
        if loss is None:
            left_out["no loss"] += 1
            continue
        n = line.number_of("N")
        d = line.number_of("D") if line.cells.get("D") else line.tokens(n)
        if line.cells.get("D") and line.cells.get("C_flops"):
            apart += abs(math.log(line.number_of("C_flops")) - math.log(6) - math.log(n) - math.log(d)) > APART
        run = line.cells.get("run") or alone.setdefault((n, d, loss), str(line.number))
        kept.append((n, d, loss, run, line.flag("decayed")))
    if drop_largest:
        kept = sorted(kept, key=lambda point: point[2])[: max(0, len(kept) - drop_largest)]
        left_out["the largest losses"] = drop_largest
    if len(kept) < NEEDED:
        raise UserError(f"{file} leaves {len(kept)} points, and a law of 5 parameters needs {NEEDED}: add runs")
    n, d, loss = (np.array([point[i] for point in kept], dtype=float) for i in range(3))
    undecayed = sum(not point[4] for point in kept)
    notes = [f"In {apart} rows C_flops is not 6ND; D was used there."] if apart else []
    if repeats := len(kept) - len({point[:4] for point in kept}):
        notes.append(f"{repeats} rows repeat others: each counts once in the intervals.")
    left_out = {why: number for why, number in left_out.items() if number}
    return Points(n, d, loss, [point[3] for point in kept], undecayed, left_out, notes)


def _lines(file: Path) -> list[Line]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if "\0" in text:
        raise UserError(f"{file} holds NUL bytes, as a file does that was cut off as it was written: make it again")
    physical = ["" if line.lstrip().startswith("#") else line for line in text.splitlines()]
    first = next((line for line in physical if line.strip()), "")
    reader = csv.reader(physical, delimiter=max(SEPARATORS, key=first.count), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num} is not CSV: {error}") from error
    if len(rows) < 2:
        raise UserError(f"{file} has no rows below its header: there is nothing to fit")
    (_, header), *body = rows
    names = _names(file, header)
    lines = []
    for number, cells in body:
        if len(cells) > len(header):
            raise UserError(f"{file} line {number} has {len(cells)} cells, and the header {len(header)}: mend it")
        filled = cells + [""] * (len(header) - len(cells))
        lines.append(Line(file, number, {name: filled[i] for name, i in names.items()}))
    return lines


def _names(file: Path, header: list[str]) -> dict[str, int]:
    """Where each known column is. Raises UserError for one that is missing, or there twice."""
    found: dict[str, int] = {}
    for place, written in enumerate(header):
        name = NAMES.get(written.lower())
        if name is None:
            continue
        if name in found and (written == name) == (header[found[name]] == name):
            raise UserError(f"{file} has two columns {name}: remove one, or give it another name")
        if name not in found or written == name:  # written so exactly, it goes before one that only looks like it
            found[name] = place
    if missing := [name for name in ("N", "loss") if name not in found] or ["D"] * (
        not found.keys() & {"D", "C_flops"}
    ):
        raise UserError(
            f"{file} has the columns {', '.join(header)}: it needs N, loss, and D or C_flops; {missing[0]} is missing"
        )
    return found
