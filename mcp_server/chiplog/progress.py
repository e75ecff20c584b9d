"""How a run that is under way gets on: what it has done, what is left, and what looks wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field

from chiplog.engines import Job
from chiplog.estimate.workload import validations
from chiplog.ledger.metrics import Event, Start, Step, Validation, standing
from chiplog.plan import Run
from chiplog.record import Prediction, State
from chiplog.schema import Frozen
from chiplog.text import duration

FIRST = 0.1  # share of the steps, at the start, that are left out: they warm up
BLOCKS, LEAST = 5, 4  # into which its steps are cut to see how much its speed wanders, and steps of each
NINETY = 2.132  # standard deviations to either end of 90 % of Student's t with 4 degrees of freedom
DRIFT = 0.02  # standard deviation of what the rest differs by beyond that


class RunStatus(Frozen):
    """How one run stands."""

    run: str = Field(description="Name of the run.")
    state: State | None = Field(description="State of its last job; null if it was never submitted.")
    reason: str | None = Field(description="Why, where there is something to say.")
    attempt: int = Field(description="Which submission this is; 0 before the first.")
    restarts: int = Field(default=0, description="How often its jobs were put back into the queue.")
    job_id: str | None = Field(description="Id of its last job.")
    elapsed_s: float | None = Field(description="Seconds that its jobs ran.")
    step: int | None = Field(description="Optimiser steps done.")
    total_steps: int | None = Field(description="Optimiser steps planned.")
    loss: float | None = Field(description="Loss of the last step.")
    peak_mem_bytes: int | None = Field(default=None, description="Largest memory so far.")
    mem_kind: str | None = Field(default=None, description="What that counts.")
    training_left_s: float | None = Field(
        description="Seconds of training left, at the mean speed of its own steps and of the validations seen so far."
    )
    training_left_interval_s: tuple[float, float] | None = Field(
        default=None, description="90 % interval of that; null after too few steps to tell."
    )
    warnings: list[str] = Field(default=[], description="What looks wrong with it.")
    log: str | None = Field(description="File that its output goes to.")


class Left(NamedTuple):
    """Seconds, with a 90 % interval."""

    value: float
    low: float
    high: float


def training_left(steps: Sequence[Step], total: int) -> Left | None:
    """What is left of a training, from the steps of its current attempt; null before the first.

    Speed wanders slowly, on machines that others use too: the means of blocks of steps say how much, and the mean of
    what is to come is taken to wander as they do.
    """
    if not steps:
        return None
    seconds = [step.seconds for step in steps[int(len(steps) * FIRST) :]]
    mean, missing = statistics.fmean(seconds), total - steps[-1].step
    value = mean * missing
    size = len(seconds) // BLOCKS
    if size < LEAST or not mean:
        return Left(value, 0.0, math.inf)
    blocks = [statistics.fmean(seconds[i * size : (i + 1) * size]) for i in range(BLOCKS)]
    wander = statistics.stdev(blocks) / mean
    spread = math.hypot(wander * math.sqrt(1 / BLOCKS + size / max(missing, 1)), DRIFT)
    factor = math.exp(min(NINETY * spread, 100.0))
    return Left(value, value / factor, value * factor)


def validations_left(events: Sequence[Event], total: int, run: Run | None) -> int:
    """How many a training is still to make, as its settings say."""
    made = len(standing(events, Validation))
    return max(0, validations(run.config, total) - made) if run else 0


def with_validations(left: Left, seen: Sequence[Validation], missing: int) -> Left:
    """What is left with that many validations more, which take as long as those seen.

    They wander as the steps do, and differ as they did. Before the first, nothing tells how long they take, and so
    there is no upper end.
    """
    if not missing:
        return left
    if not seen:
        return left._replace(high=math.inf)
    seconds = [validation.seconds for validation in seen]
    wander = left.high / left.value if left.value else math.exp(NINETY * DRIFT)
    return Left(
        left.value + missing * statistics.fmean(seconds),
        left.low + missing * min(seconds) / wander,
        left.high + missing * max(seconds) * wander,
    )


def describe(
    name: str, job: Job, attempt: int, job_id: str, events: Sequence[Event], run: Run | None, said: Prediction | None
) -> RunStatus:
    """How a run stands, whose job and metrics these are; `run` is null where its plan cannot be read."""
    steps = [event for event in events if isinstance(event, Step)]
    total = next((event.total_steps for event in reversed(events) if isinstance(event, Start)), None)
    left = _left(events, total, run) if total and job.state is State.RUNNING and job.part == "run" else None
    told = left is not None and math.isfinite(left.high)
    return RunStatus(
        run=name,
        state=job.state,
        reason=job.reason,
        attempt=attempt,
        restarts=job.restarts,
        job_id=job_id,
        elapsed_s=job.ran_s,
        step=steps[-1].step if steps else None,
        total_steps=total,
        loss=steps[-1].loss if steps else None,
        peak_mem_bytes=max((step.peak_mem_bytes for step in steps), default=None),
        mem_kind=steps[-1].mem_kind if steps else None,
        training_left_s=left.value if left else None,
        training_left_interval_s=(left.low, left.high) if left and told else None,
        warnings=list(_warnings(job, left, run, said)) if job.state is State.RUNNING else [],
        log=str(job.log),
    )


def _left(events: Sequence[Event], total: int, run: Run | None) -> Left | None:
    """What is left of the training, by what its current attempt did; an earlier one may have run on another machine."""
    begun = max(place for place, event in enumerate(events) if isinstance(event, Start))
    left = training_left([event for event in events[begun:] if isinstance(event, Step)], total)
    seen = [event for event in events[begun:] if isinstance(event, Validation)] or standing(events, Validation)
    return left and with_validations(left, seen, validations_left(events, total, run))


def _warnings(job: Job, left: Left | None, run: Run | None, said: Prediction | None) -> list[str]:
    """What will go otherwise than was foretold or asked for, so surely that its interval says so.

    Of a run whose steps tell nothing yet, or that evaluates, no more is sure than what it took so far.
    """
    found = []
    least = left.low if left else 0.0
    if said and said.elapsed_s and job.ran_s is not None and job.ran_s + least > said.elapsed_s[2]:
        value, low, high = map(duration, said.elapsed_s)
        takes = f"{duration(job.ran_s + left.value)} in all" if left else f"{duration(job.ran_s)} so far"
        found.append(f"slower than predicted: {takes}, and {value} ({low} to {high}) was said")
    limit = run.resources.time_limit_s if run else None
    if limit and left and job.attempt_s is not None and job.attempt_s + least > limit:
        found.append(
            f"it will reach its time limit of {duration(limit)}, save its state and go on in another turn of the queue"
        )
    return found
