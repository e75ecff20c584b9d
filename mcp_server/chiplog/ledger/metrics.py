"""What a job of ours wrote about itself: `metrics.jsonl` and `guards.json` of the training, `eval/scores.json`."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter, ValidationError

from chiplog.errors import RecordError
from chiplog.record import Guard, MemKind, Score, Trace, Usage
from chiplog.schema import Frozen, plain_errors

WARM_UP = 0.1  # share of the steps, at the start, that the steady speed leaves out

LONGEST, MOST = 1 << 16, 2_000_000  # bytes of a line, and events, that are read

# Numbers that can be reckoned with: no NaN, no infinity.
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]


class Written(Frozen):
    """What a job writes: it may say more than is read here, and nothing is taken for what it is not."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Start(Written):
    """A training began, or went on."""

    event: Literal["start"]
    started: AwareDatetime = Field(description="When the process began, to the second.")
    device: str = Field(description="cpu, or the GPU's name.")
    setup_s: Seconds = Field(description="Seconds until the first step.")
    step: Count = Field(default=0, description="Steps that an earlier attempt had saved.")
    total_steps: Count | None = Field(default=None, description="Steps planned.")
    n_params: Count | None = Field(default=None, description="Parameters of the model.")
    flops_per_token: Annotated[float, Field(gt=0, le=1e18)] | None = Field(
        default=None, description="FLOPs of training for a token."
    )
    micro_batch_size: Count | None = Field(default=None, description="Samples of a forward pass, of each process.")
    n_trainable: Count | None = Field(default=None, description="Parameters that are trained.")
    n_samples: Count | None = Field(default=None, description="Samples or sequences of an epoch.")
    batch_size: Count | None = Field(default=None, description="Samples of an optimiser step, over all devices.")
    train_sha256: str | None = Field(default=None, description="Hash of the data trained on.")
    val_sha256: str | None = Field(default=None, description="Hash of the validation set.")
    packages: dict[str, str] = Field(default={}, description="Versions of the packages that run.")


class Step(Written):
    """An optimiser step was done."""

    event: Literal["step"]
    step: Count = Field(ge=1, description="Its number, from 1.")
    loss: float = Field(description="Its loss.")
    tokens: Count = Field(description="Tokens of its batch, padding left out.")
    padded_tokens: Count | None = Field(default=None, description="With padding, the same.")
    longest_pass_tokens: Count | None = Field(default=None, description="Tokens of its longest forward pass, padded.")
    seconds: Seconds = Field(description="Seconds that it took.")
    peak_mem_bytes: Count = Field(description="Largest memory so far.")
    reserved_bytes: Count | None = Field(default=None, description="Largest memory that the allocator took so far.")
    mem_kind: MemKind = Field(description="What that counts.")


class Validation(Written):
    """The validation split was passed through the model."""

    event: Literal["validation"]
    step: Count = Field(description="Optimiser steps done before it.")
    loss: float = Field(description="Mean loss of its label tokens.")
    label_tokens: Count | None = Field(default=None, description="Tokens that the loss is the mean of.")
    samples: Count | None = Field(default=None, description="Samples of the split.")
    seconds: Seconds = Field(description="Seconds that it took.")


class Checkpoint(Written):
    """A checkpoint was written."""

    event: Literal["checkpoint"]
    seconds: Seconds = Field(description="Seconds that it took.")


class End(Written):
    """The training ended by itself."""

    event: Literal["end"]
    diverged: str | None = Field(default=None, description="How its loss became no number; null: it did not.")


class Evaluation(Written):
    """The evaluation's own account."""

    n: Count = Field(description="Items scored.")
    scores: dict[str, Score] = Field(description="How many met each criterion.")
    ended: AwareDatetime = Field(description="When it ended, to the second.")
    setup_s: Seconds = Field(description="Seconds until it generated.")
    seconds: Seconds = Field(description="Seconds of generating and scoring.")
    peak_mem_bytes: Count = Field(description="Largest memory.")
    mem_kind: MemKind = Field(description="What that counts.")
    device: str = Field(description="cpu, or the GPU's name.")


Event = Start | Step | Validation | Checkpoint | End
Numbered = TypeVar("Numbered", Step, Validation)
_GUARDS = TypeAdapter(list[Guard])
_EVENT = TypeAdapter[Event](Annotated[Event, Field(discriminator="event")])


def read_events(file: Path) -> list[Event]:
    """The events of a `metrics.jsonl`, without lines that are none; the last may still be being written."""
    events: list[Event] = []
    if not file.is_file():
        return events
    with file.open("rb") as lines:
        while (line := lines.readline(LONGEST)) and len(events) < MOST:
            try:
                events.append(_EVENT.validate_json(line))
            except ValidationError:
                continue
    return events


def of_job(events: Sequence[Event], started: str | None) -> Sequence[Event]:
    """The events, if the job that began at `started` wrote the last of them; none if an earlier attempt did."""
    begun = [event.started for event in events if isinstance(event, Start)]
    return events if begun and started and not_before(begun[-1], started) else []


def not_before(noted: datetime, moment: str) -> bool:
    """Whether what a job noted, in whole seconds, came at `moment` (ISO 8601) or later."""
    return noted >= datetime.fromisoformat(moment).replace(microsecond=0)


def standing(events: Sequence[Event], kind: type[Numbered]) -> list[Numbered]:
    """The steps, or the validations, that the training is made of, each once.

    A resumed run repeats those since its checkpoint: the last line of a step counts.
    """
    by_step: dict[int, Numbered] = {}
    for event in events:
        if isinstance(event, Start):  # what the last attempt did after its checkpoint is lost, and done again
            by_step = {number: old for number, old in by_step.items() if number <= event.step}
        elif isinstance(event, kind):
            by_step[event.step] = event
    return list(by_step.values())


def train_usage(events: Sequence[Event]) -> Usage:
    """What the training used; the seconds of its steps hold neither validations nor checkpoints."""
    steps, validations = standing(events, Step), standing(events, Validation)
    starts = [event for event in events if isinstance(event, Start)]
    if not starts:
        return Usage()
    seconds = [step.seconds for step in steps]
    pace = statistics.median(seconds[int(len(seconds) * WARM_UP) :]) if steps else 0.0
    done = steps[-1].step if steps else 0
    # Where not every step is logged, those that are stand for the others.
    share = done / len(steps) if steps else 0.0
    train_s, tokens = sum(seconds) * share, sum(step.tokens for step in steps) * share
    padded = [step.padded_tokens for step in steps if step.padded_tokens is not None]
    return Usage(
        device=starts[-1].device,
        resumed=len(starts) > 1,
        setup_s=sum(start.setup_s for start in starts),
        train_s=train_s if steps else None,
        checkpoint_s=sum(event.seconds for event in events if isinstance(event, Checkpoint)),
        steps=done,
        steps_planned=starts[-1].total_steps,
        tokens=round(tokens) if steps else None,
        padded_tokens=round(sum(padded) * share) if padded and len(padded) == len(steps) else None,
        longest_pass_tokens=max((step.longest_pass_tokens or 0 for step in steps), default=0) or None,
        steps_per_s=1 / pace if pace else None,
        tokens_per_s=tokens / train_s if train_s else None,
        peak_mem_bytes=max((step.peak_mem_bytes for step in steps), default=None),
        mem_kind=steps[-1].mem_kind if steps else None,
        train_peak_mem_bytes=max((step.peak_mem_bytes for step in steps), default=None),
        reserved_bytes=max((step.reserved_bytes or 0 for step in steps), default=0) or None,
        n_params=starts[-1].n_params,
        flops_per_token=starts[-1].flops_per_token,
        loss_first=steps[0].loss if steps else None,
        loss_last=steps[-1].loss if steps else None,
        val_losses=[validation.loss for validation in validations],
        val_steps=[validation.step for validation in validations] or None,
        val_s=sum(validation.seconds for validation in validations) if validations else None,
        val_samples=validations[-1].samples if validations else None,
        val_label_tokens=validations[-1].label_tokens if validations else None,
    )


def trace(events: Sequence[Event]) -> Trace:
    """What tells whether a training can be compared with others, over all its starts; without one, 0 steps."""
    starts = [event for event in events if isinstance(event, Start)]
    if not starts:
        return Trace(steps=0)
    usage, losses = train_usage(events), [(step.step, step.loss) for step in standing(events, Step)]
    every = [loss for _, loss in losses] + usage.val_losses
    return Trace(
        **{name: getattr(starts[-1], name) for name in Trace.model_fields.keys() & Start.model_fields.keys()},
        steps=usage.steps,
        steps_planned=usage.steps_planned,
        tokens=usage.tokens,
        losses_sha256=hashlib.sha256(repr(losses).encode()).hexdigest() if losses else None,
        finite=all(map(math.isfinite, every)) if every else None,
    )


def read_guards(file: Path) -> list[Guard]:
    """What `guards.json` says; none if it is not there.

    One that cannot be read is a guard that failed: nobody knows what it saw.
    """
    try:
        return _GUARDS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        wrong = " ".join((plain_errors(error) if isinstance(error, ValidationError) else str(error)).split())[:300]
        return [Guard(guard=file.name, ok=False, examined=0, found=f"it cannot be read: {wrong}")]


def read_scores(file: Path) -> Evaluation | None:
    """The evaluation's own account; null if there is none yet. Raises RecordError for one that cannot be trusted."""
    if not file.is_file():
        return None
    try:
        return Evaluation.model_validate_json(file.read_bytes())
    except ValidationError as error:
        wrong = " ".join(plain_errors(error).split())[:500]
        raise RecordError(
            f"{file} cannot be trusted: {wrong}. Remove it, then submit the run again, which only evaluates it"
        ) from error


def with_evaluation(usage: Usage, evaluation: Evaluation) -> Usage:
    """`usage` with what the evaluation used; the peak is the larger one, if both are of one kind."""
    peak, kind = usage.peak_mem_bytes, usage.mem_kind
    if kind in (None, evaluation.mem_kind):
        peak, kind = max(peak or 0, evaluation.peak_mem_bytes), evaluation.mem_kind
    used = {"eval_setup_s": evaluation.setup_s, "eval_s": evaluation.seconds, "eval_samples": evaluation.n}
    return usage.model_copy(
        update={**used, "device": usage.device or evaluation.device, "peak_mem_bytes": peak, "mem_kind": kind}
    )
