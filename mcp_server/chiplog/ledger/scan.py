"""Finding logs and reading those that are new or have changed, on all cores, into the ledger.

A file is known by path, size, time and inode: of an unchanged tree no content is touched. A large one that grew is read
from where it ended. What is read is put into the ledger a batch at a time, so that an interruption loses one batch.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from pydantic import Field

from chiplog.errors import EngineError, RecordError
from chiplog.ledger.parse import parse_job, parse_log
from chiplog.ledger.reader import LogReader
from chiplog.ledger.sacct import ask, ran_at
from chiplog.ledger.store import RECORDS, Ledger, Read, Seen
from chiplog.machine import available_cpus
from chiplog.record import Record, State, read_records
from chiplog.schema import Frozen, Progress

NAMES = ["*.out", "*.err", "*.log", "*.out.gz", "*.err.gz", "*.log.gz", "slurm-*", "stdout*", "stderr*", "log.txt",
         "*_log.txt", "train*.txt", "seff*", "sacct*", "nvidia-smi*.csv"]  # fmt: skip
JOB = re.compile(r"\d+(?:_\d+)?")  # Slurm's id of a job, or of a task of an array
BATCH = 64
LARGE = 1 << 22  # bytes from which a log that grew is read on, and not anew
FEW = 200  # files that are read here: to start processes costs more than to read them


class Scanned(Frozen):
    """What a scan found."""

    files: int = Field(description="Logs that are there.")
    read: int = Field(description="Of these, logs that were read: new, changed or grown.")
    runs: int = Field(description="Runs in the logs that were read.")
    gone: int = Field(description="Logs that were there before and are not any more; their records stay.")
    errors: list[str] = Field(description="Logs that could not be read, and why.")


class LogFile(NamedTuple):
    """A log on disk."""

    path: str
    size: int
    mtime_ns: int
    inode: int


class Work(NamedTuple):
    """A log to read."""

    found: LogFile
    old: Seen | None  # as it was read last, if it only goes on from there
    second: LogFile | None  # the file of the same job's standard error


def scan(
    roots: Sequence[Path], ledger: Ledger, progress: Progress | None = None, workers: int | None = None
) -> Scanned:
    """Reads what is new under these files and folders into the ledger."""
    there = {found.path: found for root in roots for found in find_logs(root)}
    known = ledger.seen()
    changed = {path for path, found in there.items() if not _unchanged(found, known.get(path))}
    work = _work(ledger, there, known, changed)
    within = [str(root.resolve()) for root in roots]
    absent = [path for path, seen in known.items() if path not in there and not seen.gone]
    gone = [path for path in absent if any(path == root or path.startswith(root + os.sep) for root in within)]
    runs, done, errors, jobs = 0, 0, [], {}
    for batch in _read_all(work, workers if workers is not None else available_cpus()):
        read = ledger.put_logs(batch)
        runs += sum(len(records) for _, _, records in read)
        errors += [f"{seen.path}: {seen.error}" for seen, _, _ in read if seen.error]
        logs = [(seen.mtime_ns / 1e9, r.job_id) for seen, _, records in read for r in records if not r.experiment]
        jobs |= {job: moment for moment, job in logs if job and JOB.fullmatch(job)}
        done += len(batch)
        if progress:
            progress(done, len(changed), "logs")
    if gone:
        ledger.mark_gone(gone)
    if work:
        errors += _join(ledger, jobs)
    return Scanned(files=len(there), read=len(changed), runs=runs, gone=len(gone), errors=errors)


def _work(ledger: Ledger, there: dict[str, LogFile], known: dict[str, Seen], changed: set[str]) -> list[Work]:
    """What is to be read: a log, or both files of a job if one of them changed or they were read apart."""
    work = []
    for path, found in there.items():
        first, second = _first(path), _second(path)
        if path != first and (first in there or _found(first)):
            continue
        other = there.get(second) or (_found(second) if second != path else None)
        if other and second != path:
            if path in changed or not _unchanged(other, known.get(second)) or known[path].parser:
                work.append(Work(found, None, other))
        elif path in changed:
            old = known.get(path)
            work.append(Work(found, old if old and _goes_on(ledger, found, old) else None, None))
    return work


def _first(path: str) -> str:
    """The file of standard output beside one of standard error."""
    return _other(path, ".err", ".out")


def _second(path: str) -> str:
    return _other(path, ".out", ".err")


def _other(path: str, end: str, other: str) -> str:
    for packed in ("", ".gz"):
        if path.endswith(end + packed):
            return path.removesuffix(end + packed) + other + packed
    return path


def _join(ledger: Ledger, jobs: dict[str, float]) -> list[str]:
    """Joins the runs with what sacct, if it is there, and reports among the logs say of their jobs; returns errors."""
    reports, errors = [], []
    try:
        for report in ask(sorted(jobs)):  # what was answered before it failed is kept
            reports.append(report)
    except EngineError as wrong:
        errors = [str(wrong)]
    # A job of that number may have run on another cluster: then it was not running when the log was written.
    ledger.put([r for r in reports if r.state.ended and r.job_id in jobs and ran_at(r, jobs[r.job_id])])
    ledger.join_reports(ran_at)
    return errors


def find_logs(root: Path) -> Iterator[LogFile]:
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
        own = _found(f"{folder}/{RECORDS}")
        if own and Path(folder, "plan.yaml").is_file():  # an experiment of this project: its runs stand there
            yield own
            continue
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
            elif is_log(entry.name) and _is_text(path) and (found := _found(path)):
                yield found


def _is_text(path: str) -> bool:
    """Whether a path can be written down; one that is not UTF-8 cannot."""
    return path.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in path)


def is_log(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, form) for form in NAMES)


def _found(path: str) -> LogFile | None:
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    inode = stat.st_ino - 2**64 if stat.st_ino >= 2**63 else stat.st_ino  # as SQLite counts
    return LogFile(path, stat.st_size, stat.st_mtime_ns, inode) if S_ISREG(stat.st_mode) else None


def _unchanged(found: LogFile, seen: Seen | None) -> bool:
    """Whether a log is as it was read; one that could not be read may be readable now."""
    return seen is not None and not seen.gone and not seen.error and (found.size, found.mtime_ns, found.inode) == (
        seen.size, seen.mtime_ns, seen.inode
    )  # fmt: skip


def _read_all(work: Sequence[Work], workers: int) -> Iterator[list[Read]]:
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


def _read_batch(batch: Sequence[Work]) -> list[Read]:
    return [read for work in batch for read in _read(work)]


def _read(work: Work) -> list[Read]:
    found, old, second = work
    path = Path(found.path)
    try:
        if second:
            records, read_to, parser = parse_job([path, Path(second.path)]), 0, None
        elif path.name == RECORDS:
            records, read_to, parser = [r for r in read_records(path) if r.state.ended], 0, None
        else:
            records, read_to, parser = parse_log(path, old.read_to, old.parser) if old else parse_log(path)
    except RecordError as wrong:
        if second:  # one of the two cannot be read, and the other alone says something
            alone = [read for file in (found, second) for read in _read(Work(file, None, None))]
            return [read._replace(seen=read.seen._replace(parser=None)) for read in alone]
        return [Read(Seen(**found._asdict(), read_to=0, error=str(wrong)), None, [])]
    also = [Read(Seen(**second._asdict(), read_to=0), None, [])] if second else []
    return [Read(Seen(**found._asdict(), read_to=read_to, parser=parser), old, records), *also]


def _goes_on(ledger: Ledger, found: LogFile, old: Seen) -> bool:
    """Whether a log goes on where it was last read to, with a run that had not ended."""
    same = not old.error and old.inode == found.inode and found.size > old.size > LARGE
    if not same or old.read_to != old.size or not old.parser or found.path.endswith(".gz"):
        return False
    before = ledger.of_file(found.path)
    return bool(before) and before[-1].state is State.INCOMPLETE and _still_says(found.path, before[-1])


def _still_says(path: str, record: Record) -> bool:
    """Whether what was read of a log stands there still: it may have been written anew."""
    try:
        with LogReader(Path(path)) as log:
            said = [(log.text(entry.offset, entry.offset + 12), entry.line) for entry in record.evidence]
    except RecordError:
        return False
    return all(text.split(b"\n")[0].strip() in line.encode() for text, line in said)
