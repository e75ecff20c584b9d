"""The index of past runs: one SQLite file, rebuilt at any time from records and logs.

Rollback journal and a busy timeout, since home directories on clusters are network file systems. The table `runs`
holds what is searched, in few pages; `records` holds whole records; `files` says how far each log was read. What a
scheduler reports of a job whose log was read too is `part_of` that run.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from chiplog.errors import RecordError
from chiplog.home import home
from chiplog.ledger.parse import SCHEDULER, continued, joined
from chiplog.record import Record, State

VERSION = 4
COLUMNS = {  # what can be searched, and where a record has it
    "experiment": "experiment", "run": "run", "kind": "kind", "recipe": "recipe", "model": "model",
    "device": "usage.device", "state": "state", "started": "started", "framework": "framework", "method": "method",
    "job_id": "job_id",
    "gpus": "usage.gpus", "batch_size": "config.batch_size", "micro_batch_size": "config.micro_batch_size",
    "max_seq_len": "config.max_seq_len", "lora_rank": "config.lora_rank", "steps": "usage.steps",
    "train_s": "usage.train_s", "elapsed_s": "usage.elapsed_s", "peak_mem_bytes": "usage.peak_mem_bytes",
    "loss_last": "usage.loss_last", "ended": "ended",
}  # fmt: skip
_SCHEMA = f"""
CREATE TABLE runs (key TEXT PRIMARY KEY, file TEXT, part_of TEXT, {", ".join(COLUMNS)});
CREATE TABLE records (key TEXT PRIMARY KEY REFERENCES runs ON DELETE CASCADE, record TEXT NOT NULL);
CREATE INDEX runs_by_recipe ON runs (recipe, device, model);
CREATE INDEX runs_by_file ON runs (file);
CREATE INDEX runs_by_job ON runs (job_id);
CREATE INDEX runs_by_part ON runs (part_of);
CREATE INDEX runs_by_state ON runs (state, started DESC);
CREATE INDEX runs_by_start ON runs (started DESC);
CREATE TABLE files (
  path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
  read_to INTEGER NOT NULL, parser TEXT, error TEXT, gone INTEGER NOT NULL DEFAULT 0
) STRICT;
"""
_BOTH = "runs JOIN records USING (key)"
RECORDS = "records.jsonl"  # what an experiment of this project keeps of its runs
_IN_ORDER = "length(runs.key), runs.key"  # the numbers of a log's runs are as long as they are
BUSY_S = 30.0


class Seen(NamedTuple):
    """A log as it was when it was last read."""

    path: str
    size: int  # bytes
    mtime_ns: int  # when it was last written
    inode: int
    read_to: int  # byte up to which it was read
    parser: str | None = None  # what read it
    error: str | None = None  # why it could not be read
    gone: int = 0  # whether it was not there any more


class Read(NamedTuple):
    """What a log said; `old` if only what was added to it was read."""

    seen: Seen
    old: Seen | None
    records: list[Record]


class Ledger:
    """Records by key; the same job put twice is one row.

    Every method raises RecordError where the file cannot be read or written.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or home() / "ledger.sqlite"

    def stamp(self) -> tuple[int, int]:
        """What differs after every change: when the file was last written (ns since 1970), and its size in bytes."""
        with suppress(OSError):
            about = self.file.stat()
            return about.st_mtime_ns, about.st_size
        return 0, 0

    def put(self, records: Iterable[Record]) -> None:
        """Adds records, replacing those of the same key: all of them or none."""
        with self._open() as connection:
            _put(connection, None, records)

    def put_logs(self, read: Iterable[Read]) -> list[Read]:
        """Notes logs as read and replaces what they held before: all of them or none.

        A log that another scan read on meanwhile is left as it is; returns those that were put.
        """
        put: list[Read] = []
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for seen, old, records in read:
                whole = records
                if old and not seen.error:
                    row = connection.execute("SELECT read_to FROM files WHERE path = ?", (seen.path,)).fetchone()
                    if not row or row["read_to"] != old.read_to:
                        continue
                    whole = continued(_of_file(connection, seen.path), records)
                connection.execute(
                    "INSERT OR REPLACE INTO files "
                    "VALUES (:path, :size, :mtime_ns, :inode, :read_to, :parser, :error, :gone)",
                    seen._asdict(),
                )
                if seen.error is None:
                    connection.execute("DELETE FROM runs WHERE file = ?", (seen.path,))
                    if seen.path.endswith(f"/{RECORDS}"):  # logs of an experiment that was not collected yet
                        under = _literal(seen.path.removesuffix(RECORDS)) + "%"
                        connection.execute("DELETE FROM runs WHERE file LIKE ? ESCAPE '\\'", (under,))
                    _put(connection, seen.path, whole)
                put.append(Read(seen, old, whole))
        return put

    def seen(self) -> dict[str, Seen]:
        """Every log that was ever read, by path."""
        with self._open() as connection:
            connection.row_factory = None
            rows = connection.execute(f"SELECT {', '.join(Seen._fields)} FROM files")
            return {row[0]: Seen(*row) for row in rows}

    def mark_gone(self, paths: Iterable[str]) -> None:
        """Notes that logs are not there any more; their records stay."""
        with self._open() as connection:
            connection.executemany("UPDATE files SET gone = 1 WHERE path = ?", [(path,) for path in paths])

    def join_reports(self, fits: Callable[[Record, float], bool]) -> None:
        """Makes one run of a job's log and of what the scheduler reports of that job.

        `fits` says whether a job ran at a moment, such as when a log was last written to (seconds since 1970): of
        several logs that name the job, one of which that is true comes first. Each keeps its own record, and what is
        searched and shown is both.
        """
        with self._open() as connection:
            connection.execute("UPDATE runs SET part_of = NULL WHERE part_of IS NOT NULL")
            reports = connection.execute(
                f"SELECT key, job_id, record FROM {_BOTH} WHERE framework = ? AND job_id IS NOT NULL", (SCHEDULER,)
            ).fetchall()
            for row in reports:
                report = Record.model_validate_json(row["record"])
                # Of ours the key says which cluster's job it is: that of this ledger.
                runs = connection.execute(
                    f"SELECT runs.key, record, mtime_ns FROM {_BOTH} LEFT JOIN files ON path = file "
                    "WHERE framework IS NOT :of AND job_id = :job AND file IS NOT NULL AND experiment IS NULL "
                    f"OR runs.key = :of || ':' || :job ORDER BY {_IN_ORDER}",
                    {"of": SCHEDULER, "job": row["job_id"]},
                ).fetchall()
                if runs and report.state.ended:
                    fitting = [run for run in runs if fits(report, (run["mtime_ns"] or 0) / 1e9)]
                    key, record, _ = (fitting or runs)[-1]
                    both = joined(Record.model_validate_json(record), report)
                    names = ", ".join(f"{name} = ?" for name in COLUMNS)
                    values = [_value(both, path) for path in COLUMNS.values()]
                    connection.execute(f"UPDATE runs SET {names} WHERE key = ?", [*values, key])
                    connection.execute("UPDATE runs SET part_of = ? WHERE key = ?", (key, row["key"]))

    def of_file(self, path: str) -> list[Record]:
        """The records of one log, in its order."""
        with self._open() as connection:
            return _of_file(connection, path)

    def records(self, *, device: str | None = None, state: State | None = None) -> list[Record]:
        """Records that match, newest first."""
        given = {key: value for key, value in {"device": device, "state": state}.items() if value is not None}
        return self.search(given)[0]

    def search(
        self, equal: Mapping[str, Any], *, like: Mapping[str, str] | None = None, since: str | None = None,
        until: str | None = None, sort: str = "-started", limit: int | None = None, offset: int = 0,
    ) -> tuple[list[Record], int]:  # fmt: skip
        """A page of the records that match (null: of those that have none; a list: any of it), and how many do in all.

        Raises RecordError for an unknown column.
        """
        column = sort.removeprefix("-")
        for name in [*equal, *(like or {}), column]:
            if name not in COLUMNS:
                raise RecordError(f"runs cannot be searched by {name!r}: choose from {', '.join(COLUMNS)}")
        parts = [_one_of(name, value) for name, value in equal.items()] + [
            f"{name} LIKE ? ESCAPE '\\'" for name in like or {}
        ]
        given = [each for value in equal.values() for each in (value if isinstance(value, list) else [value])]
        values = [*given, *(f"%{_literal(text)}%" for text in (like or {}).values())]
        for bound, operator in ((since, ">="), (until, "<")):
            if bound:
                parts.append(f"started {operator} ?")
                values.append(bound)
        where = " AND ".join([*parts, "part_of IS NULL"])
        order = f"{column} IS NULL, {column} {'DESC' if sort.startswith('-') else 'ASC'}, key"
        with self._open() as connection:
            (total,) = connection.execute(f"SELECT count(*) FROM runs WHERE {where}", values).fetchone()
            rows = connection.execute(
                f"SELECT runs.key, record FROM {_BOTH} WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?",
                [*values, -1 if limit is None else limit, offset],
            )
            return [_whole(connection, row) for row in rows], total

    def distinct(self, column: str) -> list[Any]:
        """Every value of a column that can be searched."""
        assert column in COLUMNS, column
        with self._open() as connection:
            return [row[0] for row in connection.execute(f"SELECT DISTINCT {column} FROM runs WHERE {column} NOT NULL")]

    def get(self, key: str) -> Record | None:
        """The record of that key, or null."""
        with self._open() as connection:
            row = connection.execute("SELECT key, record FROM records WHERE key = ?", (key,)).fetchone()
            return _whole(connection, row) if row else None

    def forget(self, key: str) -> bool:
        """Removes a record; says whether it was there. Its log is not read again unless it changes."""
        with self._open() as connection:
            return connection.execute("DELETE FROM runs WHERE key = ?", (key,)).rowcount > 0

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.file, timeout=BUSY_S)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            try:
                with connection:
                    _prepare(connection)
                    yield connection
            finally:
                connection.close()
        except (sqlite3.Error, OSError, ValidationError) as error:
            raise RecordError(
                f"the ledger {self.file} cannot be used: {error}. Mend its permissions or free disk space; or set "
                "CHIPLOG_HOME to another folder, and collect the experiments again to rebuild it there"
            ) from error


def _prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables; of an older version, its records are carried over."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")  # two processes may find it old at once
    if connection.execute("PRAGMA user_version").fetchone()[0] == VERSION:
        return
    if version > VERSION:
        raise sqlite3.DatabaseError(f"it is of version {version}, made by a newer chiplog: update chiplog")
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    table = "records" if "records" in tables else "runs"
    old = [row[0] for row in connection.execute(f"SELECT record FROM {table}")] if table in tables else []
    for name in ("records", "runs", "files"):  # logs are read again
        connection.execute(f"DROP TABLE IF EXISTS {name}")
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    known = [Record.model_validate_json(text) for text in old]
    # What was read of a log is read again, as far as it is still there.
    _put(connection, None, [r for r in known if not (r.key.startswith("log:") and any(map(os.path.exists, r.logs)))])
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _whole(connection: sqlite3.Connection, row: sqlite3.Row) -> Record:
    """A run's own record, with what the scheduler reports of it."""
    record = Record.model_validate_json(row["record"])
    for part in connection.execute(f"SELECT record FROM {_BOTH} WHERE part_of = ?", (row["key"],)):
        record = joined(record, Record.model_validate_json(part["record"]))
    return record


def _of_file(connection: sqlite3.Connection, path: str) -> list[Record]:
    rows = connection.execute(f"SELECT record FROM {_BOTH} WHERE file = ? ORDER BY {_IN_ORDER}", (path,))
    return [Record.model_validate_json(row["record"]) for row in rows]


def _put(connection: sqlite3.Connection, file: str | None, records: Iterable[Record]) -> None:
    marks = ", ".join("?" * (len(COLUMNS) + 3))
    records = list(records)
    rows = [(r.key, file, None, *(_value(r, path) for path in COLUMNS.values())) for r in records]
    connection.executemany(f"INSERT OR REPLACE INTO runs VALUES ({marks})", rows)
    texts = [(r.key, r.model_dump_json(exclude_none=True)) for r in records]
    connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", texts)


def _value(record: Record, path: str) -> Any:
    place, _, name = path.rpartition(".")
    if place == "config":
        value = record.config.get(name)
    else:
        value = getattr(record.usage if place else record, name)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return value if isinstance(value, int | float | str) else None


def _one_of(name: str, value: Any) -> str:
    return f"{name} IN ({', '.join('?' * len(value))})" if isinstance(value, list) else f"{name} IS ?"


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
