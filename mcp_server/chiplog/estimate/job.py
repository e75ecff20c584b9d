"""What a training job asks of its GPUs: the noun to which plans, logs and public tables are all brought.

It holds what decides memory and time, and nothing of who ran it. What is not known has the field's usual value and is
named in `unsure`; a missing field is never a feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from chiplog.errors import NotFoundError
from chiplog.estimate.shapes import Shape, find
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
        return int(found[1]) if found else 1

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


def of_row(row: Mapping[str, Any]) -> Job:
    """The job of a row of a table of measurements (the columns are those of data/evidence.jsonl).

    Raises NotFoundError, whose words are the reason, where the model's shape is not known or a size is missing.
    """
    given = {key: value for key, value in row.items() if value not in (None, "")}
    shape = find(str(given.get("model", "")))
    if shape is None:
        raise NotFoundError(f"unknown architecture: {given.get('model')}")
    words = _words(given)
    unsure = [key for key in ("micro_batch", "seq_len") if key not in given]
    method = _method(str(given.get("method", "")), words)
    if {"micro_batch", "seq_len"} <= set(unsure):
        raise NotFoundError("neither batch nor length is stated")
    if "act_ckpt" not in given:
        unsure.append("act_ckpt")
    packed = given.get("packed") is True
    framework = str(given.get("framework", "unknown"))
    four_bit = method == "qlora" or "4bit" in str(given.get("quant", "")) or "nf4" in str(given.get("quant", ""))
    eight_bit = "8bit" in str(given.get("quant", "")) or "int8" in str(given.get("quant", ""))
    plain_peft = style(framework) == "transformers" and "axolotl" not in framework.lower()
    upcasts = four_bit and plain_peft and not re.search(r"accelerated|gptq|awq", words + str(given.get("quant")))
    micro_batch = max(1, round(given.get("micro_batch", 2)))
    longest, mean = _lengths(max(1, round(given.get("seq_len", 512))), micro_batch, packed, words)
    return Job(
        framework=framework, model=str(given["model"]).lower(), shape=shape, method=method,
        rank=int(given.get("lora_rank") or 16), targets=_targets(given, method, framework),
        dtype=_dtype(str(given.get("dtype", "bf16"))),
        master=_keeps_fp32(str(given.get("dtype", "")), method == "full" and plain_peft),
        weight_bits=4 if four_bit else 8 if eight_bit else 16, upcast=upcasts,
        micro_batch=micro_batch, grad_accum=max(1, round(given.get("grad_accum", 1))),
        seq_len=longest, mean_len=mean, packed=packed,
        checkpointing=_checkpointing(given.get("act_ckpt"), framework, method),
        offload=bool(re.search(r"offload(?:ing)?=true|\+ activation offload", words)),
        loss=_loss(words, framework), compile=given.get("compile") is True or "compile" in words,
        attention="eager" if re.search(r"\beager\b", str(given.get("attn", ""))) or framework == "HF" else "flash",
        optimizer=_optimizer(str(given.get("optimizer", ""))),
        in_backward=bool(re.search(r"optimizer_in_bwd=true|optimizer in bwd", words)),
        dropout=style(framework) in ("transformers", "litgpt"), gpu=given.get("gpu"), gpus=int(given.get("n_gpus", 1)),
        sharding=str(given.get("sharding", "")), memory_kind=_memory_kind(str(given.get("mem_kind", "allocated"))),
        data=_data(given), unsure=tuple(unsure),
    )  # fmt: skip


def style(framework: str) -> str:
    """Whose model code a framework runs: torchtune, litgpt, unsloth or, for all others, transformers."""
    name = framework.lower()
    return next((known for known in ("torchtune", "litgpt", "unsloth") if known in name), "transformers")


def _words(row: Mapping[str, Any]) -> str:
    """What a row says in words, lower case."""
    return " ".join(str(row.get(key, "")) for key in ("notes", "optimizer", "sharding")).lower()


def _method(text: str, words: str) -> Method:
    if "full" in text:
        return "full"
    return "lora" if text == "lora" else "qlora" if text == "qlora" else "adapter"


_TARGETS: tuple[tuple[Target, str], ...] = (
    ("q", r"q_proj|query|c_attn|\bq\b|\|q\|"), ("k", r"k_proj|key|c_attn|\bk\b|\|k\|"),
    ("v", r"v_proj|value|c_attn|\bv\b|\|v\|"), ("o", r"o_proj|output_proj|projection|c_proj|\bo\b|\|o\)"),
    ("mlp", r"up_proj|gate_proj|down_proj|mlp|fc\d|w1|\bup\b|\|up"), ("head", r"(?<!_)head(?!_)"),
)  # fmt: skip


def _targets(row: Mapping[str, Any], method: Method, framework: str) -> frozenset[Target]:
    if method == "full":
        return ALL_LINEAR
    text = str(row.get("lora_targets", "")).lower()
    if not text:  # what the program takes by itself
        return frozenset({"q", "v"}) if style(framework) == "transformers" else ALL_LINEAR
    if "all" in text:
        return ALL_LINEAR
    found: set[Target] = {name for name, form in _TARGETS if re.search(form, text.split("+ trainable")[0])}
    if "trainable" in text:
        found.add("embedding")
    return frozenset(found)


def _dtype(text: str) -> Literal["bf16", "fp16", "fp32", "fp8"]:
    text = text.lower()
    if "8" in text and ("fp8" in text or "float8" in text):
        return "fp8"
    if "bf16" in text or "bfloat16" in text:
        return "bf16"
    return "fp16" if "16" in text else "fp32" if "32" in text else "bf16"


# Tokens of a mean and of about the longest sample of public instruction data.
LENGTHS = {
    "alpaca": (110, 1000), "chip2": (60, 500), "oig": (60, 500), "dolly": (200, 4000), "metamath": (210, 2000),
    "oasst": (350, 4000), "open assistant": (350, 4000), "orca": (400, 4000),
}  # fmt: skip


def _lengths(limit: int, micro_batch: int, packed: bool, words: str) -> tuple[int, float | None]:
    """Tokens of the longest sample, of at most `limit`, and of a mean one, as far as a row names its data."""
    stated = re.search(r"mean tokens/step (\d+)", words)
    mean, longest = next((lengths for name, lengths in LENGTHS.items() if name in words), (None, limit))
    if packed or mean is None:
        return limit, None
    return min(limit, longest), min(limit, int(stated[1]) / micro_batch if stated else mean)


def _keeps_fp32(dtype: str, trains_all: bool) -> bool:
    """Whether weights stay in fp32: autocast, which is what the flag `bf16` of a trainer of all weights asks for."""
    return "amp" in dtype or "mixed" in dtype or (trains_all and dtype in ("bf16", "fp16"))


def _checkpointing(value: object, framework: str, method: Method) -> Checkpointing:
    if value is None:
        return "none" if style(framework) == "litgpt" else "full"
    return "full" if value is True or value == "full" else "selective" if value else "none"


def _loss(words: str, framework: str) -> Literal["plain", "fused", "chunked"]:
    if re.search(r"chunked ce=true|chunked cross|liger|cut cross", words):
        return "chunked"
    fused = re.search(r"\bfoak\b|-foak|fast-kernels|fused cross", words) or style(framework) == "unsloth"
    return "fused" if fused else "plain"


def _optimizer(text: str) -> Literal["adamw", "adamw8bit", "paged", "sgd"]:
    text = text.lower()
    return "paged" if "paged" in text else "adamw8bit" if "8bit" in text else "sgd" if "sgd" in text else "adamw"


def _memory_kind(text: str) -> MemoryKind:
    text = text.lower()
    if "alloc" in text or "active" in text:
        return "allocated"
    return "reserved" if "reserved" in text or text == "peak" else "card"


def _data(row: Mapping[str, Any]) -> str:
    """What the run trained on, as far as a row tells: the first words of its notes, where its length is but a limit."""
    return re.split(r"[;,(]", str(row.get("notes", "")))[0][:24].lower()
