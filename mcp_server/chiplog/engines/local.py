"""The embedded default: jobs on this machine, in a queue that outlives the command that filled it.

The queue is one SQLite file; a detached process (`local_queue`) takes jobs from it and ends when it is empty.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from chiplog.engines.job import HELD, After, Batch, Job, Options, Queue, read_options
from chiplog.errors import EngineError
from chiplog.home import home
from chiplog.machine import available_cpus
from chiplog.record import State

# Of the table. A worker or command that knows another one leaves it alone: it would not know what holds a job back.
VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS queue (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, script TEXT NOT NULL, log TEXT NOT NULL,
  cpus INTEGER NOT NULL, gpus INTEGER NOT NULL, time_limit_s INTEGER, bin TEXT NOT NULL,
  state TEXT NOT NULL, reason TEXT, exit_code INTEGER, restarts INTEGER NOT NULL DEFAULT 0,
  pid INTEGER, pid_started TEXT, gpu_ids TEXT, cancel INTEGER NOT NULL DEFAULT 0,
  submitted TEXT NOT NULL, started TEXT, ended TEXT
) STRICT
"""
ADDED = {  # since the first version of the table
    "folder": "TEXT NOT NULL DEFAULT ''",  # where it runs; of an older job, its script's
    "array": "INTEGER",  # id of the array's first job
    "task": "INTEGER",  # its index in the array
    "at_once": "INTEGER",  # jobs of its tag that run at once
    "after": "TEXT NOT NULL DEFAULT '[]'",  # JSON: [afterok or afterany, id] of each job that it waits for
    "held": "INTEGER NOT NULL DEFAULT 0",
    "tag": "TEXT NOT NULL DEFAULT ''",
    "signal_s": "INTEGER",  # before its time limit
    "signalled": "INTEGER NOT NULL DEFAULT 0",
    "ran_s": "REAL NOT NULL DEFAULT 0",  # in attempts before this one
    "tasks": "INTEGER NOT NULL DEFAULT 1",  # processes; `cpus` is for all of them
}


EPOCH = 1_767_225_600  # 2026-01-01
MOST = 500  # values in one question to the table


class LocalEngine:
    """Runs scripts on this machine as Slurm would, as many at once as its CPUs and GPUs allow."""

    name = "local"
    poll_s = 0.5
    closes = False

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home() / "local"

    def queue(self) -> Queue:
        """There is always room."""
        return Queue(room=None)

    def held(self, tag: str) -> list[str]:
        """The jobs of that tag that are still held."""
        with self.open() as queue:
            held = queue.execute("SELECT * FROM queue WHERE tag = ? AND held AND state = 'PENDING' ORDER BY id", (tag,))
            return [_name(row) for row in held]

    def submit(self, batches: Sequence[Batch], tag: str, at_once: int | None = None) -> list[list[str]]:
        """Queues the batches, held. Raises EngineError if one asks for more than this machine has.

        `at_once` counts all jobs of the tag, of earlier submissions too.
        """
        asked = [(batch, read_options(batch.script)) for batch in batches]
        cpus, gpus = available_cpus(), len(available_gpus()) if any(o.gpus for _, o in asked) else 0
        for batch, options in asked:
            if options.nodes > 1:
                raise EngineError(
                    f"{batch.script} asks for {options.nodes} nodes, and this machine is one: submit to a cluster, or "
                    "plan with fewer"
                )
            if (needed := options.tasks * options.cpus) > cpus or options.gpus > gpus:
                raise EngineError(
                    f"{batch.script} asks for {needed} CPUs and {options.gpus} GPUs, and this machine has "
                    f"{cpus} and {gpus}: plan with fewer, or submit to a cluster"
                )
        done: list[list[int]] = []
        with self.open() as queue:
            for batch, options in asked:
                done.append(_insert(queue, batch, options, tag, at_once, done))
            return [[_name(row) for row in _rows(queue, "id", numbers)] for numbers in done]

    def soonest(self, script: Path, partitions: Sequence[str]) -> dict[str, str]:
        """A queue that serves who comes first has no partitions."""
        return {}

    def release(self, ids: Sequence[str]) -> None:
        """Lets held jobs run, once CPUs and GPUs are free."""
        with self.open() as queue:
            numbers = [row["id"] for row in _found(queue, ids).values()]
            queue.executemany("UPDATE queue SET held = 0 WHERE id = ?", [(number,) for number in numbers])
        self._start_worker()

    def jobs(self, ids: Sequence[str]) -> list[Job]:
        """How these jobs stand; if some wait and nobody works on the queue, somebody does again.

        Raises EngineError if nobody can.
        """
        with self.open() as queue:
            found = _found(queue, ids)
        live = [row for row in found.values() if not State(row["state"]).ended and not row["held"]]
        if live and not self._worker_lives():
            with self.open() as queue:  # a full disk is named here: a worker would only leave
                queue.execute(f"PRAGMA user_version = {VERSION}")  # which it has: a write that changes nothing
            self._start_worker()
        return [_job(found[number]) for number in ids if number in found]

    def cancel(self, ids: Sequence[str]) -> None:
        """Asks the queue to end these jobs; those that wait never start."""
        with self.open() as queue:
            for row in _found(queue, ids).values():
                queue.execute(
                    "UPDATE queue SET state = 'CANCELLED', reason = 'cancelled before it started', ended = ? "
                    "WHERE state = 'PENDING' AND id = ?",
                    (utc_now(), row["id"]),
                )
                queue.execute("UPDATE queue SET cancel = 1 WHERE state = 'RUNNING' AND id = ?", (row["id"],))
        self.jobs(ids)

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """The queue's table in one transaction. Raises EngineError if its file cannot be used."""
        file = self.folder / "queue.sqlite"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(file, timeout=30)
            connection.row_factory = sqlite3.Row
            try:
                connection.execute("BEGIN IMMEDIATE")
                with connection:
                    _bring_up_to_date(connection, file)
                    yield connection
            finally:
                connection.close()
        except (sqlite3.Error, OSError) as error:
            raise EngineError(
                f"the local queue {file} cannot be used: {error}. Mend its permissions or free disk space; or, once no "
                "job of it runs any more, set CHIPLOG_HOME to another folder"
            ) from error

    def _worker_lives(self) -> bool:
        with (self.folder / "queue.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _start_worker(self) -> None:
        """Starts a worker that is nobody's child, in a session of its own; it ends at once if there is one already."""
        worker = [sys.executable, "-m", "chiplog.engines.local_queue", str(self.folder)]
        with (self.folder / "queue.log").open("ab") as log:
            subprocess.run(
                ["/bin/sh", "-c", '"$@" &', "sh", *worker],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                check=True,
            )


def _bring_up_to_date(queue: sqlite3.Connection, file: Path) -> None:
    """Makes the table, or the one of an earlier version this one. Raises EngineError for one of a later version.

    The first version called it `jobs` and asked for no version. Its worker, if one still runs, makes itself an empty
    table of that name, finds nothing left to do and leaves; who took its lock goes on with its jobs.
    """
    (version,) = queue.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise EngineError(
            f"the local queue {file} is that of a later chiplog (version {version}, this one knows {VERSION}): "
            "use that one, or set CHIPLOG_HOME to another folder"
        )
    if version == VERSION:
        return
    if queue.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone():
        queue.execute("ALTER TABLE jobs RENAME TO queue")
    queue.execute(_SCHEMA)
    there = {row["name"] for row in queue.execute("PRAGMA table_info(queue)")}
    for column, kind in ADDED.items():
        if column not in there:
            queue.execute(f"ALTER TABLE queue ADD COLUMN {column} {kind}")
    # A new queue does not count from 1 again: a job's id stands for it in records and in the ledger.
    queue.execute(
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'queue', ? "
        "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'queue')",
        (int(time.time()) - EPOCH,),
    )
    queue.execute(f"PRAGMA user_version = {VERSION}")


def _insert(
    queue: sqlite3.Connection,
    batch: Batch,
    options: Options,
    tag: str,
    at_once: int | None,
    before: Sequence[Sequence[int]],
) -> list[int]:
    """The ids of the new jobs of a batch; `before` has those of the batches before it."""
    ids: list[int] = []
    for place, task in enumerate(batch.indices or [None]):
        cpus = options.tasks * options.cpus
        values = (options.job_name, str(batch.script), cpus, options.gpus, options.time_limit_s)
        cursor = queue.execute(
            "INSERT INTO queue (name, script, cpus, gpus, time_limit_s, bin, state, submitted, log, held, folder, "
            "task, at_once, tag, signal_s, tasks) VALUES (?, ?, ?, ?, ?, ?, ?, ?, '', 1, ?, ?, ?, ?, ?, ?)",
            (*values, str(Path(sys.executable).parent), State.PENDING, utc_now(), str(batch.folder), task,
             at_once, tag, options.signal_s, options.tasks),
        )  # fmt: skip
        assert cursor.lastrowid is not None
        ids.append(cursor.lastrowid)
        array = None if task is None else ids[0]
        log = _filled(options, ids[-1], array, task)
        after = [pair for one in batch.after for pair in _pairs(one, before[one.batch], place)]
        queue.execute(
            "UPDATE queue SET log = ?, array = ?, after = ? WHERE id = ?",
            (str(batch.folder / log), array, json.dumps(after), ids[-1]),
        )
    return ids


def _pairs(after: After, ids: Sequence[int], place: int) -> list[tuple[str, int]]:
    """What one job of a batch waits for."""
    if after.kind == "aftercorr":
        return [("afterok", ids[place])]
    return [(after.kind, number) for number in ids]


def _filled(options: Options, number: int, array: int | None, task: int | None) -> str:
    """The name of a job's log."""
    known = {"j": number, "x": options.job_name, "A": array or number, "a": "4294967294" if task is None else task}
    return re.sub(r"%([jxAa])", lambda match: str(known[match[1]]), options.output)


def _rows(queue: sqlite3.Connection, column: str, values: Sequence[int]) -> Iterator[sqlite3.Row]:
    """The jobs with these values, in the order of their ids."""
    for start in range(0, len(values), MOST):
        part = values[start : start + MOST]
        marks = ",".join("?" * len(part))
        yield from queue.execute(f"SELECT * FROM queue WHERE {column} IN ({marks}) ORDER BY id", part)


def _found(queue: sqlite3.Connection, ids: Sequence[str]) -> dict[str, sqlite3.Row]:
    """The jobs of these ids, by id; an array is found by the ids of its elements."""
    single = [int(name) for name in ids if name.isdecimal()]
    arrays = list(dict.fromkeys(int(name.partition("_")[0]) for name in ids if "_" in name))
    rows = [*_rows(queue, "id", single), *_rows(queue, "array", arrays)]
    wanted = set(ids)
    return {name: row for row in rows if (name := _name(row)) in wanted}


def _name(row: sqlite3.Row) -> str:
    """The id by which a job is known outside: as in Slurm, ARRAY_INDEX for an element."""
    return str(row["id"]) if row["array"] is None else f"{row['array']}_{row['task']}"


def _job(row: sqlite3.Row) -> Job:
    fields = ("reason", "exit_code", "restarts", "submitted", "started", "ended", "name")
    log = Path(os.path.realpath(row["log"]))  # the folder of an array's element is a link
    attempt_s = None
    if row["started"]:
        ended = datetime.fromisoformat(row["ended"]) if row["ended"] else datetime.now(UTC)
        attempt_s = (ended - datetime.fromisoformat(row["started"])).total_seconds()
    ran_s = row["ran_s"] + (attempt_s or 0.0) if row["started"] or row["ran_s"] else None
    times = {"ran_s": ran_s, "attempt_s": attempt_s}
    values = {field: row[field] for field in fields}
    if row["held"] and row["state"] == State.PENDING:
        values["reason"] = HELD
    return Job(id=_name(row), state=State(row["state"]), log=log, **times, **values)


def available_gpus() -> list[str]:
    """Indices of the GPUs that may be used: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists; none without it."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part for part in named.split(",") if part.strip() and part != "-1"]
    return [str(index) for index, _ in enumerate(_nvidia_smi())]


def gpu_name() -> str:
    """Name of this machine's first GPU, as its driver and torch call it; empty where there is none."""
    return next(iter(_nvidia_smi()), "")


def _nvidia_smi() -> list[str]:
    """The name of each GPU; none where the driver is not there."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def kill_group(pid: int, number: signal.Signals) -> None:
    """Signals a job and all its children; a group that is gone, or another user's by now, is none of ours."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def group_alive(pid: int) -> bool:
    """Whether the job or anything it started still runs; what is dead and was not reaped does not."""
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return any(_in_group(file, pid) for file in Path("/proc").glob("[0-9]*/stat"))


def _in_group(file: Path, group: int) -> bool:
    """Whether a process of /proc lives and is of that group."""
    with suppress(OSError):
        state, _, its_group = file.read_text(errors="replace").rpartition(")")[2].split()[:3]
        return state not in ("Z", "X") and int(its_group) == group
    return False
