"""One log file, read in pieces: its edges first, the middle only where somebody asks for all of it.

Bytes stay bytes, and a position is one in the file (of a gzip: in what it holds), so that every line can be shown as
evidence. What is for terminals only (colours, carriage returns, NULs) is blanked byte for byte.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import zlib
from collections import deque
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
CACHED = 24  # blocks that are held
FIRST_STRIDE = 1 << 12  # bytes from the end that are searched first for what stands last
SKIMMED = 1 << 20  # bytes that are searched for a hint at once, before any of them is read closely
RUNS = 1000  # in one log
MANY = 5000  # of what stands all over a log, such as announcements of runs and losses of validation
NUMBERS = b"0123456789." + "█".encode() + bytes(range(0x89, 0x90))  # digits, and what bars are drawn with
GZIP = 31  # what zlib calls the format
LARGEST_GZIP = 1 << 31  # bytes that are unpacked of one

_ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[@-Z\\^_])")
COLOURS = [f"\x1b[{code}m".encode() for code in ("0", "1", *range(31, 38), "1;32", "0;32")]  # most escapes are these
_PLAIN = bytes.maketrans(b"\r\0\x08\x0b\x0c", b"\n    ")


@dataclass(frozen=True, slots=True)
class Pattern:
    """What to look for: a regular expression over bytes, and words of which one must be there for it to match."""

    regex: re.Pattern[bytes]
    hints: tuple[bytes, ...]  # without numbers
    folded: bool  # whether the words are sought in small letters


@cache
def pattern(regex: bytes, *hints: bytes) -> Pattern:
    """`^` and `$` are the ends of lines; a block without any of the hints is passed over.

    Where the expression ignores case, so do the hints, which then are in small letters.
    """
    folded = b"(?i" in regex
    assert not folded or all(hint == hint.lower() for hint in hints), regex
    shapes = tuple(hint.translate(None, NUMBERS) for hint in hints)
    return Pattern(re.compile(regex, re.MULTILINE), shapes, folded)


class Found:
    """One match: where it begins, its named groups as text, its line, and what stands before it there."""

    __slots__ = ("_line", "_match", "offset")

    def __init__(self, offset: int, match: re.Match[bytes]) -> None:
        self.offset, self._match = offset, match
        self._line: str | None = None

    def __getitem__(self, name: str) -> str:
        return self._match[name].decode(errors="replace").strip()

    def get(self, name: str) -> str | None:
        """A group; null if it took no part, or if there is none of that name."""
        value = self._match[name] if name in self._match.re.groupindex else None
        return None if value is None else value.decode(errors="replace").strip()

    @property
    def text(self) -> bytes:
        """What it matched."""
        return self._match.group()

    @property
    def end(self) -> int:
        """The byte after it."""
        return self.offset + self._match.end() - self._match.start()

    @property
    def line(self) -> str:
        """Its line, cut to what can be shown; one text, however many figures come from it."""
        if self._line is None:
            text, at = self._match.string, self._match.start()
            stop = text.find(b"\n", at, at + LINE)
            whole = text[self._line_start : stop if stop >= 0 else at + LINE]
            self._line = whole.decode(errors="replace").strip()[: 2 * LINE]
        return self._line

    @property
    def before(self) -> str:
        """What stands before it in its line."""
        return self._match.string[self._line_start : self._match.start()].decode(errors="replace")

    @property
    def line_offset(self) -> int:
        """The byte at which its line begins, or what of the line can be shown."""
        return self.offset - (self._match.start() - self._line_start)

    @property
    def _line_start(self) -> int:
        text, at = self._match.string, self._match.start()
        return text.rfind(b"\n", max(0, at - LINE), at) + 1 or max(0, at - LINE)


class Window:
    """A block of a log with a little of what stands before and after it, and which hints may be in it."""

    def __init__(self, start: int, text: bytes) -> None:
        self.start, self.text = start, text
        self._hints: dict[tuple[bytes, bool], bool] = {}

    @cached_property
    def shapes(self) -> bytes:
        """Its lines without numbers, each once: most lines of a log differ in nothing else."""
        return b"\n" + b"\n".join(set(self.text.translate(None, NUMBERS).split(b"\n")))

    @cached_property
    def folded(self) -> bytes:
        return self.shapes.lower()

    def may_have(self, wanted: Pattern) -> bool:
        """Whether one of the pattern's hints may be in it."""
        known, folded = self._hints, wanted.folded
        for hint in wanted.hints:
            if (hint, folded) not in known:
                known[hint, folded] = hint in (self.folded if folded else self.shapes)
            if known[hint, folded]:
                return True
        return not wanted.hints


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
        self._windows: dict[int, Window] = {}

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
        number = start // BLOCK
        window = self.window(number)
        if stop <= min((number + 1) * BLOCK + OVERLAP, self.size):
            return window.text[start - window.start : max(start, stop) - window.start]
        return _plain(self.raw(start, stop))

    def window(self, number: int) -> Window:
        """The block of that number."""
        if number not in self._windows:
            while len(self._windows) >= CACHED:
                del self._windows[next(iter(self._windows))]
            start = max(0, number * BLOCK - OVERLAP)
            self._windows[number] = Window(start, _plain(self.raw(start, (number + 1) * BLOCK + OVERLAP)))
        return self._windows[number]

    def raw(self, start: int, stop: int) -> bytes:
        """These bytes as they are. Raises RecordError if they cannot be read."""
        try:
            self.file.seek(start)
            return self.file.read(max(0, stop - start))
        except OSError as error:
            raise RecordError(f"{self.path} cannot be read: {error.strerror}") from error


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
        matches = self.all(wanted) if far else self._matches(wanted, self.start, min(self.stop, self.start + EDGE))
        return next(matches, None)

    def last(self, wanted: Pattern, far: bool = False) -> Found | None:
        """The last match, near the end only unless `far`."""
        least = self.start if far else max(self.start, self.stop - EDGE)
        for stop in range(self.stop, least, -SKIMMED):
            start = max(least, stop - SKIMMED)
            if far and not self._may_have(wanted, start, stop):
                continue
            for number in reversed(range(start // BLOCK, -(-stop // BLOCK))):
                if found := self._last(wanted, max(start, number * BLOCK), min(stop, (number + 1) * BLOCK)):
                    return found
        return None

    def any(self, wanted: Pattern) -> Found | None:
        """The first match near the start, else the last near the end."""
        return self.first(wanted) or (self.last(wanted) if len(self) > EDGE else None)

    def near(self, wanted: Pattern, edge: int = EDGE) -> list[Found]:
        """Matches in so many bytes at either end, in their order; of very many at one end, those nearest to it."""
        middle = self.start + len(self) // 2
        early = list(itertools.islice(self._matches(wanted, self.start, min(middle, self.start + edge)), MANY))
        after = early[-1].end if early else self.start
        return [*early, *deque(self._matches(wanted, max(middle, self.stop - edge, after), self.stop), MANY)]

    def all(self, wanted: Pattern) -> Iterator[Found]:
        """Every match; skims all of it. A list of them may be as long as the log: `some` is not."""
        after = self.start
        for start in range(self.start, self.stop, SKIMMED):
            stop = min(start + SKIMMED, self.stop)
            if self._may_have(wanted, start, stop):
                for found in self._matches(wanted, max(start, after), stop):
                    after = found.end
                    yield found

    def some(self, wanted: Pattern) -> list[Found]:
        """Every match, of more than `MANY` the first."""
        return list(itertools.islice(self.all(wanted), MANY))

    def _may_have(self, wanted: Pattern, start: int, stop: int) -> bool:
        """Whether a hint is in these bytes as they are; where there are few, they are worth no skimming."""
        if len(self) <= 2 * EDGE or not wanted.hints:
            return True
        return Window(start, self.log.raw(start, min(stop + OVERLAP, self.stop))).may_have(wanted)

    def cut(self, starts: list[int]) -> list[Span]:
        """One span from each of these positions to the next; what stands before the first belongs to it.

        Raises RecordError for more than `RUNS` of them.
        """
        if not starts:
            return [self]
        if len(starts) > RUNS:
            say = "cut it into parts, or give each run a log of its own"
            raise RecordError(f"{self.log.path} tells of more than {RUNS:,} runs: {say}")
        ends = [*starts[1:], self.stop]
        return [Span(self.log, start, end) for start, end in zip([self.start, *starts[1:]], ends, strict=True)]

    def _matches(self, wanted: Pattern, start: int, stop: int) -> Iterator[Found]:
        """Matches that begin in [start, stop), block by block; each block is searched with what surrounds it."""
        after = start
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            window = self.log.window(number)
            if not window.may_have(wanted):
                continue
            base, end = window.start, min(stop, (number + 1) * BLOCK)
            least = max(start, number * BLOCK, after)
            for match in wanted.regex.finditer(window.text, least - base, self.stop - base):
                offset = base + match.start()
                if offset >= end:
                    break
                after = base + max(match.end(), match.start() + 1)
                yield Found(offset, match)

    def _last(self, wanted: Pattern, start: int, stop: int) -> Found | None:
        """The last match that begins in [start, stop), a part of one block: from its end, in growing strides."""
        window, stride = self.log.window(start // BLOCK), FIRST_STRIDE
        while stop > start and window.may_have(wanted):
            least = max(start, stop - stride)
            if least > start:  # from the beginning of a line on
                least = max(start, window.start + window.text.rfind(b"\n", 0, least - window.start) + 1)
            found = None
            for found in self._matches(wanted, least, stop):  # noqa: B007
                pass
            if found:
                return found
            stop, stride = least, 4 * stride
        return None


def _plain(raw: bytes) -> bytes:
    for code in COLOURS if b"\x1b" in raw else ():
        raw = raw.replace(code, b" " * len(code))
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
