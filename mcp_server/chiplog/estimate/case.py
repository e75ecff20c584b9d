"""One job that need not be planned, nor its model downloaded: what it would need, why, and what would fit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from chiplog.errors import PlanError
from chiplog.estimate.model import RunEstimate
from chiplog.schema import Frozen, plain_errors

LARGEST = 2**31
NEEDED = ("model", "gpu", "batch_size", "seq_len")


class Case(Frozen):
    """A job to be estimated. Model, GPU, batch and length are needed; without steps or samples, time is of one step."""

    model: str = Field(min_length=1, description="Published name, such as meta-llama/Llama-3.2-1B, or folder.")
    gpu: str = Field(min_length=1, description="Name in chiplog.toml or of the catalogue, such as a100-80gb.")
    batch_size: int = Field(ge=1, le=LARGEST, description="Samples, or packs, of an optimiser step.")
    seq_len: int = Field(ge=1, le=LARGEST, description="Tokens of the longest sample, or of a pack.")
    mean_len: float | None = Field(
        default=None, ge=1, le=LARGEST, description="Tokens of a mean sample; null: seq_len."
    )
    micro_batch_size: int | None = Field(
        default=None, ge=1, le=LARGEST, description="Samples of a forward pass on one GPU; null: batch_size by gpus."
    )
    packed: bool = Field(default=False, description="Whether samples are packed up to seq_len.")
    framework: str = Field(default="torchtune", min_length=1, description="What trains.")
    method: Literal["full", "lora", "qlora", "dora"] = Field(default="lora", description="What is trained.")
    lora_rank: int = Field(default=64, ge=1, le=LARGEST, description="LoRA rank.")
    lora_targets: list[str] | None = Field(default=None, description="Matrices with adapters; null: all but k_proj.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="What is computed in.")
    optimizer: Literal["adamw", "adamw8bit", "paged", "sgd"] = Field(default="adamw", description="Optimiser.")
    activation_checkpointing: bool = Field(default=False, description="Whether activations are computed anew.")
    compile: bool = Field(default=False, description="Whether the model is compiled.")
    gpus: int = Field(default=1, ge=1, le=100_000, description="GPUs.")
    sharding: Literal["FSDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "DDP"] = Field(
        default="FSDP", description="How several GPUs divide the model; DDP: not at all."
    )
    samples: int | None = Field(default=None, ge=1, le=LARGEST, description="Samples, or packs, of an epoch.")
    epochs: int = Field(default=1, ge=1, le=LARGEST, description="Epochs.")
    steps: int | None = Field(default=None, ge=1, le=LARGEST, description="Optimiser steps, in place of samples.")
    validation_samples: int = Field(default=0, ge=0, le=LARGEST, description="Samples of a validation.")
    validations: int = Field(default=0, ge=0, le=LARGEST, description="Validations in all.")
    eval_samples: int = Field(default=0, ge=0, le=LARGEST, description="Samples that are answered and scored.")
    eval_batch_size: int = Field(default=64, ge=1, le=LARGEST, description="Prompts answered at once.")
    max_new_tokens: int = Field(default=32, ge=0, le=LARGEST, description="Tokens of an answer, at most.")
    budget_gpu_hours: float | None = Field(
        default=None, gt=0, le=1e12, description="How many steps fit into it is said."
    )


class Fits(Frozen):
    """The largest of each that the card would hold, the rest of the job as it is; null: not even the smallest."""

    share: float = Field(description="Share of such jobs that would fit.")
    micro_batch: int | None = Field(description="Samples of a forward pass.")
    seq_len: int | None = Field(description="Tokens of the longest sample.")
    rank: int | None = Field(description="LoRA rank, looked for up to 4,096; null for a job without adapters, too.")
    model: str | None = Field(description="Published model, by its parameters.")
    gpu: str | None = Field(description="The smallest GPU or MIG slice that would hold the job as it is.")


class WhatIf(Frozen):
    """The same job with one thing changed; the effective batch stays."""

    change: str = Field(description="What is changed.")
    reserved_bytes: float = Field(description="Peak that the allocator takes.")
    step_s: float = Field(description="Seconds of an optimiser step.")


class Explanation(Frozen):
    """Which terms the numbers come from, and what would change them."""

    moment: str = Field(description="When most is held, by the bare physics.")
    memory_bytes: dict[str, float] = Field(description="Bytes on the card at that moment, by what they are.")
    memory_factor: float = Field(description="How many times what the physics say past runs make of it.")
    pass_s: dict[str, float] = Field(description="Seconds of a forward and backward pass, by what they grow with.")
    pass_factor: float = Field(description="How many times what the physics say past runs make of it.")
    step_s: float = Field(description="Seconds of an optimiser step.")
    what_if: list[WhatIf] = Field(description="What changes them.")


class CaseEstimate(Frozen):
    """What a case would need."""

    case: Case = Field(description="What was asked.")
    steps: int = Field(description="Optimiser steps that the time is of.")
    step_s: float = Field(description="Seconds of an optimiser step.")
    tokens_per_s: float = Field(description="Tokens a second of one GPU, padding left out.")
    estimate: RunEstimate = Field(description="Time, memory and what follows.")
    explanation: Explanation = Field(description="Which terms the numbers come from, and what changes them.")
    fits: list[Fits] = Field(description="What would fit, surely and as likely as not; empty where not asked for.")
    steps_in_budget: int | None = Field(description="Steps that fit into budget_gpu_hours; null where none is given.")


def make_case(values: dict[str, Any]) -> Case:
    """A case from plain values. Raises PlanError that names what is wrong."""
    try:
        return Case.model_validate(values)
    except ValidationError as error:
        raise PlanError(f"this cannot be estimated:\n{plain_errors(error)}\nMend these.") from error
