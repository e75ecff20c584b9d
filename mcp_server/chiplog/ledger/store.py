"""The index of past runs: one SQLite file, rebuilt at any time from the experiments' `records.jsonl`.

Rollback journal and a busy timeout, since home directories on clusters are network file systems.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from chiplog.errors import RecordError
from chiplog.home import home
from chiplog.record import Record, State

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  key TEXT PRIMARY KEY, experiment TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, recipe TEXT,
  model TEXT, device TEXT, state TEXT NOT NULL, started TEXT, record TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS runs_by_recipe ON runs (recipe, device, model);
"""
BUSY_S = 30.0


class Ledger:
    """Records by key; the same job put twice is one row.

    Every method raises RecordError where the file cannot be read or written.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or home() / "ledger.sqlite"

    def put(self, records: Iterable[Record]) -> None:
        """Adds records, replacing those of the same key: all of them or none."""
        rows = [
            (
                r.key,
                r.experiment,
                r.run,
                r.kind,
                r.recipe,
                r.model,
                r.usage.device,
                r.state,
                r.started,
                r.model_dump_json(),
            )
            for r in records
        ]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def records(self, *, device: str | None = None, state: State | None = None) -> list[Record]:
        """Records that match, newest first."""
        wanted = {"device": device, "state": state}
        given = {column: value for column, value in wanted.items() if value is not None}
        where = " AND ".join(f"{column} = :{column}" for column in given) or "1"
        with self._open() as connection:
            rows = connection.execute(f"SELECT record FROM runs WHERE {where} ORDER BY started DESC, key", given)
            return [Record.model_validate_json(text) for (text,) in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.file, timeout=BUSY_S)
            try:
                with connection:
                    connection.executescript(_SCHEMA)
                    yield connection
            finally:
                connection.close()
        except (sqlite3.Error, OSError, ValidationError) as error:
            raise RecordError(
                f"the ledger {self.file} cannot be used: {error}. Mend its permissions or free disk space; or set "
                "CHIPLOG_HOME to another folder, and collect the experiments again to rebuild it there"
            ) from error
