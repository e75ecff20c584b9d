"""What a run did: one Record an attempt, one line of `records.jsonl` each.

What is not known is null, never a default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from chiplog.errors import RecordError
from chiplog.files import write_atomic
from chiplog.plan import Config
from chiplog.schema import Frozen, plain_errors

VERSION = 1

MemKind = Literal["host_rss", "allocated", "active", "reserved", "after_init", "whole_card"]
TokensScope = Literal["per_gpu", "whole_job", "unmasked", "unknown"]
Line = TypeVar("Line", bound=Frozen)


class State(StrEnum):
    """How a job stands, in Slurm's words where it has one."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    PREEMPTED = "PREEMPTED"
    NODE_FAIL = "NODE_FAIL"
    INCOMPLETE = "INCOMPLETE"
    UNKNOWN = "UNKNOWN"

    @property
    def ended(self) -> bool:
        return self not in (State.PENDING, State.RUNNING)


class Validated(NamedTuple):
    """A validation loss, and after how many optimiser steps it was measured; null: not known."""

    loss: float
    step: int | None


class Usage(Frozen):
    """What a run used. The terms of its time stand apart, since they scale apart."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # a loss of NaN is a value, and JSON has no word for it

    device: str | None = Field(default=None, description="cpu, or the GPU's name.")
    cpus: int | None = Field(default=None, description="CPU cores that it asked for, on all nodes.")
    gpus: int | None = Field(default=None, description="GPUs that it asked for, on all nodes.")
    nodes: int | None = Field(default=None, description="Nodes that it asked for.")
    time_limit_s: int | None = Field(
        default=None, ge=1, description="Seconds after which it was to be ended; null: no limit, or not known."
    )
    resumed: bool = Field(default=False, description="Whether the job did not do the whole run: its times are parts.")
    elapsed_s: float | None = Field(default=None, description="Seconds from start to end of the job.")
    setup_s: float | None = Field(default=None, description="Seconds from the start of training until the first step.")
    train_s: float | None = Field(default=None, description="Seconds in training steps.")
    checkpoint_s: float | None = Field(default=None, description="Seconds in writing checkpoints.")
    eval_setup_s: float | None = Field(
        default=None, description="Seconds from the start of evaluation until it generates."
    )
    eval_s: float | None = Field(default=None, description="Seconds of generating and scoring.")
    eval_samples: int | None = Field(default=None, description="Samples scored.")
    steps: int | None = Field(default=None, description="Number of the last optimiser step.")
    steps_planned: int | None = Field(default=None, description="Optimiser steps planned.")
    resumed_from: int | None = Field(default=None, description="Step that an earlier attempt had saved; 0: none.")
    epoch: float | None = Field(default=None, description="Epochs done, as logged.")
    tokens: int | None = Field(default=None, description="Tokens trained on, padding left out.")
    padded_tokens: int | None = Field(default=None, description="Tokens computed on in training, padding included.")
    longest_pass_tokens: int | None = Field(default=None, description="Tokens of the longest forward pass, padded.")
    steps_per_s: float | None = Field(default=None, description="Median over the steps after the first tenth.")
    mean_steps_per_s: float | None = Field(default=None, description="Steps of this run by its seconds of training.")
    samples_per_s: float | None = Field(default=None, description="Samples per second of training, whole job.")
    tokens_per_s: float | None = Field(default=None, description="Tokens per second of training.")
    tokens_scope: TokensScope | None = Field(
        default=None, description="Whose tokens those are; whole_job leaves padding out, unmasked counts labels only."
    )
    peak_mem_bytes: int | None = Field(default=None, description="Largest memory held while training or evaluating.")
    mem_kind: MemKind | None = Field(
        default=None, description="What peak_mem_bytes counts; figures of different kinds are never compared."
    )
    train_peak_mem_bytes: int | None = Field(
        default=None, description="The same while training alone; null where only the whole is known."
    )
    reserved_bytes: int | None = Field(default=None, description="Largest memory reserved while training.")
    n_params: int | None = Field(default=None, description="Parameters of the model, of the base model if it has one.")
    flops_per_token: float | None = Field(default=None, description="FLOPs that training takes for a token.")
    loss_first: float | None = Field(default=None, description="Loss of the first step.")
    loss_last: float | None = Field(default=None, description="Loss of the last step.")
    loss_mean: float | None = Field(default=None, description="Mean training loss, where the log states it.")
    val_losses: list[float] = Field(default=[], description="Validation losses, in their order.")
    val_steps: list[int] | None = Field(default=None, description="Optimiser steps before each of these.")
    val_s: float | None = Field(default=None, description="Seconds of all validations during training.")
    val_samples: int | None = Field(default=None, description="Samples of one validation.")
    val_label_tokens: int | None = Field(default=None, description="Tokens that a validation's loss is the mean of.")

    @property
    def best_validation(self) -> Validated | None:
        """The lowest validation loss; null where there is none, and a loss that is no number is none."""
        steps = self.val_steps or [None] * len(self.val_losses)
        found = [Validated(*pair) for pair in zip(self.val_losses, steps, strict=True) if math.isfinite(pair[0])]
        return min(found, key=lambda one: one.loss, default=None)


class OutOfMemory(Frozen):
    """What was said when memory ran out."""

    kind: Literal["gpu", "host"] = Field(description="Whose memory.")
    tried_bytes: float | None = Field(default=None, description="Bytes that were asked for.")
    capacity_bytes: float | None = Field(default=None, description="Bytes that there are in all.")
    in_use_bytes: float | None = Field(default=None, description="Bytes that the process held.")


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))  # a log of many runs has tens of thousands
class Evidence:
    """A line of a log that a figure comes from."""

    of: str = Field(description="The figure.")
    file: str = Field(description="The log.")
    offset: int = Field(ge=0, description="Byte at which it begins; of a gzip, in what it holds.")
    line: str = Field(description="The line, cut to what can be shown.")
    printed: str | None = Field(default=None, description="The figure as it is printed there, with its unit.")


class Score(Frozen):
    """How many of n items met a criterion."""

    count: int = Field(ge=0, description="Items that met it.")
    n: int = Field(ge=0, description="Items scored.")

    @model_validator(mode="after")
    def _some_of_n(self) -> Self:
        if self.count > self.n:
            raise ValueError(f"{self.count} of {self.n} items cannot have met it")
        return self


class Guard(Frozen):
    """What a validity guard of the job's own saw (trainer/guards.py)."""

    guard: str = Field(description="Its name, such as gradient reach.")
    ok: bool = Field(description="Whether what it looked at is as it should be.")
    examined: int = Field(ge=0, description="Tensors, steps, samples or tokens: what it looked at.")
    found: str = Field(description="In words: what was measured, else what is wrong.")


class Trace(Frozen):
    """What tells whether two trainings can be compared, whichever attempts made them; null: not known."""

    steps: int | None = Field(default=None, description="Number of the last step that was logged; 0: none was.")
    steps_planned: int | None = Field(default=None, description="Optimiser steps planned.")
    tokens: int | None = Field(default=None, description="Tokens trained on, padding left out.")
    losses_sha256: str | None = Field(default=None, description="Hash of the losses of all logged steps.")
    finite: bool | None = Field(default=None, description="Whether all of them, and those of validation, are numbers.")
    train_sha256: str | None = Field(default=None, description="Hash of the data trained on.")
    val_sha256: str | None = Field(default=None, description="Hash of the validation set; null without one.")
    n_samples: int | None = Field(default=None, description="Samples or sequences of an epoch, which are its order.")
    n_trainable: int | None = Field(default=None, description="Parameters that are trained.")
    batch_size: int | None = Field(default=None, description="Samples of an optimiser step, over all devices.")


class Prediction(Frozen):
    """What was foretold when the run was submitted; the same fields as an Estimate of time and of memory."""

    elapsed_s: tuple[float, float, float] | None = Field(default=None, description="Value, low, high in seconds.")
    peak_mem_bytes: tuple[float, float, float] | None = Field(default=None, description="Value, low, high in bytes.")
    mem_kind: str | None = Field(default=None, description="What the memory figure counts, such as host_rss.")
    basis: str = Field(description="What the time rests on: same-configuration, scaled, physics or none.")
    mem_basis: str | None = Field(default=None, description="What the memory rests on, in the same words.")
    longest_pass_tokens: int | None = Field(
        default=None, description="Tokens of the longest forward pass that its data can make, padded."
    )


class Outcome(NamedTuple):
    """A figure that was foretold, and what it was."""

    value: float  # as foretold, in seconds or bytes
    low: float
    high: float
    actual: float  # as measured; where the run was cut short, what it had reached
    cut_short: bool  # by its time limit or for want of memory: the figure would be at least `actual`

    @property
    def error(self) -> float | None:
        """Foretold by actual, less 1: 0.1 foretold a tenth too much. Null if the run was cut short."""
        return None if self.cut_short else self.value / self.actual - 1

    @property
    def held(self) -> bool | None:
        """Whether the figure lies in its interval; null if the run was cut short before it could leave it."""
        if self.cut_short:
            return False if self.actual > self.high else None
        return self.low <= self.actual <= self.high


class Record(Frozen):
    """One attempt at one run."""

    version: int = Field(default=VERSION, description="Version of this schema.")
    key: str = Field(description="engine:job id; the same job is the same record however it was seen.")
    experiment: str | None = Field(default=None, description="Name of the plan; null for a log of another origin.")
    run: str | None = Field(default=None, description="Name of the run; null for a log of another origin.")
    kind: str | None = Field(default=None, description="finetune, train or control.")
    framework: str | None = Field(default=None, description="What wrote the log.")
    recipe: str | None = Field(default=None, description="What trained it; null for a control.")
    model: str | None = Field(default=None, description="Folder or name of the base model.")
    method: Literal["full", "lora", "qlora", "dora"] | None = Field(default=None, description="What was trained of it.")
    job_id: str | None = Field(default=None, description="Id that a scheduler gave the job.")
    attempt: int = Field(default=1, ge=1, description="Which attempt at the run, from 1.")
    state: State = Field(description="How the job ended, or how it stands.")
    reason: str | None = Field(default=None, description="Why it ended so, in words.")
    exit_code: int | None = Field(default=None, description="Exit status of the job.")
    deviation: str | None = Field(default=None, description="What it did otherwise than planned, and why.")
    diverged: str | None = Field(
        default=None, description="How its loss ended as no number, which is a result; null: it did not."
    )
    oom: OutOfMemory | None = Field(default=None, description="What was said when memory ran out.")
    steps: dict[str, State] = Field(default={}, description="State of each step of the job: train, eval.")
    config: Config = Field(default={}, description="Every setting that the job read, as far as known.")
    metrics: dict[str, Score] = Field(default={}, description="Scores of the evaluation.")
    usage: Usage = Field(default=Usage(), description="What the job used.")
    trace: Trace = Field(default=Trace(), description="What tells whether it can be compared with other runs.")
    guards: list[Guard] = Field(default=[], description="What its validity guards saw; none where it wrote none.")
    predicted: Prediction | None = Field(default=None, description="What was foretold at submission.")
    commit: str | None = Field(default=None, description="Commit of the code that ran.")
    dirty: bool | None = Field(default=None, description="Whether that code differed from the commit.")
    packages: dict[str, str] = Field(default={}, description="Versions of the packages that ran.")
    started: str | None = Field(default=None, description="When the job started, ISO 8601: of ours in UTC.")
    ended: str | None = Field(default=None, description="When the job ended, ISO 8601: of ours in UTC.")
    logs: list[str] = Field(default=[], description="Files that this was read from.")
    evidence: list[Evidence] = Field(default=[], description="The lines that its figures come from.")

    @property
    def time_outcome(self) -> Outcome | None:
        """The seconds foretold, and those it took. Null if either is not known, or it did only a part of the run."""
        part = self.usage.resumed or self.diverged
        told = self.predicted.elapsed_s if self.predicted and not part else None
        return self._outcome(told, self.usage.elapsed_s)

    @property
    def mem_outcome(self) -> Outcome | None:
        """The peak foretold in bytes, and the one measured. Null if either is not known, or they differ in kind."""
        same = self.predicted and self.predicted.mem_kind and self.predicted.mem_kind == self.usage.mem_kind
        told = self.predicted.peak_mem_bytes if self.predicted and same else None
        return self._outcome(told, self.usage.peak_mem_bytes)

    def _outcome(self, told: tuple[float, float, float] | None, actual: float | None) -> Outcome | None:
        cut_short = self.state in (State.TIMEOUT, State.OUT_OF_MEMORY)
        if not told or told[0] <= 0 or not actual or not (cut_short or self.state is State.COMPLETED):
            return None
        return Outcome(*told, actual, cut_short)


def read_records(file: Path) -> list[Record]:
    """All records of a `records.jsonl`, as `read_lines` reads them."""
    return read_lines(file, Record)


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Replaces a `records.jsonl` whole, as `write_lines` does."""
    write_lines(file, records)


def read_lines(file: Path, kind: type[Line]) -> list[Line]:
    """The values in a file of one JSON object a line; none if it is not there.

    Blank lines are passed over, and a last line that was cut off while it was written. Raises RecordError that names
    the line.
    """
    try:
        lines = file.read_bytes().split(b"\n")  # str.splitlines would cut at U+2028, which JSON leaves in its texts
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}. Mend that, or put it away") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError as error:
            if number == len(lines) and error.errors()[0]["type"] == "json_invalid":
                break
            raise RecordError(
                f"{file}, line {number} is no {kind.__name__.lower()}:\n{plain_errors(error)}\n"
                "Mend that line or remove it."
            ) from error
    return found


def write_lines(file: Path, values: Iterable[Frozen]) -> None:
    """Replaces such a file whole: a reader sees the old one or the new one. Raises RecordError if it cannot."""
    try:
        write_atomic(file, "".join(value.model_dump_json() + "\n" for value in values).encode())
    except OSError as error:
        raise RecordError(
            f"{file} cannot be written: {error.strerror}. It is as it was: mend that (space, permissions) and try again"
        ) from error
