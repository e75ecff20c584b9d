"""Following an experiment's runs, and ending them."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chiplog.collect import is_gone, jobs_of, remembered
from chiplog.engines import Job, engine_for
from chiplog.errors import ChiplogError, EngineError, NotFoundError, in_words
from chiplog.folder import ExperimentFolder, Submission
from chiplog.ledger.metrics import of_job, read_events
from chiplog.progress import RunStatus, describe
from chiplog.record import State

TAIL_BYTES = 64_000
LINE = 1000  # characters of a line of a log that are shown
# What would do something to the terminal that it is shown on.
FOR_TERMINALS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f]")


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


def latest_jobs(folder: ExperimentFolder) -> dict[str, tuple[Submission, Job | None]]:
    """The last submission of each run, and its job as the engine sees it."""
    newest = {submission.run: submission for submission in folder.submissions()}
    jobs = jobs_of(folder, list(newest.values()))
    jobs |= remembered(folder, [one for one in newest.values() if is_gone(jobs.get(one.key))])
    return {run: (submission, jobs.get(submission.key)) for run, submission in newest.items()}


def status(folder: ExperimentFolder, names: Sequence[str]) -> list[RunStatus]:
    """How the runs of these names stand: one question to the engine, and a look at each run's metrics."""
    standing, waiting = latest_jobs(folder), waiting_runs(folder)
    try:
        planned = {run.name: run for run in folder.runs()}
    except ChiplogError:  # a plan or code that is broken does not hide the jobs
        planned = {}
    found = []
    for name in names:
        submission, job = standing.get(name, (None, None))
        if name in waiting:
            found.append(_waits(name, waiting[name]))
        elif submission and job:
            events = of_job(read_events(folder.path / "runs" / name / "metrics.jsonl"), job.started)
            found.append(
                describe(
                    name, job, submission.attempt, submission.job_id, events, planned.get(name), submission.predicted
                )
            )
        elif submission:
            gone = _nothing(name, State.UNKNOWN, "the engine no longer knows its job")
            found.append(gone.model_copy(update={"attempt": submission.attempt, "job_id": submission.job_id}))
        else:
            found.append(_nothing(name, None, "not submitted yet"))
    return found


def _nothing(name: str, state: State | None, reason: str) -> RunStatus:
    """A run of which no job is known."""
    unknown = dict.fromkeys(("job_id", "elapsed_s", "step", "total_steps", "loss", "training_left_s", "log"))
    return RunStatus(run=name, state=state, reason=reason, attempt=0, **unknown)  # pyright: ignore[reportArgumentType]


def waiting_runs(folder: ExperimentFolder) -> dict[str, Job | None]:
    """The runs that wait for room in the queue, and the job that submits them."""
    closing = folder.closing()
    if not closing or not closing.runs:
        return {}
    job = next(iter(engine_for(closing.engine).jobs([closing.job_id])), None)
    return dict.fromkeys(closing.runs, job)


def _waits(name: str, job: Job | None) -> RunStatus:
    """A run that found no room; `job` is the one that submits it."""
    if job and not job.state.ended:
        return _nothing(name, State.PENDING, f"waits for room in the queue: job {job.id} submits it")
    what = f"ended {job.state}" if job else "is gone"
    return _nothing(name, None, f"the job that was to submit it {what}: submit the experiment again")


def wait(
    folder: ExperimentFolder,
    runs: Sequence[str],
    limit_s: float,
    progress: Callable[[float, float | None, str], None] | None,
) -> list[RunStatus]:
    """Looks until every submitted job has ended or `limit_s` is over, and says how the runs stand then."""
    give_up = time.monotonic() + limit_s
    pause = max((engine_for(name).poll_s for name in {one.engine for one in folder.submissions()}), default=0.5)
    while True:
        found = status(folder, runs)
        if progress:
            progress(*_progress(found))
        if all(not row.state or row.state.ended for row in found) or time.monotonic() > give_up:
            return found
        time.sleep(min(pause, max(0.0, give_up - time.monotonic())))


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
    last = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")[-lines - 1 :]]
    return [FOR_TERMINALS.sub("", line)[:LINE] for line in last if line]


def cancel(folder: ExperimentFolder, names: Sequence[str] | None) -> list[str]:
    """Ends the jobs of these runs (null: of all) that have not ended; returns the runs' names. Needs no run folder.

    Raises EngineError if there is none to end.
    """
    standing, waiting = latest_jobs(folder), waiting_runs(folder)
    if unknown := [name for name in names or [] if name not in {**standing, **waiting}]:
        raise NotFoundError(
            f"{unknown[0]!r} has no job: those of {', '.join(sorted(standing)) or 'no run'} were submitted"
        )
    chosen = [
        submission
        for name, (submission, job) in standing.items()
        if job and not job.state.ended and (not names or name in names)
    ]
    dropped = [name for name in waiting if not names or name in names]
    if not chosen and not dropped:
        raise EngineError("no job of these runs waits or runs: there is nothing to cancel")
    closing = folder.closing()
    unwritten: OSError | None = None
    try:
        if closing and dropped:  # first: a job that ends meanwhile would submit them
            folder.close(closing.model_copy(update={"runs": [name for name in waiting if name not in dropped]}))
        folder.cancelled({submission.key for submission in chosen})
    except OSError as error:  # what fills the disk must be possible to end
        unwritten = error
    if closing and not names:
        engine_for(closing.engine).cancel([closing.job_id])
    for name in sorted({submission.engine for submission in chosen}):
        engine_for(name).cancel(
            [job for submission in chosen if submission.engine == name for job in submission.job_ids]
        )
    if unwritten:
        raise EngineError(
            f"the jobs were cancelled, which could not be noted ({in_words(unwritten)}): mend that, and cancel again, "
            "or runs that waited for room may still be submitted"
        )
    return [*(submission.run for submission in chosen), *dropped]


def prunable(folder: ExperimentFolder, names: Sequence[str]) -> dict[str, int]:
    """The runs that are trained and have checkpoints still, and the bytes of these."""
    found = {}
    for name in names:
        run = folder.path / "runs" / name
        if run.is_symlink():  # somebody else's files
            continue
        if (run / "DONE").is_file() and (run / "checkpoints").is_dir() and not (run / "checkpoints").is_symlink():
            files = [file for file in (run / "checkpoints").rglob("*") if file.is_file() and not file.is_symlink()]
            found[name] = sum(file.stat().st_size for file in files)
    return found


def prune(folder: ExperimentFolder, names: Sequence[str]) -> None:
    """Removes the checkpoints of these runs. Raises OSError for what cannot be removed."""
    for name in names:
        shutil.rmtree(folder.path / "runs" / name / "checkpoints")
