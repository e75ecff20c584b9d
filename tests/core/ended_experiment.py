"""An experiment whose jobs have ended, without a process; what tests ask of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chiplog import running, tools
from chiplog.collect import collect
from chiplog.engines import LocalEngine
from chiplog.folder import ExperimentFolder, Submission
from chiplog.ledger import Ledger
from chiplog.record import Record, State

START = {
    "event": "start",
    "started": "2026-01-01T00:00:01+00:00",
    "device": "cpu",
    "n_params": 1000,
    "total_steps": 4,
    "setup_s": 0.5,
    "packages": {"torch": "2"},
}
STEP = {
    "event": "step",
    "step": 1,
    "loss": 2.5,
    "tokens": 80,
    "seconds": 0.25,
    "peak_mem_bytes": 1000,
    "mem_kind": "host_rss",
}
SCORES = {
    "n": 10,
    "scores": {"exact_match": {"count": 7, "n": 10}},
    "ended": "2026-01-01T00:00:08+00:00",
    "setup_s": 0.1,
    "seconds": 0.2,
    "peak_mem_bytes": 2000,
    "mem_kind": "host_rss",
    "device": "cpu",
}


@pytest.fixture
def folder(lab: Path) -> ExperimentFolder:
    """An experiment of one run and its control, whose jobs have ended; no process was started for it."""
    asked = {"question": "Which?", "name": "e", "models": {"S": "small"}, "dataset": "words"}
    tools.plan_experiment(**asked, variables={"lora_rank": [4]})
    tools.setup_experiment_dirs("e")
    made = ExperimentFolder(lab / "experiments" / "e")
    made.add([Submission(run=run, engine="local", job_id=end_job(made, run), attempt=1) for run in ("rank4", "S_base")])
    for run in ("rank4", "S_base"):
        (made.path / "runs" / run / "eval").mkdir()
        (made.path / "runs" / run / "eval" / "scores.json").write_text(json.dumps(SCORES))
    lines = [START, *({**STEP, "step": number} for number in (1, 2, 3, 4))]
    write_lines(made.path / "runs" / "rank4" / "metrics.jsonl", lines)
    (made.path / "runs" / "rank4" / "DONE").write_text("{}")
    return made


def end_job(folder: ExperimentFolder, run: str, state: State = State.COMPLETED) -> str:
    """The id of a job for that run, in the queue as if it had ended."""
    path = folder.path / "runs" / run
    times = ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00.500+00:00", "2026-01-01T00:00:09+00:00")
    with LocalEngine().open() as queue:
        cursor = queue.execute(
            "INSERT INTO queue (name, script, log, cpus, gpus, bin, state, exit_code, submitted, started, ended) "
            "VALUES (?, ?, ?, 1, 0, '', ?, 0, ?, ?, ?)",
            (run, str(path / "run.sbatch"), str(path / "slurm-1.out"), state, *times),
        )
    return str(cursor.lastrowid)


def write_lines(file: Path, values: list[Any]) -> None:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))


def collected(folder: ExperimentFolder) -> dict[str, Record]:
    return {str(record.run): record for record in collect(folder, Ledger())}


def states(folder: ExperimentFolder) -> dict[str, State | None]:
    return {row.run: row.state for row in running.status(folder, running.pick_runs(folder, None))}
