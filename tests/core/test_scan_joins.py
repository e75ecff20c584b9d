"""One job is one run, however it was seen: by its two files, by Slurm's accounting, or because it is our own."""

from __future__ import annotations

import os
import stat
import time
from datetime import datetime
from pathlib import Path

import pytest

from chiplog.errors import RecordError
from chiplog.folder import ExperimentFolder, Submission
from chiplog.ledger import Ledger, scan
from chiplog.record import State
from tests.core.ended_experiment import collected, end_job, folder
from tests.core.test_parsers import GPU_OOM, TRAINER

__all__ = ["folder"]

OUT = "SLURM_JOB_ID=77\n" + "".join(line for line in TRAINER.splitlines(keepends=True) if line.startswith("{"))
ERR = "".join(line for line in TRAINER.splitlines(keepends=True) if "%|" in line)
SACCT = """\
JobID|State|Elapsed|Start|End|ExitCode|MaxRSS|AllocTRES
77|TIMEOUT|01:00:00|{start}|{end}|0:0||billing=8,cpu=8,gres/gpu:a100=4
77.batch|CANCELLED|01:00:02|{start}|{end}|0:15|2048K|cpu=8
78|COMPLETED|00:10:00|{start}|{end}|0:0||cpu=8
"""


@pytest.fixture
def job(workspace: Path) -> Path:
    """A folder with the two files of one job."""
    folder = workspace / "logs"
    folder.mkdir()
    (folder / "train-77.out").write_text(OUT)
    (folder / "train-77.err").write_text(ERR)
    return folder


def sacct(start: float, end: float) -> str:
    return SACCT.format(
        start=datetime.fromtimestamp(start).isoformat(timespec="seconds"),
        end=datetime.fromtimestamp(end).isoformat(timespec="seconds"),
    )


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A sacct of our own on the path."""
    file = folder / "bin" / "sacct"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


def test_standard_output_and_error_are_one_run(job: Path):
    found = scan.scan([job], Ledger())
    (record,) = Ledger().records()
    assert (found.files, found.read, found.runs) == (2, 2, 1)
    assert (record.usage.steps, record.usage.loss_last, record.job_id) == (375, 0.75, "77")
    assert {Path(log).name for log in record.logs} == {"train-77.out", "train-77.err"}
    assert scan.scan([job], Ledger()).read == 0
    with (job / "train-77.err").open("a") as file:
        file.write("slurmstepd: error: *** JOB 77 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n")
    assert scan.scan([job], Ledger()).read == 1
    (record,) = Ledger().records()
    assert (record.state, record.usage.loss_last) == (State.TIMEOUT, 0.75)


def test_of_two_files_the_one_that_can_be_read_is(job: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise RecordError("no permission")

    parse_log = scan.parse_log
    monkeypatch.setattr(scan, "parse_job", refuse)
    monkeypatch.setattr(scan, "parse_log", lambda path: refuse() if path.suffix == ".out" else parse_log(path))
    found = scan.scan([job], Ledger())
    assert [Path(error.split(":")[0]).name for error in found.errors] == ["train-77.out"]
    assert [record.usage.steps for record in Ledger().records()] == [375]


def test_a_table_of_sacct_is_joined_with_the_logs_of_its_jobs(job: Path):
    scan.scan([job], Ledger())
    (job / "sacct.txt").write_text(sacct(time.time() - 3600, time.time()))
    scan.scan([job], Ledger())
    by_job = {record.job_id: record for record in Ledger().records()}
    assert set(by_job) == {"77", "78"}  # nobody has a log of 78, and so it is a run of its own
    run = by_job["77"]
    assert (run.state, run.usage.elapsed_s, run.usage.steps, run.usage.gpus) == (State.TIMEOUT, 3600, 375, 4)
    (job / "train-77.out").write_text(OUT + "\n")  # it is read anew, and is still one run
    scan.scan([job], Ledger())
    by_job = {record.job_id: record for record in Ledger().records()}
    assert (by_job["77"].usage.elapsed_s, len(by_job)) == (3600, 2)


def test_a_job_that_runs_is_not_joined_and_ends_no_scan(job: Path):
    (job / "sacct.txt").write_text(sacct(time.time() - 60, time.time()).replace("TIMEOUT", "RUNNING"))
    scan.scan([job], Ledger())
    states = {(record.job_id, record.framework): record.state for record in Ledger().records()}
    assert states["77", "transformers"] is State.COMPLETED and states["77", "slurm"] is State.RUNNING


def test_a_figure_that_sacct_mends_is_taken(job: Path):
    for elapsed, state in (("00:10:00", State.TIMEOUT), ("09:00:00", State.COMPLETED)):
        text = sacct(time.time() - 3600, time.time()).replace("01:00:00|", f"{elapsed}|").replace("TIMEOUT", state)
        (job / "sacct.txt").write_text(text)
        scan.scan([job], Ledger())
        run = next(record for record in Ledger().records() if record.job_id == "77")
        hours, minutes = int(elapsed[:2]), int(elapsed[3:5])
        assert (run.state, run.usage.elapsed_s) == (state, 3600 * hours + 60 * minutes)
        assert len(Ledger().records()) == 2


def test_a_job_with_many_runs_is_joined_with_its_last(job: Path):
    (job / "train-77.err").unlink()
    (job / "train-77.out").write_text("SLURM_JOB_ID=77\n" + TRAINER * 12)
    (job / "sacct.txt").write_text(sacct(time.time() - 3600, time.time()))
    scan.scan([job], Ledger())
    (last,) = [record for record in Ledger().records() if record.usage.elapsed_s == 3600]
    assert last.key.endswith(":11") and len(Ledger().of_file(str(job / "train-77.out"))) == 12


def test_logs_of_an_experiment_are_its_runs_once_it_is_collected(folder: ExperimentFolder, lab: Path):
    (folder.path / "runs" / "rank4" / "slurm-1.out").write_text(TRAINER)
    scan.scan([lab], Ledger())
    assert [record.experiment for record in Ledger().records()] == [None]
    collected(folder)
    scan.scan([lab], Ledger())
    assert {record.run for record in Ledger().records()} == {"rank4", "S_base"}


def test_the_command_is_asked_where_it_is_there(job: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    command(
        workspace,
        monkeypatch,
        f"echo \"$@\" > {workspace}/asked\ncat <<'END'\n{sacct(time.time() - 3600, time.time())}END",
    )
    assert scan.scan([job], Ledger()).errors == []
    (run,) = [record for record in Ledger().records() if record.job_id == "77"]
    assert (run.state, run.usage.elapsed_s, run.usage.steps) == (State.TIMEOUT, 3600, 375)
    assert "--jobs=77" in (workspace / "asked").read_text()


def test_a_job_of_that_number_on_another_cluster_is_not_taken_for_it(
    job: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
):
    command(workspace, monkeypatch, f"cat <<'END'\n{sacct(0, 3600)}END")
    scan.scan([job], Ledger())
    (run,) = Ledger().records()
    assert (run.state, run.usage.elapsed_s) == (State.COMPLETED, None)


def test_an_sacct_that_fails_is_named_and_the_logs_are_read(
    job: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
):
    command(workspace, monkeypatch, "echo 'no slurmdbd' >&2; exit 1")
    (error,) = scan.scan([job], Ledger()).errors
    assert "no slurmdbd" in error and len(Ledger().records()) == 1


def test_a_task_of_an_array_is_known_by_either_of_its_ids(job: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """A log may name the task as `70_1` or, as `$SLURM_JOB_ID` does, by an id of its own."""
    (job / "array-70_1.out").write_text("SLURM_JOB_ID=70_1\n" + TRAINER)
    times = [datetime.fromtimestamp(time.time() + s).isoformat(timespec="seconds") for s in (-3600, 0)]
    rows = [f"{id}|{raw}|TIMEOUT|01:00:00|{times[0]}|{times[1]}|0:0||" for id, raw in (("70_1", "71"), ("70_2", "77"))]
    answer = "\n".join(["JobID|JobIDRaw|State|Elapsed|Start|End|ExitCode|MaxRSS|AllocTRES", *rows])
    command(workspace, monkeypatch, f"cat <<'END'\n{answer}\nEND")
    assert scan.scan([job], Ledger()).errors == []
    runs = {record.job_id: record for record in Ledger().records()}
    assert {job: (run.state, run.usage.elapsed_s) for job, run in runs.items()} == dict.fromkeys(
        ("70_1", "77"), (State.TIMEOUT, 3600)
    )


def test_a_log_that_could_not_be_read_is_tried_again(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    (workspace / "train.log").write_text(TRAINER)

    def refuse(*_: object) -> None:
        raise RecordError("no permission")

    with monkeypatch.context() as refused:
        refused.setattr(scan, "parse_log", refuse)
        assert len(scan.scan([workspace / "train.log"], Ledger()).errors) == 1
    assert scan.scan([workspace / "train.log"], Ledger()).runs == 1
    assert scan.scan([workspace / "train.log"], Ledger()).read == 0


def test_our_own_runs_are_there_without_a_scan_and_once(folder: ExperimentFolder, lab: Path):
    log = folder.path / "runs" / "rank4" / "slurm-1.out"
    log.write_text(TRAINER)
    collected(folder)
    own = {record.key: record for record in Ledger().records()}
    assert {record.run for record in own.values()} == {"rank4", "S_base"}
    run = next(record for record in own.values() if record.run == "rank4")
    assert run.logs == [str(log)] and run.job_id and {entry.of for entry in run.evidence} >= {"loss_last"}
    assert run.usage.steps == 4  # what the job itself noted, and not what its log prints
    scan.scan([lab], Ledger())
    assert {record.key: record for record in Ledger().records()} == own
    Ledger().file.unlink()  # a new ledger finds them in the experiment's folder
    scan.scan([lab], Ledger())
    assert {record.key: record for record in Ledger().records()} == own


def test_a_job_of_ours_that_ran_out_of_memory_says_so(folder: ExperimentFolder):
    made = ExperimentFolder(folder.path)
    made.add([Submission(run="S_base", engine="local", job_id=end_job(made, "S_base", State.FAILED), attempt=2)])
    (folder.path / "runs" / "S_base" / "slurm-1.out").write_text(f"Traceback (most recent call last):\n{GPU_OOM}\n")
    record = collected(folder)["S_base"]
    assert record.state is State.OUT_OF_MEMORY and record.oom and record.oom.kind == "gpu"
