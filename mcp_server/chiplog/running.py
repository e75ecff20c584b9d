"""Submitting an experiment's runs, following them, and ending them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from chiplog.collect import is_evaluated, jobs_of
from chiplog.engines import Job, engine_for
from chiplog.errors import ChiplogError, EngineError, NotFoundError, PlanError, RenderError
from chiplog.files import write_atomic
from chiplog.folder import ExperimentFolder, Submission
from chiplog.ledger.metrics import Start, Step, of_job, read_events
from chiplog.plan import Run, read_config
from chiplog.record import Prediction, State
from chiplog.render import WRITING, refuse_links
from chiplog.schema import Frozen
from chiplog.sizing import PlannedRun
from chiplog.trainer_files import load_trainer_file

POLL_S = 0.5
TAIL_BYTES = 64_000


class RunStatus(Frozen):
    """How one run stands."""

    run: str = Field(description="Name of the run.")
    state: State | None = Field(description="State of its last job; null if it was never submitted.")
    reason: str | None = Field(description="Why, where there is something to say.")
    attempt: int = Field(description="Which attempt this is; 0 before the first.")
    job_id: str | None = Field(description="Id of its last job.")
    elapsed_s: float | None = Field(description="Seconds since it started, or that it took.")
    step: int | None = Field(description="Optimiser steps done.")
    total_steps: int | None = Field(description="Optimiser steps planned.")
    loss: float | None = Field(description="Loss of the last step.")
    training_left_s: float | None = Field(description="Seconds of training left, at the median speed of its own steps.")
    log: str | None = Field(description="File that its output goes to.")


def pick_runs(folder: ExperimentFolder, names: Sequence[str] | None) -> list[str]:
    """The names, or those of all runs: of the plan, and of the jobs, which can be followed without it.

    Raises NotFoundError for a name that neither has.
    """
    submitted = [submission.run for submission in folder.submissions()]
    try:
        planned = [run.name for run in folder.runs()]
    except ChiplogError:  # a plan or code that is broken does not hide the jobs
        if not submitted:
            raise
        planned = []
    known = list(dict.fromkeys([*planned, *submitted]))
    if unknown := [name for name in names or [] if name not in known]:
        raise NotFoundError(f"the plan has no run {unknown[0]!r}: it has {', '.join(sorted(known))}")
    return [name for name in known if not names or name in names]


def to_submit(folder: ExperimentFolder, names: Sequence[str]) -> list[Run]:
    """The runs that have no job that waits, runs or completed with scores: new ones, and those that ended otherwise.

    A run whose training is done only evaluates when it is submitted again. Raises RenderError if something is gone
    that their jobs would read, or is not what the plan says.
    """
    standing = {name: job.state for name, (_, job) in latest_jobs(folder).items() if job}
    settled = {
        name
        for name, state in standing.items()
        if not state.ended or (state is State.COMPLETED and is_evaluated(folder, name))
    }
    runs = [run for run in folder.runs() if run.name in names and run.name not in settled]
    needed = [f"code/recipes/{name}.py" for name in sorted({run.recipe or "evaluate" for run in runs})]
    needed += ["code/REVISION", *(f"runs/{run.name}/{file}" for run in runs for file in ("config.yaml", "run.sbatch"))]
    if gone := [name for name in needed if runs and not (folder.path / name).is_file()]:
        raise RenderError(f"{folder.path} lacks {', '.join(gone[:3])}: set it up again with setup_experiment_dirs")
    for run in runs:
        if read_config(folder.path / "runs" / run.name / "config.yaml") != run.config:
            raise RenderError(
                f"runs/{run.name}/config.yaml is not what plan.yaml says: set {folder.path.name} up again with "
                "setup_experiment_dirs, or plan what you want under another name"
            )
    return runs


def latest_jobs(folder: ExperimentFolder) -> dict[str, tuple[Submission, Job | None]]:
    """The last submission of each run, and its job as the engine sees it."""
    newest = {submission.run: submission for submission in folder.submissions()}
    jobs = jobs_of(list(newest.values()))
    return {run: (submission, jobs.get(submission.key)) for run, submission in newest.items()}


def check_data_unchanged(folder: ExperimentFolder) -> None:
    """Raises PlanError if a data set is gone or differs from what was planned."""
    plan = folder.plan
    for key, path in plan.datasets.items():
        rows = load_trainer_file("rows")
        try:
            found = rows.file_hash(Path(path))
        except (rows.RowsError, OSError) as error:
            raise PlanError(f"the data set {key} ({path}) cannot be read any more: {error}") from error
        if found != plan.dataset_sha256.get(key, found):
            raise PlanError(
                f"the data set {key} ({path}) has changed since it was planned: plan again, or put the old one back"
            )


def submit(folder: ExperimentFolder, rows: Sequence[PlannedRun], engine_name: str) -> list[Submission]:
    """Queues one job a run, each with its prediction on record before it starts.

    Raises EngineError if the engine refuses. Whatever stops it, the folder is as it was and nothing runs of it.
    """
    engine = engine_for(engine_name)
    attempts = {submission.run: submission.attempt for submission in folder.submissions()}
    predictions = {row.run.name: _prediction(row) for row in rows}
    names = {run: f"runs/{run}/estimate.json" for run in predictions}
    refuse_links(folder.path, names.values())
    before = {name: (folder.path / name).read_bytes() for name in names.values() if (folder.path / name).is_file()}
    jobs: list[Job] = []
    with WRITING:
        try:
            for run, prediction in predictions.items():
                write_atomic(folder.path / names[run], prediction.model_dump_json(indent=1).encode() + b"\n")
            jobs = engine.submit([folder.path / "runs" / run / "run.sbatch" for run in predictions])
            done = [
                Submission(run=run, engine=engine_name, job_id=job.id, attempt=attempts.get(run, 0) + 1, predicted=said)
                for (run, said), job in zip(predictions.items(), jobs, strict=True)
            ]
            folder.add(done)
        except BaseException:
            if jobs:
                engine.cancel([job.id for job in jobs])  # a job that nobody knows of would run twice
            with suppress(OSError):
                for name in names.values():
                    (folder.path / name).unlink(missing_ok=True)
                    if name in before:
                        write_atomic(folder.path / name, before[name])
            raise
    return done


def _prediction(row: PlannedRun) -> Prediction:
    estimate = row.estimate
    elapsed, peak = estimate.elapsed, estimate.peak_mem
    return Prediction(
        elapsed_s=(elapsed.value, elapsed.low, elapsed.high) if elapsed else None,
        peak_mem_bytes=(peak.value, peak.low, peak.high) if peak else None,
        mem_kind=estimate.mem_kind,
        basis=estimate.basis,
        mem_basis=peak.basis if peak else None,
        longest_pass_tokens=row.trained.tokens_longest_pass if row.trained else None,
    )


def status(folder: ExperimentFolder, runs: Sequence[str]) -> list[RunStatus]:
    """How the runs of these names stand: one question to the engine, and a look at each run's metrics."""
    standing = latest_jobs(folder)
    return [_status(folder, run, *standing.get(run, (None, None))) for run in runs]


def _status(folder: ExperimentFolder, run: str, submission: Submission | None, job: Job | None) -> RunStatus:
    state = job.state if job else State.UNKNOWN if submission else None
    events = of_job(read_events(folder.path / "runs" / run / "metrics.jsonl"), job.started if job else None)
    steps = [event for event in events if isinstance(event, Step)]
    total = next((event.total_steps for event in events if isinstance(event, Start)), None)
    left = None
    if steps and total and state is State.RUNNING:
        left = statistics.median(step.seconds for step in steps[-50:]) * (total - steps[-1].step)
    return RunStatus(
        run=run,
        state=state,
        reason=job.reason if job else "the engine no longer knows its job" if submission else "not submitted yet",
        attempt=submission.attempt if submission else 0,
        job_id=submission.job_id if submission else None,
        elapsed_s=_elapsed(job),
        step=steps[-1].step if steps else None,
        total_steps=total,
        loss=steps[-1].loss if steps else None,
        training_left_s=left,
        log=str(job.log) if job else None,
    )


def _elapsed(job: Job | None) -> float | None:
    if not job or not job.started:
        return None
    end = datetime.fromisoformat(job.ended) if job.ended else datetime.now(UTC)
    return (end - datetime.fromisoformat(job.started)).total_seconds()


def wait(
    folder: ExperimentFolder,
    runs: Sequence[str],
    limit_s: float,
    progress: Callable[[float, float | None, str], None] | None,
) -> list[RunStatus]:
    """Looks until every submitted job has ended or `limit_s` is over, and says how the runs stand then."""
    give_up = time.monotonic() + limit_s
    while True:
        found = status(folder, runs)
        if progress:
            progress(*_progress(found))
        if all(not row.state or row.state.ended for row in found) or time.monotonic() > give_up:
            return found
        time.sleep(POLL_S)


def _progress(rows: Sequence[RunStatus]) -> tuple[float, float, str]:
    """Runs done (a running one counts by its steps, most of the way), runs in all, and what is running."""
    done = 0.0
    for row in rows:
        if row.state and row.state.ended:
            done += 1
        elif row.step and row.total_steps:
            done += 0.8 * row.step / row.total_steps
    running = [row.run for row in rows if row.state is State.RUNNING]
    return done, float(len(rows)), ", ".join(running) or "waiting"


def log_tail(status_row: RunStatus, lines: int) -> list[str]:
    """The last lines of a run's log; of a progress bar, its last state. Raises NotFoundError if there is none."""
    if not status_row.log or not Path(status_row.log).is_file():
        why = "it has not started" if status_row.elapsed_s is None else f"{status_row.log} is gone"
        raise NotFoundError(f"{status_row.run} has no log: {why}")
    with Path(status_row.log).open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return [
        line.rpartition("\r")[2] if not line.endswith("\r") else line for line in text.split("\n")[-lines - 1 :] if line
    ]


def cancel(folder: ExperimentFolder, names: Sequence[str] | None) -> list[str]:
    """Ends the jobs of these runs (null: of all) that have not ended; returns the runs' names. Needs no run folder.

    Raises EngineError if there is none to end.
    """
    standing = latest_jobs(folder)
    if unknown := [name for name in names or [] if name not in standing]:
        raise NotFoundError(
            f"{unknown[0]!r} has no job: those of {', '.join(sorted(standing)) or 'no run'} were submitted"
        )
    chosen = [
        submission
        for name, (submission, job) in standing.items()
        if job and not job.state.ended and (not names or name in names)
    ]
    if not chosen:
        raise EngineError("no job of these runs waits or runs: there is nothing to cancel")
    for name in sorted({submission.engine for submission in chosen}):
        engine_for(name).cancel([submission.job_id for submission in chosen if submission.engine == name])
    return [submission.run for submission in chosen]
