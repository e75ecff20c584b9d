"""What Slurm's accounting says of jobs, where its command is there."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from chiplog.errors import EngineError
from chiplog.ledger.parse import parse_log
from chiplog.record import Record

COMMAND = "sacct"
FIELDS = "JobID,JobIDRaw,State,Elapsed,Timelimit,Start,End,ExitCode,MaxRSS,AllocTRES"
MOST = 500  # jobs that are asked for at once
PATIENCE_S = 60
LATE_S = 3600  # a log may be written to, or touched, for so long after its job


def ask(job_ids: Sequence[str]) -> Iterator[Record]:
    """A record of each job that sacct knows; none where there is no sacct. Raises EngineError if it fails."""
    if not job_ids or not shutil.which(COMMAND):
        return
    for start in range(0, len(job_ids), MOST):
        asked = job_ids[start : start + MOST]
        try:
            answer = subprocess.run(
                [COMMAND, "--parsable2", f"--format={FIELDS}", f"--jobs={','.join(asked)}"],
                capture_output=True, timeout=PATIENCE_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"sacct did not answer ({error}): runs are known by their logs alone") from error
        if answer.returncode:
            words = answer.stderr.decode(errors="replace").strip()
            raise EngineError(f"sacct failed ({words}): runs are known by their logs alone")
        yield from _jobs(answer.stdout, set(asked))


def _jobs(answer: bytes, asked: set[str]) -> Iterator[Record]:
    """The jobs of an answer; a task of an array by the id that was asked for, `1234_5` or that of its own."""
    raw = dict(line.split("|")[:2] for line in answer.decode(errors="replace").splitlines() if line.count("|") > 1)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / COMMAND
        table.write_bytes(answer)
        records = parse_log(table).records
    for record in records:
        if job := record.job_id:
            job = job if job in asked else raw.get(job, job)
            yield record.model_copy(
                update={"key": f"{COMMAND}:{job}", "job_id": job, "logs": [COMMAND], "evidence": []}
            )


def ran_at(report: Record, moment: float) -> bool:
    """Whether the job ran at a moment (seconds since 1970), or a little before it."""
    if not report.started:
        return False
    began = datetime.fromisoformat(report.started).timestamp()
    ended = datetime.fromisoformat(report.ended).timestamp() if report.ended else float("inf")
    return began <= moment <= ended + LATE_S
