"""The tools that touch jobs: submitting them, following them, ending them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from chiplog import collect as collecting
from chiplog import running, submitting
from chiplog.answers import CancelAnswer, Confirm, Limit, Name, PruneAnswer, Runs, StatusAnswer, SubmitAnswer
from chiplog.errors import ChiplogError, ConfirmationNeeded, in_words
from chiplog.folder import find_experiment
from chiplog.ledger import Ledger
from chiplog.progress import RunStatus
from chiplog.record import State
from chiplog.schema import Progress
from chiplog.settings import load_settings
from chiplog.sizing import estimated
from chiplog.tables import cut_note, listed, totals_words
from chiplog.text import duration, size
from chiplog.totals import make_totals


def submit_experiment(
    experiment: Name,
    runs: Runs = None,
    engine: Annotated[
        Literal["local", "slurm"] | None,
        Field(description="Where to: this machine or Slurm; null: Slurm where chiplog.toml has [slurm]."),
    ] = None,
    waiting: Annotated[
        bool, Field(description="Only the runs that an earlier submission left waiting for room in the queue.")
    ] = False,
    confirm: Confirm = False,
) -> SubmitAnswer:
    """Submits the runs that have no job yet or whose job did not complete. Asks first; twice submits nothing twice."""
    settings = load_settings()
    folder = find_experiment(experiment, settings)
    engine = engine or ("slurm" if settings.slurm else "local")
    with folder.locked():
        released = submitting.settle(folder, engine)
        chosen = submitting.to_submit(folder, running.pick_runs(folder, runs), waiting)
        if not chosen:
            what = "no run waits for room" if waiting else "every run has a job that waits, runs or completed"
            words = f"Nothing to submit: {what}."
            if released:
                words = f"{released} jobs that an interrupted submission had left held may run now. {words}"
            return SubmitAnswer(summary=words, jobs={})
        submitting.check_data_unchanged(folder)
        rows = estimated(chosen, settings)
        where = "this machine" if engine == "local" else "Slurm"
        if not confirm:
            words = totals_words(make_totals(rows, settings))
            starts = submitting.soonest(folder, chosen[0], engine, settings)
            when = "; ".join(f"{partition}: {start}" for partition, start in starts.items())
            raise ConfirmationNeeded(
                f"Submit {len(chosen)} runs to {where} ({listed([run.name for run in chosen])})? {words}"
                + (f" The first may start at: {when}." if when else "")
            )
        past = collecting.collect(folder, Ledger()) if folder.submissions() else []
        last = {record.run: record for record in past}
        done = submitting.submit(folder, rows, engine, settings, last)
    later = len(chosen) - len(done)
    lines = [
        f"Submitted {len(done)} runs to {where}; they go on when this command ends.",
        f"{later} more wait for room in the queue; the last job of these submits them." if later else "",
    ]
    return SubmitAnswer(
        summary=" ".join(line for line in lines if line),
        next=[f"experiment_status(experiment={folder.path.name!r})"],
        jobs={submission.run: submission.job_id for submission in done},
    )


def experiment_status(
    experiment: Name,
    runs: Runs = None,
    log_of: Annotated[str | None, Field(description="Run whose log's last lines are wanted.")] = None,
    lines: Annotated[int, Field(ge=1, le=500, description="How many lines of the log.")] = 20,
    wait_s: Annotated[float, Field(ge=0, le=600, description="Seconds to wait for the jobs to end.")] = 0,
    limit: Limit = 50,
    progress: Progress | None = None,
) -> StatusAnswer:
    """How the runs stand: state, step, loss, time left; with log_of the end of a log. Can wait for the jobs to end."""
    folder = find_experiment(experiment, load_settings())
    rows = running.wait(folder, running.pick_runs(folder, runs), wait_s, progress)
    tail: list[str] = []
    if log_of:
        chosen = running.pick_runs(folder, [log_of])
        tail = running.log_tail(running.status(folder, chosen)[0], lines)
    unwritten = None
    if any(row.state and row.state.ended for row in rows):
        try:
            collecting.collect(folder, Ledger())
        except (ChiplogError, OSError) as error:  # how the runs stand is known all the same
            unwritten = f"Their records could not be written: {in_words(error)}"
    counts = {state: sum(row.state is state for row in rows) for state in State}
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "nothing submitted"
    shown = [_status_words(row) for row in rows[:limit] if row.state is not State.COMPLETED]
    done = all(row.state and row.state.ended for row in rows)
    name = folder.path.name
    then = f"summarize_experiment(experiment={name!r})" if done else f"experiment_status(experiment={name!r}) later"
    if not any(row.state for row in rows):
        then = f"submit_experiment(experiment={name!r})"
    return StatusAnswer(
        summary="\n".join(
            line for line in [f"{name}: {words}.", *shown, cut_note(len(rows), limit), unwritten, *tail] if line
        ),
        next=[then],
        ok=all(not row.state or not row.state.ended or row.state is State.COMPLETED for row in rows),
        runs=rows[:limit],
        log_tail=tail,
    )


def cancel_experiment(experiment: Name, runs: Runs = None, confirm: Confirm = False) -> CancelAnswer:
    """Ends the jobs of an experiment that wait or run; a training that runs saves a checkpoint first."""
    folder = find_experiment(experiment, load_settings())
    if not confirm:
        raise ConfirmationNeeded(f"Cancel the jobs of {listed(runs or [folder.path.name])} that wait or run?")
    with folder.locked(needed=False):  # a job that submits others meanwhile is waited for
        ended = running.cancel(folder, runs)
    return CancelAnswer(summary=f"Cancelled {listed(ended)}.", cancelled=ended)


def prune_checkpoints(experiment: Name, runs: Runs = None, confirm: Confirm = False) -> PruneAnswer:
    """Removes the checkpoints of runs that are trained: what they trained stays, and they cannot be resumed."""
    folder = find_experiment(experiment, load_settings())
    with folder.locked():
        found = running.prunable(folder, running.pick_runs(folder, runs))
        freed = sum(found.values())
        if not found:
            return PruneAnswer(summary="No trained run has checkpoints: nothing to remove.", pruned=[], freed_bytes=0)
        if not confirm:
            raise ConfirmationNeeded(f"Remove {size(freed)} of checkpoints of {listed(list(found))}?")
        running.prune(folder, list(found))
    return PruneAnswer(
        summary=f"Removed {size(freed)} of checkpoints of {listed(list(found))}.", pruned=list(found), freed_bytes=freed
    )


def _status_words(row: RunStatus) -> str:
    parts = [f"{row.run}: {row.state or 'not submitted'}"]
    if row.step is not None:
        parts.append(f"step {row.step} of {row.total_steps}, loss {row.loss:.4g}")
    if row.training_left_s is not None:
        low, high = map(duration, row.training_left_interval_s or (None, None))
        sure = f" ({low} to {high})" if row.training_left_interval_s else ""
        parts.append(f"{duration(row.training_left_s)}{sure} of training left")
    if row.peak_mem_bytes is not None and row.state is State.RUNNING:
        parts.append(f"{size(row.peak_mem_bytes)} so far")
    if row.restarts:
        parts.append(f"put back into the queue {row.restarts} times")
    if row.reason and row.state is not State.RUNNING:
        parts.append(row.reason)
    return "\n".join([", ".join(parts), *(f"  warning: {words}" for words in row.warnings)])
