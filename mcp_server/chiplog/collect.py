"""From what the jobs left behind to Records: one for each attempt, in `records.jsonl` and in the ledger."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from chiplog.deviation import read_deviation
from chiplog.engines import Job, engine_for, followed, withdrawn
from chiplog.errors import ChiplogError, RecordError
from chiplog.folder import ExperimentFolder, Submission
from chiplog.ledger import Ledger
from chiplog.ledger.metrics import (
    End,
    Start,
    not_before,
    of_job,
    read_events,
    read_guards,
    read_scores,
    trace,
    train_usage,
    with_evaluation,
)
from chiplog.ledger.parse import parse_log
from chiplog.plan import Run
from chiplog.provenance import Revision
from chiplog.record import Record, State, Trace, Usage, read_records, write_records

LOG_TAIL = 64_000  # bytes of a log in which the reason of a failure is looked for
ERROR_LINE = re.compile(r"^(error: .*|[\w.]*(?:Error|Exception|Interrupt)\b.*|.*Killed.*)$", re.MULTILINE)


def collect(folder: ExperimentFolder, ledger: Ledger) -> list[Record]:
    """The records of all submitted jobs, in the order of the plan's runs; `records.jsonl` and the ledger hold them too.

    An attempt that had ended when it was last collected is kept as it was recorded, and so is one whose job is not
    listed any more.
    """
    runs = {run.name: run for run in folder.runs()}
    submissions = folder.submissions()
    known = {record.key: record for record in read_records(folder.path / "records.jsonl")}
    jobs = jobs_of(folder, submissions)
    newest = {submission.run: submission for submission in submissions}
    revision = _revision(folder)
    for submission in submissions:
        old, job = known.get(submission.key), jobs.get(submission.key)
        is_newest = newest[submission.run] is submission
        settled = old and old.state.ended and not (job and is_newest and _may_have_changed(folder, old, job))
        if submission.run in runs and not settled:
            known[submission.key] = _record(folder, runs[submission.run], submission, job, is_newest, revision)
    order = {name: place for place, name in enumerate(runs)}
    records = sorted(known.values(), key=lambda record: (order.get(record.run or "", len(order)), record.attempt))
    write_records(folder.path / "records.jsonl", records)
    ledger.put([record for record in records if record.state.ended])
    return records


def _revision(folder: ExperimentFolder) -> Revision | None:
    """What `code/REVISION` says; null where it cannot be read."""
    with suppress(OSError, ValidationError):
        return Revision.model_validate_json((folder.path / "code" / "REVISION").read_bytes())


def _may_have_changed(folder: ExperimentFolder, record: Record, job: Job) -> bool:
    """Whether its job was not known to have ended, or was evaluated again since."""
    if job.state is State.UNKNOWN:  # what was known of it is more
        return False
    if record.state is State.UNKNOWN or job.ended is None:
        return True
    if record.kind == "train":  # it has no evaluation that could come later
        return False
    try:
        evaluation = read_scores(folder.path / "runs" / str(record.run) / "eval" / "scores.json")
    except RecordError:
        return True
    return evaluation is None or not_before(evaluation.ended, job.ended)


def is_done(folder: ExperimentFolder, run: Run) -> bool:
    """Whether a run has its result: scores that can be read, or of one that is not scored, DONE."""
    home = folder.path / "runs" / run.name
    if run.kind == "train":
        return (home / "DONE").is_file()
    try:
        return read_scores(home / "eval" / "scores.json") is not None
    except RecordError:
        return False


def jobs_of(folder: ExperimentFolder, submissions: Sequence[Submission]) -> dict[str, Job]:
    """How what was submitted stands, by key: one question to each engine, however many jobs."""
    found: dict[str, Job] = {}
    for name in sorted({submission.engine for submission in submissions}):
        own = [submission for submission in submissions if submission.engine == name]
        jobs = {job.id: job for job in engine_for(name).jobs([number for one in own for number in one.job_ids])}
        for one in own:
            first, then = jobs.get(one.job_id), jobs.get(one.eval_job_id or "")
            if one.cancelled and is_gone(first):
                first = withdrawn(one.job_id, one.run)
            if one.cancelled and one.eval_job_id and is_gone(then):
                then = withdrawn(one.eval_job_id, one.run)
            if then and is_gone(first) and then.state in (State.PENDING, State.RUNNING, State.COMPLETED):
                # Forgotten, and the job that waits for its good end lives, or has ended well.
                first = then.model_copy(update={"id": one.job_id, "state": State.COMPLETED, "ran_s": None})
            if first:
                job = followed(first, then)
                # Slurm's logs are named as the scripts say, in the run's folder, which may have been moved since.
                home = folder.path / "runs" / one.run
                log = home / job.log
                found[one.key] = job.model_copy(update={"log": log if log.is_file() else home / job.log.name})
    return found


def remembered(folder: ExperimentFolder, submissions: Sequence[Submission]) -> dict[str, Job]:
    """Jobs that their engine has forgotten, by key: as they were recorded, or by the result that they left."""
    found: dict[str, Job] = {}
    if not submissions:
        return found
    with suppress(ChiplogError):  # records, plan or code that cannot be read say nothing
        records = {record.key: record for record in read_records(folder.path / "records.jsonl")}
        done = {run.name for run in folder.runs() if is_done(folder, run)}
        for one in submissions:
            home, record = folder.path / "runs" / one.run, records.get(one.key)
            if record and record.state.ended and record.state is not State.UNKNOWN:
                known = {key: getattr(record, key) for key in ("state", "reason", "exit_code", "started", "ended")}
            elif one.run in done:
                known = {"state": State.COMPLETED, "reason": "its engine has forgotten it; its result is there"}
            else:
                continue
            log = max(home.glob("slurm-*.out"), key=lambda log: log.stat().st_mtime, default=home / "slurm.out")
            found[one.key] = Job(id=one.job_id, name=one.run, submitted=None, log=log, **known)
    return found


def is_gone(job: Job | None) -> bool:
    """Whether its engine has forgotten it."""
    return job is None or job.state is State.UNKNOWN


def _record(
    folder: ExperimentFolder, run: Run, submission: Submission, job: Job | None, newest: bool, revision: Revision | None
) -> Record:
    run_folder = folder.path / "runs" / run.name
    state = job.state if job else State.UNKNOWN
    reason = job.reason if job else "the engine no longer knows this job"
    if state is State.FAILED and job and (words := _last_error(job.log)):
        reason = f"{reason}: {words}"
    usage, metrics, packages, diverged = Usage(), {}, {}, None
    traced, guards = Trace(), []
    steps: dict[str, State] = {}
    if newest:  # the folder holds what the last attempt left
        every = read_events(run_folder / "metrics.jsonl")
        events = of_job(every, job.started if job else None)
        usage = train_usage(events)
        packages = next((event.packages for event in events if isinstance(event, Start)), {})
        diverged = next((event.diverged for event in reversed(events) if isinstance(event, End)), None)
        is_scored = run.kind != "train"
        if run.kind != "control":
            traced, guards = trace(every), read_guards(run_folder / "guards.json")
            trained = (run_folder / "DONE").is_file() or (job is not None and job.part == "evaluation")
            steps["train"] = State.COMPLETED if trained else state
        evaluation = None
        try:
            evaluation = read_scores(run_folder / "eval" / "scores.json") if is_scored else None
        except RecordError as error:
            if state is State.COMPLETED:
                state, reason = State.FAILED, str(error)
        if evaluation and job and job.started and not_before(evaluation.ended, job.started):
            usage, metrics = with_evaluation(usage, evaluation), evaluation.scores
            steps["eval"] = State.COMPLETED
        elif is_scored and steps.get("train", State.COMPLETED) is State.COMPLETED:
            steps["eval"] = State.INCOMPLETE if state is State.COMPLETED else state
        elif is_scored and state.ended:
            steps["eval"] = State.CANCELLED  # it waits for a training that ended well
    deviation = read_deviation(run_folder) if newest else None
    told = _told(job)
    if told and told.state is State.OUT_OF_MEMORY and state is State.FAILED:
        state = told.state
    return Record(
        key=submission.key,
        experiment=folder.path.name,
        run=run.name,
        kind=run.kind,
        recipe=run.recipe,
        model=run.config.get("model"),
        job_id=submission.job_id,
        attempt=submission.attempt,
        state=state,
        deviation=deviation.words if deviation else None,
        diverged=diverged,
        oom=told.oom if told else None,
        logs=told.logs if told else [],
        evidence=told.evidence if told else [],
        reason=reason,
        exit_code=job.exit_code if job else None,
        steps=steps,
        config=run.config,
        metrics=metrics,
        usage=usage.model_copy(
            update={
                "elapsed_s": job.ran_s if job and job.ended else None,
                "cpus": run.resources.all_cpus,
                "gpus": run.resources.all_gpus,
                "nodes": run.resources.nodes,
                "time_limit_s": run.resources.time_limit_s,
                "resumed": usage.resumed or submission.attempt > 1 or bool(job and job.restarts),
            }
        ),
        trace=traced,
        guards=guards,
        predicted=submission.predicted,
        commit=revision.commit if revision else None,
        dirty=revision.dirty if revision else None,
        packages=packages,
        started=job.started if job else None,
        ended=job.ended if job else None,
    )


def _told(job: Job | None) -> Record | None:
    """What the log of a job that ended says; null if it cannot be read."""
    if job and job.state.ended:
        with suppress(RecordError):
            return parse_log(job.log).records[-1]
    return None


def _last_error(log: Path) -> str | None:
    """The last line of a log that reads like an error."""
    if not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        text = file.read().decode(errors="replace")
    lines = ERROR_LINE.findall(text.replace("\r", "\n"))
    return lines[-1].strip()[:500] if lines else None
