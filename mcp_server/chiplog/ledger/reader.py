"""One log file, read in pieces: its edges first, the middle only where somebody asks for all of it.

Bytes stay bytes, and a position is one in the file (of a gzip: in what it holds), so that every line can be shown as
evidence. What is for terminals only (colours, carriage returns, NULs) is blanked byte for byte.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import BinaryIO

from chiplog.errors import RecordError

EDGE = 1 << 19  # bytes at the start and at the end of a run that are searched for what stands there
BLOCK = 1 << 16
OVERLAP = 1 << 12  # no match is longer
LINE = 400  # characters of a line that are kept as evidence
CACHED = 24  # blocks: both edges of a run
GZIP = 31  # what zlib calls the format
LARGEST_GZIP = 1 << 31  # bytes that are unpacked of one

_ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[@-Z\\^_])")
_PLAIN = bytes.maketrans(b"\r\0\x08\x0b\x0c", b"\n    ")


@dataclass(frozen=True, slots=True)
class Pattern:
    """What to look for: a regular expression over bytes, and words of which one must be there for it to match."""

    regex: re.Pattern[bytes]
    hints: tuple[bytes, ...]
    folded: bool  # whether the words are sought in small letters


@cache
def pattern(regex: bytes, *hints: bytes) -> Pattern:
    """`^` and `$` are the ends of lines; a block without any of the hints is passed over.

    Where the expression ignores case, so do the hints, which then are in small letters.
    """
    folded = b"(?i" in regex
    assert not folded or all(hint == hint.lower() for hint in hints), regex
    return Pattern(re.compile(regex, re.MULTILINE), hints, folded)


@dataclass(frozen=True, slots=True)
class Found:
    """One match: where it begins, its named groups as text, its line, and what stands before it there."""

    offset: int
    groups: dict[str, str]
    line: str
    before: str = ""

    def __getitem__(self, name: str) -> str:
        return self.groups[name]

    def get(self, name: str) -> str | None:
        return self.groups.get(name)


class LogReader:
    """A log file from byte `start` on. Raises RecordError where it cannot be read."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        try:
            self.file = _opened(path)
            self.size = self.file.seek(0, 2)
        except (OSError, EOFError, zlib.error) as error:
            raise RecordError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        self.start = min(start, self.size)
        self._blocks: dict[int, bytes] = {}

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def head(self) -> bytes:
        """The first bytes from `start` on."""
        return self.text(self.start, self.start + BLOCK)

    @cached_property
    def tail(self) -> bytes:
        """The last bytes."""
        return self.text(max(self.start, self.size - BLOCK), self.size)

    @property
    def whole(self) -> Span:
        return Span(self, self.start, self.size)

    def text(self, start: int, stop: int) -> bytes:
        """These bytes, blanked of what is for terminals only."""
        start, stop = max(start, 0), min(stop, self.size)
        first = start // BLOCK
        blocks = b"".join(self._block(number) for number in range(first, -(-stop // BLOCK)))
        return blocks[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            while len(self._blocks) >= CACHED:
                del self._blocks[next(iter(self._blocks))]
            try:
                self.file.seek(number * BLOCK)
                read = self.file.read(BLOCK)
            except OSError as error:
                raise RecordError(f"{self.path} cannot be read: {error.strerror}") from error
            self._blocks[number] = _plain(read)
        return self._blocks[number]


class Span:
    """A part of a log, mostly one run."""

    def __init__(self, log: LogReader, start: int, stop: int) -> None:
        self.log, self.start, self.stop = log, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def before(self, stop: int) -> Span:
        return Span(self.log, self.start, min(self.stop, stop))

    def after(self, start: int) -> Span:
        return Span(self.log, max(self.start, start), self.stop)

    def first(self, wanted: Pattern, far: bool = False) -> Found | None:
        """The first match, near the start only unless `far`."""
        stop = self.stop if far else min(self.stop, self.start + EDGE)
        return next(self._forward(wanted, self.start, stop), None)

    def last(self, wanted: Pattern, far: bool = False) -> Found | None:
        """The last match, near the end only unless `far`."""
        least = self.start if far else max(self.start, self.stop - EDGE)
        stop = self.stop
        while stop > least:
            start = max(least, stop - BLOCK)
            if found := list(self._forward(wanted, start, stop)):
                return found[-1]
            stop = start
        return None

    def near(self, wanted: Pattern, edge: int = EDGE) -> list[Found]:
        """All matches in so many bytes at either end, in their order."""
        if len(self) <= 2 * edge:
            return list(self.all(wanted))
        early = self._forward(wanted, self.start, self.start + edge)
        return [*early, *self._forward(wanted, self.stop - edge, self.stop)]

    def all(self, wanted: Pattern) -> Iterator[Found]:
        """Every match; reads all of it."""
        return self._forward(wanted, self.start, self.stop)

    def has(self, wanted: Pattern) -> bool:
        return self.first(wanted) is not None or self.last(wanted) is not None

    def cut(self, starts: list[int]) -> list[Span]:
        """One span from each of these positions to the next; what stands before the first belongs to it."""
        if not starts:
            return [self]
        ends = [*starts[1:], self.stop]
        return [Span(self.log, start, end) for start, end in zip([self.start, *starts[1:]], ends, strict=True)]

    def _forward(self, wanted: Pattern, start: int, stop: int) -> Iterator[Found]:
        """Matches that begin in [start, stop), block by block; each block is searched with what follows it."""
        at, after = start, start
        while at < stop:
            end = min(at + BLOCK, stop)
            lead = 1 if at > 0 else 0  # so that ^ is the start of a line and not of a block
            text = self.log.text(at - lead, min(end + OVERLAP, self.stop))
            searched = text.lower() if wanted.folded and wanted.hints else text
            if not wanted.hints or any(hint in searched for hint in wanted.hints):
                for match in wanted.regex.finditer(text, max(lead, after - at + lead)):
                    offset = at - lead + match.start()
                    if offset >= end:
                        break
                    after = at - lead + max(match.end(), match.start() + 1)
                    yield Found(offset, _groups(match), *_line(text, match.start()))
            at = end


def _groups(match: re.Match[bytes]) -> dict[str, str]:
    return {
        name: value.decode(errors="replace").strip() for name, value in match.groupdict().items() if value is not None
    }


def _line(text: bytes, at: int) -> tuple[str, str]:
    """The line around a byte, cut to what can be shown, and what of it stands before that byte."""
    start = text.rfind(b"\n", max(0, at - LINE), at) + 1 or max(0, at - LINE)
    stop = text.find(b"\n", at, at + LINE)
    line = text[start : stop if stop >= 0 else at + LINE].decode(errors="replace").strip()
    return line[: 2 * LINE], text[start:at].decode(errors="replace")


def _plain(raw: bytes) -> bytes:
    if b"\x1b" in raw:
        raw = _ESCAPES.sub(lambda match: b" " * len(match.group()), raw)
    if b"^M" in raw:  # a carriage return that `cat -v` or a pager wrote out
        raw = raw.replace(b"^M", b" \n")
    return raw.translate(_PLAIN)


def _opened(path: Path) -> BinaryIO:
    file = path.open("rb")
    if file.read(2) != b"\x1f\x8b":
        return file
    file.seek(0)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    with file:
        for chunk in _unpacked(file):
            unpacked.write(chunk)
    return unpacked


def _unpacked(file: BinaryIO) -> Iterator[bytes]:
    """What a gzip holds, up to where it is cut off or broken, or too large."""
    unpack, left = zlib.decompressobj(GZIP), LARGEST_GZIP
    while left > 0 and (packed := file.read(BLOCK)):
        while packed and left > 0:
            try:
                chunk = unpack.decompress(packed, left)
            except zlib.error:
                return
            left -= len(chunk)
            yield chunk
            packed = unpack.unused_data if unpack.eof else b""
            if unpack.eof:  # one gzip may follow another
                unpack = zlib.decompressobj(GZIP)
