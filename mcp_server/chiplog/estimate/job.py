"""What a training job asks of its GPUs: the noun to which plans, logs and public tables are all brought.

It holds what decides memory and time, and nothing of who ran it. A field that was not stated has its usual value; of
those that decide much, `unsure` names the ones that were not.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Literal, NamedTuple

from pydantic import Field

from chiplog.estimate.shapes import Shape
from chiplog.schema import Frozen

Method = Literal["full", "lora", "qlora", "adapter"]
Target = Literal["q", "k", "v", "o", "mlp", "head", "embedding"]
Checkpointing = Literal["none", "selective", "full"]
MemoryKind = Literal["allocated", "reserved", "card"]
ALL_LINEAR: frozenset[Target] = frozenset({"q", "k", "v", "o", "mlp"})
NODE = 8  # cards that are linked closely
# Programs with model code of their own, and attention in one kernel, by a word of their names.
OWN_CODE = (
    "torchtitan", "foundry", "composer", "mosaic", "nemo", "megatron", "nanotron", "neox", "olmo-core", "levanter",
    "maxtext", "fairseq", "metaseq", "nanogpt", "nanochat", "xtuner v1", "veomni",
)  # fmt: skip
FUSED = ("nemo", "megatron", "unsloth")  # programs whose small kernels were joined by hand


class Spread(NamedTuple):
    """How a model is spread: over how many cards each thing is divided."""

    weights: int = 1
    gradients: int = 1
    states: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1  # experts; whether data parallelism divides them further, the program decides
    gathers: bool = False  # whether a layer's weights are gathered before it computes

    @property
    def sample(self) -> int:
        """Cards that share one sample."""
        return self.tensor * self.pipeline * self.context


@cache
def spread(sharding: str, gpus: int) -> Spread:
    """How `gpus` cards share a job, as people write it: FSDP, ZeRO-2, TP4 PP8, DDP.

    Nothing said, and plain data parallelism, divide nothing. DeepSpeed without a stage is taken as stage 3 where it is
    all that is said. Degrees that make more than there are cards are left out. "frozen weights": what is trained is
    whole on each card.
    """
    text = sharding.lower()
    degrees = [_degree(form, text, gpus) for form in WAYS]
    expert = _degree(EXPERTS, text, gpus)
    tensor, pipeline, context = degrees if math.prod(degrees) <= gpus else (1, 1, 1)
    within, rest = tensor * pipeline, gpus // (tensor * pipeline)  # cards along the sequence hold shards of their own
    over, level = _shards(text, rest, context), _level(text)
    weights, gradients, states = (within * (over if level >= least else 1) for least in (3, 2, 1))
    if FROZEN in text:
        gradients = states = within
    expert = expert if rest % expert == 0 else 1
    return Spread(weights, gradients, states, tensor, pipeline, context, expert, gathers=level == 3 and over > 1)


FROZEN = "frozen weights"
BEGINS = r"(?<![a-wyz])"  # a word, or what an x joins: TP8xPP4
WAYS = (  # device_map gives each card some of the layers; Megatron's sequence parallelism has no degree of its own
    rf"{BEGINS}tp|tensor[ _-](?:model[ _-])?parallel\w*|(?<!(?:tensor|peline)[ _-]){BEGINS}model[ _-]parallel\w*",
    rf"{BEGINS}pp|pipeline[ _-](?:model[ _-])?parallel\w*|device_map\W*(?:auto|balanced)[\w'\"]*",
    rf"{BEGINS}cp|context[ _-]parallel\w*|ulysses\w*|(?:{BEGINS}sp|sequence[ _-]parallel\w*)(?=[ _=:(-]*\d)",
)
EXPERTS = rf"{BEGINS}ep|expert[ _-](?:model[ _-])?parallel\w*"


def _level(text: str) -> int:
    """What data parallelism divides, as ZeRO counts it: 1 states, 2 gradients too, 3 weights too; 0 nothing."""
    if stage := re.search(r"(?:zero|stage|(?<![a-z])z)[ _-]*([0-3])", text):
        return int(stage[1])
    if re.search(r"(?:no[ _-]*|un)shard|ddp(?![a-z])|(?:fsdp|shard\w*)[ _]*[=:][ _]*(?:false|no|off|none)", text):
        return 0
    if re.search(r"fsdp|hsdp|shard|zero|deepspeed", text):
        return 2 if "grad_op" in text else 3
    return 1 if re.search(r"dist\w*[ _-]*opt", text) else 0


def _shards(text: str, rest: int, context: int) -> int:
    """Cards over which data parallelism divides: all, or as many as `hybrid` and FSDP's number say.

    FSDP1 and FSDP2 are also the names of its versions.
    """
    if re.search(r"hybrid|hsdp", text):
        return min(rest, NODE)
    stated = re.search(r"fsdp[ _=:-]*(\d{1,6})", text)
    degree = int(stated[1]) * context if stated and int(stated[1]) > 2 else rest
    return degree if rest % degree == 0 else rest


def _degree(form: str, text: str, gpus: int) -> int:
    """Cards that a word divides something over: the number behind it, or all where the word is all that is said."""
    if before := re.search(rf"(?<!\d)(\d{{1,6}})[ -]?way[ -](?:{form})", text):
        return max(1, int(before[1]))
    found = re.search(rf"(?:{form})(?:[ _-]*size)?[ _=:(-]*(\d{{1,6}})?", text)
    if not found:
        return 1
    return max(1, int(found[1])) if found[1] else gpus if found[0].strip() == text.strip() else 1


class Job(Frozen):
    """One training job."""

    framework: str = Field(description="The program that trains, with its variant: torchtune, litgpt, peft.")
    model: str = Field(description="The model's name.")
    shape: Shape = Field(description="Its shape.")
    method: Method = Field(description="What is trained; adapter is any small method other than LoRA.")
    small: str = Field(default="", description="Which small method, where it is an adapter.")
    rank: int = Field(default=16, gt=0, description="LoRA rank.")
    dora: bool = Field(default=False, description="Whether adapters train magnitudes beside directions (DoRA).")
    targets: frozenset[Target] = Field(default=ALL_LINEAR, description="What has adapters or is trained beside them.")
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = Field(default="bf16", description="What is computed in.")
    master: bool = Field(default=False, description="Whether weights are kept in fp32 and computed in another type.")
    weight_bits: Literal[4, 8, 16] = Field(default=16, description="Bits of a frozen weight.")
    upcast: bool = Field(default=False, description="Whether 4-bit loading casts embeddings, norms and stream to fp32.")
    micro_batch: int = Field(gt=0, description="Samples of one forward pass on one GPU.")
    grad_accum: int = Field(default=1, gt=0, description="Passes a step.")
    seq_len: int = Field(gt=0, description="Tokens of the longest sample of a pass, padding and packing included.")
    mean_len: float | None = Field(
        default=None, description="Tokens of a mean sample where they differ, padded as its pass is; null: seq_len."
    )
    packed: bool = Field(default=False, description="Whether samples are packed up to seq_len.")
    checkpointing: Checkpointing = Field(default="none", description="Activations computed anew in the backward pass.")
    offload: bool = Field(default=False, description="Whether activations wait on the host.")
    loss: Literal["plain", "fused", "chunked", "cut"] = Field(
        default="plain", description="How the loss is computed; cut: logits are never whole (Liger, cut cross-entropy)."
    )
    attention: Literal["usual", "flash", "eager"] = Field(
        default="usual", description="Whether scores are kept: eager does, usual where the model's code has no kernel."
    )
    expert_loop: bool = Field(default=False, description="Whether experts are run one after another.")
    compile: bool = Field(default=False, description="Whether the model is compiled.")
    optimizer: Literal["adamw", "adamw8bit", "paged", "sgd"] = Field(default="adamw", description="Optimiser.")
    in_backward: bool = Field(default=False, description="Whether it steps within the backward pass.")
    dropout: bool = Field(default=True, description="Whether the adapters have dropout.")
    gpu: str | None = Field(default=None, description="The card's name.")
    gpus: int = Field(default=1, gt=0, description="Cards.")
    sharding: str = Field(default="", description="How the model is spread: FSDP, ZeRO, TP2 PP4; empty: not.")
    memory_kind: MemoryKind = Field(default="allocated", description="What a peak counts.")
    group: str = Field(default="", description="The configuration as its table names it: all but the batch.")
    data: str = Field(default="", description="The data, where runs on it are to be compared.")
    unsure: tuple[str, ...] = Field(default=(), description="What was not stated and is taken as usual.")

    @property
    def tokens(self) -> int:
        """Tokens of the longest forward pass on one GPU, padding included."""
        return self.micro_batch * self.seq_len

    @property
    def mean_tokens(self) -> float:
        """Tokens of a mean forward pass on one GPU."""
        return self.micro_batch * (self.seq_len if self.mean_len is None else self.mean_len)

    @property
    def spread(self) -> Spread:
        """Over how many cards each thing is divided."""
        return spread(self.sharding, self.gpus)

    @property
    def copies(self) -> int:
        """Passes that run at once, each on samples of its own."""
        return self.gpus // self.spread.sample

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are cast where a layer reads them, so that what lies between layers is in fp32.

        Where states are divided, and in programs with code of their own, a layer's weights are in 16 bits already.
        """
        return self.master and self.spread.states == 1 and style(self.framework) != "own"

    @property
    def recipe(self) -> tuple[object, ...]:
        """What runs of one recipe have in common; batch, length, rank, type and card are no part of it."""
        kept = (self.framework, self.model, self.method, self.small, self.dora, self.targets, self.weight_bits)
        how = (self.checkpointing, self.loss, self.compile, self.optimizer, self.packed, self.sharding, self.data)
        return (*kept, *how)


class Measured(NamedTuple):
    """A run that was measured."""

    job: Job
    place: str  # the table, or the cluster
    source: str  # where it stands
    peak_bytes: float | None = None
    pass_s: float | None = None  # seconds of one forward and backward pass
    above_bytes: float | None = None  # what the card has, where it ran out of memory
    rough: bool = False  # whether the figure was rounded or remembered
    pass_spread: float = 0.0  # standard deviation of log(pass_s) when the same is run again, on a cluster in use


def style(framework: str) -> str:
    """Whose model code a framework runs: torchtune, litgpt, unsloth, own (a pretraining program's) or transformers."""
    name = framework.lower()
    known = next((known for known in ("torchtune", "litgpt", "unsloth") if known in name), None)
    return known or ("own" if any(word in name for word in OWN_CODE) else "transformers")
