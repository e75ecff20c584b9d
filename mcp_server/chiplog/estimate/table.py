"""Tables of measured runs, as people publish them: what a row says, and the job that it describes.

A row is read leniently where people write in words, and strictly where they write numbers: one that cannot be is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from chiplog.errors import NotFoundError, RecordError
from chiplog.estimate.job import ALL_LINEAR, Checkpointing, Job, MemoryKind, Method, Target, style
from chiplog.estimate.shapes import find
from chiplog.schema import plain_errors

LEAST, LARGEST = 1e-9, 1e15  # of any amount in a table
Words = Annotated[str, BeforeValidator(lambda value: "" if value is None else str(value))]
Count = Annotated[float, Field(ge=1, le=LARGEST)] | None
Amount = Annotated[float, Field(ge=LEAST, le=LARGEST)] | None
Kind = TypeVar("Kind", bound=BaseModel)


class Row(BaseModel):
    """A measured run. What is not stated is null, or empty where it would be words; columns not named here are ignored.

    `*_gb` are decimal gigabytes, `*_s` seconds; `tokens_scope` says whose tokens a second those are.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    source: Words = ""
    suite: Words = ""
    model: Words = ""
    method: Words = ""
    lora_rank: Annotated[float, Field(ge=0, le=LARGEST)] | None = None
    lora_targets: Words = ""
    dtype: Words = ""
    quant: Words = ""
    micro_batch: Count = None
    grad_accum: Count = None
    seq_len: Count = None
    n_gpus: Count = None
    gpu: Words = ""
    gpu_mem_gb: Amount = None
    peak_mem_gb: Amount = None
    mem_kind: Words = ""
    mem_scope: Words = ""
    tokens_per_s: Amount = None
    tokens_scope: Words = ""
    steps: Count = None
    s_per_step: Amount = None
    samples: Amount = None
    epochs: Amount = None
    runtime_s: Amount = None
    oom: bool | None = None
    act_ckpt: bool | str | None = None
    compile: bool | None = None
    packed: bool | None = None
    attn: Words = ""
    optimizer: Words = ""
    sharding: Words = ""
    framework: Words = ""
    quality: Words = ""
    notes: Words = ""


class Sweep(BaseModel):
    """What a batch of a benchmark held on a card."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    bench: Words = ""
    gpu: Words = ""
    batch_size: Count = None
    memory_mib: Amount = None


def as_row(values: Mapping[str, Any], kind: type[Kind]) -> Kind:
    """A row of a table. Raises RecordError, whose words name the columns, for one that is none."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecordError(" ".join(plain_errors(error).split())) from error


def read_table(path: Path) -> list[dict[str, Any]]:
    """A JSON list of rows. Raises RecordError for what is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no table of measurements ({error}): a JSON list of rows is needed") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"{path} is no table of measurements: a JSON list of rows is needed")
    return rows


def job_of(row: Row) -> Job:
    """The job that a row describes.

    Raises NotFoundError, whose words are the reason, where the model's shape is not known or a size is missing.
    """
    shape = find(row.model)
    if shape is None:
        raise NotFoundError(f"unknown architecture: {row.model}")
    words = f"{row.notes} {row.optimizer} {row.sharding}".lower()
    unsure = [name for name in ("micro_batch", "seq_len", "act_ckpt") if getattr(row, name) is None]
    method = _method(row.method)
    if {"micro_batch", "seq_len"} <= set(unsure):
        raise NotFoundError("neither batch nor length is stated")
    packed, framework = row.packed is True, row.framework or "unknown"
    four_bit = method == "qlora" or "4bit" in row.quant or "nf4" in row.quant
    eight_bit = "8bit" in row.quant or "int8" in row.quant
    plain_peft = style(framework) == "transformers" and "axolotl" not in framework.lower()
    upcasts = four_bit and plain_peft and not re.search(r"accelerated|gptq|awq", words + row.quant)
    micro_batch = round(row.micro_batch or 2)
    longest, mean = _lengths(round(row.seq_len or 512), micro_batch, packed, words)
    return Job(
        framework=framework, model=row.model.lower(), shape=shape, method=method,
        rank=round(row.lora_rank or 16) or 1, targets=_targets(row.lora_targets.lower(), method, framework),
        dtype=_dtype(row.dtype),
        master=_keeps_fp32(row.dtype, method == "full" and plain_peft),
        weight_bits=4 if four_bit else 8 if eight_bit else 16, upcast=upcasts,
        micro_batch=micro_batch, grad_accum=round(row.grad_accum or 1),
        seq_len=longest, mean_len=mean, packed=packed,
        checkpointing=_checkpointing(row.act_ckpt, framework),
        offload=bool(re.search(r"offload(?:ing)?=true|\+ activation offload", words)),
        loss=_loss(words, framework), compile=row.compile is True or "compile" in words,
        attention="eager" if re.search(r"\beager\b", row.attn) or framework == "HF" else "flash",
        optimizer=_optimizer(row.optimizer),
        in_backward=bool(re.search(r"optimizer_in_bwd=true|optimizer in bwd", words)),
        dropout=style(framework) in ("transformers", "litgpt"), gpu=row.gpu or None, gpus=round(row.n_gpus or 1),
        sharding=row.sharding, memory_kind=_memory_kind(row.mem_kind or "allocated"),
        data=re.split(r"[;,(]", row.notes)[0][:24].lower(), unsure=tuple(unsure),
    )  # fmt: skip


def _method(text: str) -> Method:
    if "full" in text:
        return "full"
    return "lora" if text == "lora" else "qlora" if text == "qlora" else "adapter"


_TARGETS: tuple[tuple[Target, str], ...] = (
    ("q", r"q_proj|query|c_attn|\bq\b|\|q\|"), ("k", r"k_proj|key|c_attn|\bk\b|\|k\|"),
    ("v", r"v_proj|value|c_attn|\bv\b|\|v\|"), ("o", r"o_proj|output_proj|projection|c_proj|\bo\b|\|o\)"),
    ("mlp", r"up_proj|gate_proj|down_proj|mlp|fc\d|w1|\bup\b|\|up"), ("head", r"(?<!_)head(?!_)"),
)  # fmt: skip


def _targets(text: str, method: Method, framework: str) -> frozenset[Target]:
    if method == "full":
        return ALL_LINEAR
    if not text:  # what the program takes by itself
        return frozenset({"q", "v"}) if style(framework) == "transformers" else ALL_LINEAR
    if "all" in text:
        return ALL_LINEAR
    adapted, _, trained = text.partition("+ trainable")
    found: set[Target] = {name for name, form in _TARGETS if re.search(form, adapted)}
    if trained:
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


def _checkpointing(value: bool | str | None, framework: str) -> Checkpointing:
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
