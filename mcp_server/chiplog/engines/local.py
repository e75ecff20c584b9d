"""The embedded default: jobs on this machine, in a queue that outlives the command that filled it.

The queue is one SQLite file; a detached process (`local_queue`) takes jobs from it and ends when it is empty.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chiplog.engines.job import Job, Options, read_options
from chiplog.errors import EngineError
from chiplog.home import home
from chiplog.machine import available_cpus
from chiplog.record import State

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, script TEXT NOT NULL, log TEXT NOT NULL,
  cpus INTEGER NOT NULL, gpus INTEGER NOT NULL, time_limit_s INTEGER, bin TEXT NOT NULL,
  state TEXT NOT NULL, reason TEXT, exit_code INTEGER, restarts INTEGER NOT NULL DEFAULT 0,
  pid INTEGER, pid_started TEXT, gpu_ids TEXT, cancel INTEGER NOT NULL DEFAULT 0,
  submitted TEXT NOT NULL, started TEXT, ended TEXT
) STRICT
"""


EPOCH = 1_767_225_600  # 2026-01-01


class LocalEngine:
    """Runs scripts on this machine as Slurm would, as many at once as its CPUs and GPUs allow."""

    name = "local"

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home() / "local"

    def submit(self, scripts: Sequence[Path]) -> list[Job]:
        """Queues the scripts; one that waits or runs already is not queued again.

        Raises EngineError if one asks for more than this machine has. Whatever stops it, nothing that it queued runs.
        """
        asked = [(script.resolve(), read_options(script)) for script in scripts]
        cpus, gpus = available_cpus(), len(available_gpus()) if any(o.gpus for _, o in asked) else 0
        for script, options in asked:
            if options.cpus > cpus or options.gpus > gpus:
                raise EngineError(
                    f"{script.parent.name} asks for {options.cpus} CPUs and {options.gpus} GPUs, and this machine has "
                    f"{cpus} and {gpus}: plan with fewer, or submit to a cluster"
                )
        ids: list[int] = []
        new: dict[int, str] = {}
        try:
            with self.open() as queue:
                for script, options in asked:
                    live = "SELECT id FROM jobs WHERE script = ? AND state IN ('PENDING', 'RUNNING')"
                    found = queue.execute(live, (str(script),)).fetchone()
                    ids.append(found["id"] if found else _insert(queue, script, options))
                    if not found:
                        new[ids[-1]] = str(script)
            self._start_worker()
            return self.jobs([str(number) for number in ids])
        except BaseException:
            if new:
                with self.open() as queue:
                    for number, script in new.items():  # with its script: a number rolled back may be another's by now
                        _withdraw(queue, "id = ? AND script = ?", (number, script))
            raise

    def jobs(self, ids: Sequence[str]) -> list[Job]:
        """How these jobs stand; if some wait and nobody works on the queue, somebody does again."""
        with self.open() as queue:
            marks = ",".join("?" * len(ids))
            found = {str(row["id"]): row for row in queue.execute(f"SELECT * FROM jobs WHERE id IN ({marks})", ids)}
        if any(not State(row["state"]).ended for row in found.values()) and not self._worker_lives():
            self._start_worker()
        return [_job(found[number]) for number in ids if number in found]

    def cancel(self, ids: Sequence[str]) -> list[Job]:
        """Asks the queue to end these jobs; those that wait never start."""
        marks = ",".join("?" * len(ids))
        with self.open() as queue:
            _withdraw(queue, f"id IN ({marks})", ids)
        return self.jobs(ids)

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """The queue's table in one transaction. Raises EngineError if its file cannot be used."""
        file = self.folder / "queue.sqlite"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(file, timeout=30)
            connection.row_factory = sqlite3.Row
            try:
                connection.execute(_SCHEMA)
                connection.execute("BEGIN IMMEDIATE")
                # A new queue does not count from 1 again: a job's id stands for it in records and in the ledger.
                connection.execute(
                    "INSERT INTO sqlite_sequence (name, seq) SELECT 'jobs', ? "
                    "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'jobs')",
                    (int(time.time()) - EPOCH,),
                )
                with connection:
                    yield connection
            finally:
                connection.close()
        except (sqlite3.Error, OSError) as error:
            raise EngineError(
                f"the local queue {file} cannot be used: {error}. Mend its permissions or free disk space; or set "
                "CHIPLOG_HOME to another folder"
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


def _insert(queue: sqlite3.Connection, script: Path, options: Options) -> int:
    """The id of a new job that waits."""
    values = (options.job_name, str(script), "", options.cpus, options.gpus, options.time_limit_s)
    cursor = queue.execute(
        "INSERT INTO jobs (name, script, log, cpus, gpus, time_limit_s, bin, state, submitted) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*values, str(Path(sys.executable).parent), State.PENDING, utc_now()),
    )
    assert cursor.lastrowid is not None
    log = options.output.replace("%j", str(cursor.lastrowid)).replace("%x", options.job_name)
    queue.execute("UPDATE jobs SET log = ? WHERE id = ?", (str(script.parent / log), cursor.lastrowid))
    return cursor.lastrowid


def _withdraw(queue: sqlite3.Connection, which: str, values: Sequence[Any]) -> None:
    """Those that wait never start; the worker ends those that run."""
    queue.execute(
        f"UPDATE jobs SET state = 'CANCELLED', reason = 'cancelled before it started', ended = ? "
        f"WHERE state = 'PENDING' AND {which}",
        (utc_now(), *values),
    )
    queue.execute(f"UPDATE jobs SET cancel = 1 WHERE state = 'RUNNING' AND {which}", values)


def _job(row: sqlite3.Row) -> Job:
    fields = ("reason", "exit_code", "restarts", "submitted", "started", "ended", "name")
    return Job(id=str(row["id"]), state=State(row["state"]), log=Path(row["log"]), **{f: row[f] for f in fields})


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
    """Whether the job or anything it started still runs."""
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
