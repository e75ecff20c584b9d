"""The nouns of estimation."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from chiplog.schema import Frozen

NAMED = 8  # runs of the evidence that an estimate names
COVERAGE = 0.90
RISK = 0.02  # chance of running out of time that a recommended time limit leaves

Basis = Literal["same-configuration", "scaled", "physics", "none"]
BASES: tuple[Basis, ...] = get_args(Basis)  # the surest first
TermName = Literal["start-up", "training", "validation", "checkpoints", "evaluation start-up", "evaluation"]


class Workload(Frozen):
    """How much work a run is, counted on the real data set with the real tokenizer."""

    steps: int = Field(ge=0, description="Optimiser steps; 0 for a control.")
    tokens: int | None = Field(description="Tokens trained on, padding left out; null where nothing could count them.")
    flops: float | None = Field(default=None, description="FLOPs of the training; null: not computed.")
    eval_samples: int = Field(ge=0, description="Samples that will be scored.")
    eval_batch_size: int = Field(default=1, ge=1, description="Prompts answered at once.")
    new_tokens: int = Field(default=0, ge=0, description="Tokens of an answer, at most.")
    prompt_tokens: float = Field(default=0.0, ge=0, description="Tokens of a prompt, mean.")
    validations: int = Field(default=0, ge=0, description="Validations during training.")
    validation_passes: int = Field(default=0, ge=0, description="Forward passes of all of them.")
    validation_mean_len: float | None = Field(
        default=None, gt=0, description="Tokens of a mean sample of theirs, padded; null: as in training."
    )
    val_samples: int | None = Field(default=None, description="Samples of one validation.")
    val_label_tokens: int | None = Field(default=None, description="Tokens that a validation's loss is the mean of.")


class Estimate(Frozen):
    """A number that says where it comes from."""

    value: float = Field(description="The estimate, in seconds or bytes.")
    low: float = Field(description="Lower end of the 90 % interval.")
    high: float = Field(description="Upper end of the interval.")
    coverage: float | None = Field(
        description="Share of such intervals that held for public runs that were left out; null: not measured."
    )
    basis: Basis = Field(description="What the number rests on.")
    evidence: list[str] = Field(description="The runs it comes from, the nearest first; the first few if many.")
    n_evidence: int = Field(description="How many runs it comes from.")
    assumed: list[str] = Field(default=[], description="What was taken for granted.")


class Term(Frozen):
    """A part of a run's time, with what it grows with."""

    name: TermName = Field(description="Which part.")
    elapsed: Estimate | None = Field(description="Seconds; null where nothing is known of it.")
    grows_with: str = Field(description="What it is made of.")


class RunEstimate(Frozen):
    """What one run will need. A null says that there is no evidence."""

    elapsed: Estimate | None = Field(description="Seconds from start to end of the job.")
    peak_mem: Estimate | None = Field(description="Peak memory in bytes.")
    mem_kind: str | None = Field(description="What the memory figure counts, such as host_rss.")
    terms: list[Term] = Field(default=[], description="The parts of its time; empty where the whole is on record.")
    reserved_mem: Estimate | None = Field(
        default=None, description="Bytes that the allocator takes of the card, which decide whether it fits."
    )
    capacity_bytes: int | None = Field(default=None, description="What the card has.")
    out_of_memory: float | None = Field(default=None, description="Chance that the card does not hold it.")
    micro_batch_size: int | None = Field(
        default=None, description="Largest micro-batch of which 95 % would fit; null: none, or not known."
    )
    grad_accum: int | None = Field(default=None, description="Passes a step that keep the effective batch with it.")
    time_limit_s: int | None = Field(default=None, description=f"Time limit that {RISK:.0%} of such runs would exceed.")
    eval_time_limit_s: int | None = Field(default=None, description="The same of its evaluation, which is another job.")
    gpu_hours: float | None = Field(default=None, description="GPUs times hours; null on a CPU.")
    cost: float | None = Field(default=None, description="Its price, where chiplog.toml has one.")
    host_mem_bytes: int | None = Field(default=None, description="Host memory to ask for.")
    disk_bytes: int | None = Field(default=None, description="Bytes that it leaves on disk at most.")
    notes: list[str] = Field(default=[], description="What is not counted, and what it rests on.")

    @property
    def basis(self) -> Basis:
        return self.elapsed.basis if self.elapsed else "none"
