"""Finding logs and reading those that are new or have changed, on all cores, into the ledger.

A file is known by path, size, time and inode: of an unchanged tree no content is touched. One that grew is read from
where it ended. What is read is put into the ledger a batch at a time, so that an interruption loses one batch.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from pydantic import Field

from chiplog.errors import RecordError
from chiplog.ledger.parse import continued, parse_log
from chiplog.ledger.store import Ledger, Seen
from chiplog.machine import available_cpus
from chiplog.record import Record
from chiplog.schema import Frozen, Progress

NAMES = ["*.out", "*.err", "*.log", "*.out.gz", "*.err.gz", "*.log.gz", "slurm-*", "stdout*", "stderr*", "log.txt",
         "*_log.txt", "train*.txt", "seff*", "sacct*"]  # fmt: skip
BATCH = 64
FEW = 200  # files that are read here: to start processes costs more than to read them


class Scanned(Frozen):
    """What a scan found."""

    files: int = Field(description="Logs that are there.")
    read: int = Field(description="Of these, logs that were read: new, changed or grown.")
    runs: int = Field(description="Runs in the logs that were read.")
    gone: int = Field(description="Logs that were there before and are not any more; their records stay.")
    errors: list[str] = Field(description="Logs that could not be read, and why.")


class Found(NamedTuple):
    """A log on disk."""

    path: str
    size: int
    mtime_ns: int
    inode: int


def scan(
    roots: Sequence[Path], ledger: Ledger, progress: Progress | None = None, workers: int | None = None
) -> Scanned:
    """Reads what is new under these files and folders into the ledger."""
    there = {found.path: found for root in roots for found in find_logs(root)}
    known = ledger.seen()
    work = [(found, known.get(path)) for path, found in there.items() if not _unchanged(found, known.get(path))]
    within = [str(root.resolve()) for root in roots]
    absent = [path for path, seen in known.items() if path not in there and not seen.gone]
    gone = [path for path in absent if any(path == root or path.startswith(root + os.sep) for root in within)]
    runs, done, errors = 0, 0, []
    for batch in _read_all(work, workers if workers is not None else available_cpus()):
        read = [(seen, _joined(ledger, seen, old, records)) for seen, old, records in batch]
        ledger.put_logs(read)
        runs += sum(len(records) for _, records in read)
        errors += [f"{seen.path}: {seen.error}" for seen, _ in read if seen.error]
        done += len(batch)
        if progress:
            progress(done, len(work), "logs")
    if gone:
        ledger.mark_gone(gone)
    return Scanned(files=len(there), read=len(work), runs=runs, gone=len(gone), errors=errors)


def find_logs(root: Path) -> Iterator[Found]:
    """The logs under a folder, by their names, or the file itself; a folder that links lead to twice is seen once."""
    try:
        root = root.resolve()
    except (OSError, RuntimeError):
        return
    if root.is_file():
        if found := _found(str(root)):
            yield found
        return
    seen: set[tuple[int, int]] = set()
    stack = [str(root)]
    while stack:
        folder = stack.pop()
        try:
            stat = Path(folder).stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue  # not ours to read
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:
                continue
            path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if is_folder:
                stack.append(path)
            elif is_log(entry.name) and (found := _found(path)):
                yield found


def is_log(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, form) for form in NAMES)


def _found(path: str) -> Found | None:
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return Found(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) if S_ISREG(stat.st_mode) else None


def _unchanged(found: Found, seen: Seen | None) -> bool:
    return seen is not None and not seen.gone and (found.size, found.mtime_ns, found.inode) == (
        seen.size, seen.mtime_ns, seen.inode
    )  # fmt: skip


def _read_all(
    work: Sequence[tuple[Found, Seen | None]], workers: int
) -> Iterator[list[tuple[Seen, Seen | None, list[Record]]]]:
    batches = [work[i : i + BATCH] for i in range(0, len(work), BATCH)]
    if len(work) <= FEW or workers <= 1:
        yield from map(_read_batch, batches)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_read_batch, batch) for batch in batches]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_batch(batch: Sequence[tuple[Found, Seen | None]]) -> list[tuple[Seen, Seen | None, list[Record]]]:
    return [_read(found, seen) for found, seen in batch]


def _read(found: Found, old: Seen | None) -> tuple[Seen, Seen | None, list[Record]]:
    path = Path(found.path)
    grown = (
        old is not None and not old.error and old.inode == found.inode and found.size > old.size and bool(old.parser)
    )
    grown = grown and path.suffix != ".gz"
    try:
        parsed = parse_log(path, old.read_to, old.parser) if old and grown else parse_log(path)
    except RecordError as wrong:
        return Seen(**found._asdict(), read_to=0, error=str(wrong)), None, []
    seen = Seen(**found._asdict(), read_to=parsed.read_to, parser=parsed.parser)
    return seen, old if grown else None, parsed.records


def _joined(ledger: Ledger, seen: Seen, old: Seen | None, records: list[Record]) -> list[Record]:
    """Of a log that grew, its records with what was added to them."""
    if old is None or seen.error:
        return records
    before = ledger.of_file(seen.path)
    return continued(before, records)


def redacted(records: Iterable[Record]) -> Iterator[Record]:
    """The records without users, hosts and folders, fit to be shared."""
    for record in records:
        yield record.model_copy(
            update={
                "logs": [Path(log).name for log in record.logs],
                "evidence": [],
                "reason": None if record.reason is None else _no_paths(record.reason),
                "model": None if record.model is None else Path(record.model).name,
                "config": {
                    key: _no_paths(value) if isinstance(value, str) else value for key, value in record.config.items()
                },
            }
        )


def _no_paths(text: str) -> str:
    text = re.sub(r"(?:/[\w.@+~-]+){2,}", lambda match: Path(match.group()).name, text)
    text = re.sub(r"\b[\w.+-]+@[\w.-]+\b", "USER@HOST", text)
    return re.sub(r"(?<=\bON )\S+(?= CANCELLED)|\b\d{1,3}(?:\.\d{1,3}){3}\b", "HOST", text)
