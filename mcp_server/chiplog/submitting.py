"""Submitting an experiment's runs: which, whether they may, and how many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from chiplog.chain import chained, scripts
from chiplog.checks.tokens import tokens_hash
from chiplog.collect import is_done
from chiplog.deviation import FILE, after_running_out
from chiplog.engines import Engine, Queue, engine_for
from chiplog.errors import EngineError, PlanError, RenderError
from chiplog.files import write_atomic
from chiplog.folder import CLOSING, Closing, ExperimentFolder, Submission
from chiplog.plan import Run, read_config
from chiplog.record import Prediction, Record, State
from chiplog.render import WRITING, refuse_links
from chiplog.running import latest_jobs, waiting_runs
from chiplog.settings import Settings
from chiplog.sizing import PlannedRun
from chiplog.trainer_files import load_trainer_file


def to_submit(folder: ExperimentFolder, names: Sequence[str], waiting: bool = False) -> list[Run]:
    """The runs that have no job that waits, runs or completed with a result: new ones, and those that ended otherwise.

    With `waiting`, those of them that an earlier submission left waiting for room; else not those, while the job lives
    that will submit them.
    A run whose training is done only evaluates when it is submitted again. Raises RenderError if something is gone
    that their jobs would read, or is not what the plan says.
    """
    standing = {name: job.state for name, (_, job) in latest_jobs(folder).items() if job}
    planned = {run.name: run for run in folder.runs()}
    settled = {
        name
        for name, state in standing.items()
        if not state.ended or (state is State.COMPLETED and name in planned and is_done(folder, planned[name]))
    }
    wait = waiting_runs(folder)
    if waiting:
        names = [name for name in names if name in wait]
    else:
        settled |= {name for name, job in wait.items() if job and not job.state.ended}
    runs = [run for run in planned.values() if run.name in names and run.name not in settled]
    needed = [f"code/{folder.place_of(name)}/{name}.py" for name in sorted({run.recipe or "evaluate" for run in runs})]
    needed += ["code/REVISION", "code/job.sh", "close.sbatch"]
    needed += [f"runs/{run.name}/{file}" for run in runs for file in ("config.yaml", *scripts(folder, run))]
    if gone := [name for name in needed if runs and not (folder.path / name).is_file()]:
        raise RenderError(f"{folder.path} lacks {', '.join(gone[:3])}: set it up again with setup_experiment_dirs")
    for run in runs:
        if read_config(folder.path / "runs" / run.name / "config.yaml") != run.config:
            raise RenderError(
                f"runs/{run.name}/config.yaml is not what plan.yaml says: set {folder.path.name} up again with "
                "setup_experiment_dirs, or plan what you want under another name"
            )
    return runs


def check_data_unchanged(folder: ExperimentFolder) -> None:
    """Raises PlanError if a data set is gone or differs from what was planned."""
    plan = folder.plan
    for key, path in plan.datasets.items():
        rows = load_trainer_file("rows")
        try:
            found = tokens_hash(Path(path)) if plan.framework == "trainer" else rows.file_hash(Path(path))
        except (OSError, ValueError) as error:  # a RowsError is one too
            raise PlanError(f"the data set {key} ({path}) cannot be read any more: {error}") from error
        if found != plan.dataset_sha256.get(key, found):
            raise PlanError(
                f"the data set {key} ({path}) has changed since it was planned: plan again, or put the old one back"
            )


def submit(
    folder: ExperimentFolder,
    rows: Sequence[PlannedRun],
    engine_name: str,
    settings: Settings,
    last: Mapping[str | None, Record] = MappingProxyType({}),
) -> list[Submission]:
    """Queues the jobs of these runs, as many as there is room for, each with its prediction on record before it runs.

    The others wait for the job that closes the submission (`closing.json`). Raises EngineError if the engine refuses.
    Whatever stops it, the folder is as it was and nothing runs of it. A run whose `last` record ran out of memory goes
    on with a smaller micro-batch.
    """
    engine, tag = engine_for(engine_name), _tag(folder)
    queue = engine.queue()
    chosen = _that_fit(folder, rows, queue, engine)
    predictions = {row.run.name: _prediction(row) for row in chosen}
    files = {f"runs/{run}/estimate.json": said.model_dump_json(indent=1) for run, said in predictions.items()}
    for row in chosen:
        name = row.run.name
        if deviation := after_running_out(row.run, folder.path / "runs" / name, last.get(name)):
            files[f"runs/{name}/{FILE}"] = deviation.model_dump_json(indent=1)
    refuse_links(folder.path, files)
    before = {name: _read(folder.path / name) for name in [*files, CLOSING, "jobs.jsonl"]}
    attempts = {submission.run: submission.attempt for submission in folder.submissions()}
    earlier = folder.closing()
    jobs: list[list[str]] = []
    with WRITING, chained(folder, [row.run for row in chosen], settings, engine.closes) as chain:
        try:
            for name, text in files.items():
                write_atomic(folder.path / name, text.encode() + b"\n")
            jobs = engine.submit(chain.batches, tag, settings.budget.jobs_at_once)
            done = []
            for run, said in predictions.items():
                first, *then = [jobs[batch][number] for batch, number in chain.places[run]]
                done.append(
                    Submission(
                        run=run, engine=engine_name, job_id=first, eval_job_id=then[0] if then else None,
                        attempt=attempts.get(run, 0) + 1, predicted=said, folder=tag,
                    )
                )  # fmt: skip
            asked = [row.run.name for row in rows]
            later = [name for name in asked if name not in predictions]
            later += [name for name in (earlier.runs if earlier else []) if name not in asked]
            if engine.closes:
                folder.close(Closing(engine=engine_name, job_id=jobs[-1][0], runs=later, folder=tag))
            elif earlier:  # of another engine, whose last job submits the others
                left = [name for name in earlier.runs if name not in predictions]
                folder.close(earlier.model_copy(update={"runs": left}))
            folder.add(done)  # from here on the next submission lets them run, should this one be killed
            engine.release([number for batch in jobs for number in batch])
        except BaseException:
            if jobs:
                with suppress(EngineError):  # they are held, and the next submission ends them
                    engine.cancel([number for batch in jobs for number in batch])
            with suppress(OSError):
                for name, content in before.items():
                    (folder.path / name).unlink(missing_ok=True)
                    if content is not None:
                        write_atomic(folder.path / name, content)
            raise
    return done


def soonest(folder: ExperimentFolder, run: Run, engine_name: str, settings: Settings) -> dict[str, str]:
    """When a run might start in each partition of chiplog.toml, where the engine can say."""
    partitions = settings.slurm.partitions(settings.gpus) if settings.slurm else []
    script = folder.path / "runs" / run.name / scripts(folder, run)[0]
    return engine_for(engine_name).soonest(script, partitions)


def settle(folder: ExperimentFolder, engine_name: str) -> int:
    """Ends the jobs that a submission left held when it was killed, but for those on record, which it lets run.

    How many it let run.
    """
    engine, closing = engine_for(engine_name), folder.closing()
    known = {number for submission in folder.submissions() for number in submission.job_ids}
    held = engine.held(_tag(folder))
    last = [number for number in held if closing and number == closing.job_id]
    kept = [number for number in held if number in known]
    left = [number for number in held if number not in known and number not in last]
    if kept or not left:  # else it closes what never got onto the record
        kept += last
    else:
        left += last
    if left:
        engine.cancel(left)
    if kept:
        engine.release(kept)
    return len(kept)


def _tag(folder: ExperimentFolder) -> str:
    return str(folder.path.resolve())


def _that_fit(
    folder: ExperimentFolder, rows: Sequence[PlannedRun], queue: Queue, engine: Engine
) -> Sequence[PlannedRun]:
    """The first of these runs whose jobs there is room for. Raises EngineError if there is none."""
    room, rows = queue.room, rows[: queue.longest_array]
    if room is None:
        return rows
    left, fit = room - engine.closes, 0
    for row in rows:
        left -= len(scripts(folder, row.run))
        fit += left >= 0
    if not fit:
        raise EngineError(
            f"the queue takes {max(room, 0)} more of your jobs (of {queue.most} at once), and the next run needs "
            f"{len(scripts(folder, rows[0].run)) + engine.closes}: wait until some have ended, or cancel some"
        )
    return rows[:fit]


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


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
