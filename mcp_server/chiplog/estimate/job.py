"""What a training job asks of its GPUs: the noun to which plans, logs and public tables are all brought.

It holds what decides memory and time, and nothing of who ran it. What is not known has the field's usual value and is
named in `unsure`; a missing field is never a feature.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from chiplog.estimate.shapes import Shape
from chiplog.schema import Frozen

Method = Literal["full", "lora", "qlora", "adapter"]
Target = Literal["q", "k", "v", "o", "mlp", "head", "embedding"]
Checkpointing = Literal["none", "selective", "full"]
MemoryKind = Literal["allocated", "reserved", "card"]
ALL_LINEAR: frozenset[Target] = frozenset({"q", "k", "v", "o", "mlp"})


class Job(Frozen):
    """One training job."""

    framework: str = Field(description="The program that trains, with its variant: torchtune, litgpt, peft.")
    model: str = Field(description="The model's name.")
    shape: Shape = Field(description="Its shape.")
    method: Method = Field(description="What is trained; adapter is any small method other than LoRA.")
    rank: int = Field(default=16, gt=0, description="LoRA rank.")
    targets: frozenset[Target] = Field(default=ALL_LINEAR, description="What has adapters or is trained beside them.")
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = Field(default="bf16", description="What is computed in.")
    master: bool = Field(default=False, description="Whether weights are kept in fp32 and computed in another type.")
    weight_bits: Literal[4, 8, 16] = Field(default=16, description="Bits of a frozen weight.")
    upcast: bool = Field(default=False, description="Whether 4-bit loading casts embeddings, norms and stream to fp32.")
    micro_batch: int = Field(gt=0, description="Samples of one forward pass on one GPU.")
    grad_accum: int = Field(default=1, gt=0, description="Passes a step.")
    seq_len: int = Field(gt=0, description="Tokens of the longest sample of a pass, padding and packing included.")
    mean_len: float | None = Field(
        default=None, description="Tokens of a mean sample where they differ; null: seq_len."
    )
    packed: bool = Field(default=False, description="Whether samples are packed up to seq_len.")
    checkpointing: Checkpointing = Field(default="none", description="Activations computed anew in the backward pass.")
    offload: bool = Field(default=False, description="Whether activations wait on the host.")
    loss: Literal["plain", "fused", "chunked"] = Field(default="plain", description="How the loss is computed.")
    attention: Literal["flash", "eager"] = Field(default="flash", description="Whether scores are kept.")
    compile: bool = Field(default=False, description="Whether the model is compiled.")
    optimizer: Literal["adamw", "adamw8bit", "paged", "sgd"] = Field(default="adamw", description="Optimiser.")
    in_backward: bool = Field(default=False, description="Whether it steps within the backward pass.")
    dropout: bool = Field(default=True, description="Whether the adapters have dropout.")
    gpu: str | None = Field(default=None, description="The card's name.")
    gpus: int = Field(default=1, gt=0, description="Cards.")
    sharding: str = Field(default="", description="How the model is spread: FSDP, ZeRO, TP2 PP4; empty: not.")
    memory_kind: MemoryKind = Field(default="allocated", description="What a peak counts.")
    data: str = Field(default="", description="The data, where runs on it are to be compared.")
    unsure: tuple[str, ...] = Field(default=(), description="What was not stated and is taken as usual.")

    @property
    def tokens(self) -> int:
        """Tokens of the longest forward pass on one GPU, padding included."""
        return self.micro_batch * self.seq_len

    @property
    def mean_tokens(self) -> float:
        """Tokens of a mean forward pass on one GPU, padding left out."""
        return self.micro_batch * (self.seq_len if self.mean_len is None else self.mean_len)

    @property
    def shards(self) -> int:
        """Cards over which weights, gradients and states are divided."""
        return self.gpus if self.sharding else 1

    def ways(self, kind: Literal["TP", "PP", "CP"]) -> int:
        """Cards over which tensors, layers or the sequence are divided, as `TP4 PP8` says."""
        found = re.search(rf"\b{kind}(\d+)", self.sharding)
        return max(1, int(found[1])) if found else 1

    @property
    def divided(self) -> int:
        """Cards that share one sample."""
        return self.ways("TP") * self.ways("PP") * self.ways("CP")

    @property
    def recipe(self) -> tuple[object, ...]:
        """Everything but batch, length and rank: runs of one recipe differ in these alone."""
        kept = (
            self.framework,
            self.model,
            self.method,
            self.targets,
            self.weight_bits,
            self.upcast,
            self.checkpointing,
        )
        return (*kept, self.loss, self.compile, self.optimizer, self.packed, self.sharding, self.data)


def style(framework: str) -> str:
    """Whose model code a framework runs: torchtune, litgpt, unsloth or, for all others, transformers."""
    name = framework.lower()
    return next((known for known in ("torchtune", "litgpt", "unsloth") if known in name), "transformers")
