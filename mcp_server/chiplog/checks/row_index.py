"""Which rows of a data set repeat, leak from split to split, or answer one input in two ways.

Digests go into an SQLite database in a temporary file, so that memory stays bounded however large the data set.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import NamedTuple

# The first row of each content in its split, and how many rows have it.
_FIRSTS = """
CREATE TABLE firsts AS
SELECT split, content, input, MIN(row) AS row, COUNT(*) AS n FROM rows GROUP BY split, content
"""
# In both, a column beside MIN(b.row) comes from the row that has the smallest: SQLite's own rule for one MIN.
_REPEATS = """
SELECT a.split, a.row, b.split, MIN(b.row), COUNT(*) FROM firsts a JOIN rows b USING (split, content)
WHERE a.n > 1 AND b.row > a.row GROUP BY a.split ORDER BY a.split
"""
_LEAKS = """
SELECT a.split, a.row, b.split, MIN(b.row), SUM(b.n) FROM firsts a JOIN firsts b USING (content)
WHERE a.split < b.split GROUP BY a.split, b.split ORDER BY a.split, b.split
"""
_TWO_ANSWERS = """
CREATE TABLE two_answers AS
SELECT input FROM firsts WHERE input IS NOT NULL GROUP BY input HAVING MIN(content) < MAX(content)
"""
BATCH_ROWS = 1_000


class Place(NamedTuple):
    """A row, counted from 1."""

    split: str
    row: int

    def __str__(self) -> str:
        return f"{self.split} row {self.row:,}"


class Pair(NamedTuple):
    """How many there are of a kind, and the first of them: two rows."""

    n: int
    earlier: Place
    later: Place


class Comparison(NamedTuple):
    """What the rows of a data set have in common."""

    repeats: list[Pair]  # rows that equal an earlier one of their split: one Pair a split that has any
    leaks: list[Pair]  # rows that stand in an earlier split too: one Pair for two splits that share any
    two_answers: Pair | None  # inputs with more than one answer


class RowIndex:
    """Rows as digests. It is a context, and its file goes when it ends."""

    def __init__(self) -> None:
        self._splits: list[str] = []
        self._waiting: list[tuple[int, int, bytes, bytes | None]] = []
        self._db = sqlite3.connect("", isolation_level=None)  # "" is a temporary file, which SQLite removes

    def __enter__(self) -> RowIndex:
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("BEGIN")
        self._db.execute("CREATE TABLE rows (split INTEGER, row INTEGER, content BLOB, input BLOB)")
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, place: Place, content: str, asked: str | None) -> None:
        """Remembers a row: all of it that a model sees, and what it asks (None where it asks nothing)."""
        if place.split not in self._splits:
            self._splits.append(place.split)
        digests = _digest(content), _digest(asked) if asked else None
        self._waiting.append((self._splits.index(place.split), place.row, *digests))
        if len(self._waiting) >= BATCH_ROWS:
            self._write()

    def compare(self) -> Comparison:
        """Compares all rows; to be called once, after the last `add`."""
        self._write()
        self._db.execute(_FIRSTS)
        self._db.execute(_TWO_ANSWERS)
        return Comparison(self._pairs(_REPEATS), self._pairs(_LEAKS), self._two_answers())

    def _write(self) -> None:
        self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", self._waiting)
        self._waiting.clear()

    def _pairs(self, query: str) -> list[Pair]:
        return [Pair(n, self._place(a, i), self._place(b, j)) for a, i, b, j, n in self._db.execute(query)]

    def _two_answers(self) -> Pair | None:
        (n,) = self._db.execute("SELECT COUNT(*) FROM two_answers").fetchone()
        if not n:
            return None
        first = "SELECT split, row, input, content FROM firsts WHERE input IN two_answers ORDER BY split, row LIMIT 1"
        split, row, asked, content = self._db.execute(first).fetchone()
        second = "SELECT split, row FROM firsts WHERE input = ? AND content <> ? ORDER BY split, row LIMIT 1"
        return Pair(n, self._place(split, row), self._place(*self._db.execute(second, (asked, content)).fetchone()))

    def _place(self, split: int, row: int) -> Place:
        return Place(self._splits[split], row)


def _digest(text: str) -> bytes:
    # 16 bytes: among 10^9 rows, the chance of a false match is below 10^-20
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
