"""Tables of measured runs, as people publish them: what a row says, and the job that it describes.

A row is read leniently where people write in words, and strictly where they write numbers: one that cannot be is named.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from chiplog.errors import NotFoundError, RecordError
from chiplog.estimate.job import ALL_LINEAR, Checkpointing, Job, MemoryKind, Method, Target, spread, style
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
    group: Words = ""
    model: Words = ""
    method: Words = ""
    lora_rank: Annotated[float, Field(ge=0, le=LARGEST)] | None = None
    lora_targets: Words = ""
    dtype: Words = ""
    quant: Words = ""
    batch_size: Count = None
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

    Raises NotFoundError, whose words are the reason, where the model's shape is not known, or the method or a size is
    missing.
    """
    shape = find(row.model)
    if shape is None:
        raise NotFoundError(f"unknown architecture: {row.model}")
    unsure = [name for name in ("micro_batch", "seq_len", "act_ckpt") if getattr(row, name) is None]
    if {"micro_batch", "seq_len"} <= set(unsure) and row.batch_size is None:
        raise NotFoundError("neither batch nor length is stated")
    method, framework = _method(row), row.framework or "unknown"
    code = style(framework)
    targets = _targets(row.lora_targets.lower(), method)
    if not targets:
        unsure.append("lora_targets")
        targets = USUAL_TARGETS if code == "transformers" else ALL_LINEAR
    words, dtype = f"{row.notes} {row.optimizer} {row.sharding}".lower(), row.dtype.lower()
    plain_peft = code == "transformers" and "axolotl" not in framework.lower()
    loss = _loss(words, framework)
    if "axolotl" in framework.lower() and loss == "plain":  # what its examples have switched on since 2025
        loss = "cut"
        unsure.append("loss")
    bits = 4 if method == "qlora" else _bits(row.quant.lower())
    by_hand = re.search(r"accelerated|gptq|awq", f"{words} {row.quant.lower()}")
    alone = re.search(r"single[- ](?:gpu|device)", words)
    gpus = 1 if alone else round(row.n_gpus or 1)
    packed = row.packed is True
    data = _data(words) or ("alpaca" if code == "torchtune" and row.packed is False else None)  # as its recipes do
    sharding = _sharding(row.sharding, framework, method, gpus)
    if shape.mixture_layers and gpus > 1 and (experts := re.search(r"(?<![a-z])ep[ _=-]?(\d+)(?![a-z\d])", words)):
        sharding = f"{sharding} EP{experts[1]}".strip()
    # FSDP divides tensors of one type alone. LitGPT's figures are those of a stream in fp32.
    upcast = bits == 4 and (plain_peft or code == "litgpt") and not by_hand and not spread(sharding, gpus).gathers
    micro_batch = _micro_batch(row, gpus // spread(sharding, gpus).sample)
    longest, mean = _lengths(round(row.seq_len or 512), micro_batch, packed, words, data)
    return Job(
        framework=framework, model=row.model.lower(), shape=shape,
        method=method, small=re.sub(r"\W", "", row.method.lower()) if method == "adapter" else "",
        dora=_says("q?dora", f"{row.method} {words}"), rank=round(row.lora_rank or 16) or 1,
        targets=targets, dtype=_dtype(dtype), master=method == "full" and _keeps_fp32(dtype, plain_peft, code == "own"),
        weight_bits=bits, upcast=upcast,
        micro_batch=micro_batch, grad_accum=_accumulated(row, micro_batch * gpus // spread(sharding, gpus).sample),
        seq_len=longest, mean_len=mean, packed=packed,
        checkpointing=_checkpointing(row.act_ckpt, framework),
        offload=_says(r"activation[_ ]offload(?:ing)?|offload_activations", words),
        loss=loss, attention=_attention(f"{row.attn} {framework}".lower()),
        expert_loop=code == "transformers" and not re.search(r"scattermoe|megablocks|grouped|sonicmoe", words),
        compile=row.compile is True or _says(r"(?:torch[._])?compiled?", words),
        optimizer=_optimizer(row.optimizer.lower()),
        in_backward=_says(r"optimizer_in_bwd|optimizer in (?:bwd|backward)|optimizer step into backward", words),
        dropout=code in ("transformers", "litgpt"), gpu=row.gpu or None, gpus=gpus,
        sharding=sharding, memory_kind=_memory_kind(row.mem_kind.lower() or "allocated"), data=data or "",
        group=row.group, unsure=tuple(unsure),
    )  # fmt: skip


def _micro_batch(row: Row, copies: int) -> int:
    """Samples of a pass: as stated, else what accumulation and `copies` of the model leave of the batch."""
    if row.micro_batch or not row.batch_size:
        return round(row.micro_batch or USUAL_BATCH)
    return max(1, round(row.batch_size / (row.grad_accum or 1) / max(copies, 1)))


def _accumulated(row: Row, at_once: int) -> int:
    """Passes a step, where they are not stated: those in which `at_once` samples make a batch."""
    return round(row.grad_accum or max((row.batch_size or 0) / at_once, 1))


def _says(form: str, words: str) -> bool:
    """Whether words name a setting, but for those that switch it off: `compile=False`, `no compile`."""
    switched = rf"(?<![a-z])(no[t ]? ?|without )?(?:{form})(?![a-z])(?:\s*[=:]\s*(\w+))?"
    found = re.findall(switched, words.lower())
    return any(not off and value not in OFF for off, value in found)


USUAL_BATCH = 2  # where nothing is said of it
OFF = ("false", "no", "none", "off", "0")


def _method(row: Row) -> Method:
    text = re.sub(r"[^a-z0-9]", "", row.method.lower())
    if not text:
        raise NotFoundError("the method is not stated")
    if "full" in text or text in ("sft", "pretrain", "pretraining"):
        return "full"
    if re.match(r"q(?:a?lora|dora)|lora4bit", text):
        return "qlora"
    return "lora" if re.fullmatch(r"(?:rs)?(?:lora|dora)(?:r?\d*|bf16|fp16|fp8|fp32)", text) else "adapter"


ATTENTION = r"self_attn|\battention\b"  # its four layers
USUAL_TARGETS: frozenset[Target] = frozenset({"q", "v"})  # PEFT's own choice
_TARGETS: tuple[tuple[Target, str], ...] = (
    ("q", rf"q_proj|query|c_attn|qkv|\bq\b|{ATTENTION}"), ("k", rf"k_proj|key|c_attn|qkv|\bk\b|{ATTENTION}"),
    ("v", rf"v_proj|value|c_attn|qkv|\bv\b|{ATTENTION}"),
    ("o", rf"o_proj|output_proj|projection|c_proj|\bo\b|{ATTENTION}"),
    ("mlp", r"(?:up|gate|down)_proj|mlp|feed_forward|fc\d|\bw[123]\b|\b(?:up|gate|down)\b"), ("head", r"head\b"),
)  # fmt: skip


def _targets(text: str, method: Method) -> frozenset[Target]:
    """What is adapted or trained; empty where that is not stated or cannot be read."""
    if method == "full":
        return ALL_LINEAR
    if re.search(r"\ball\b|all[-_]linear", text):
        return ALL_LINEAR
    adapted, _, trained = text.partition("+ trainable")
    listed = re.sub(r"\.\(([^)]*attn[^)]*)\)\.", ".", adapted)  # of a pattern, the modules whose layers are then named
    found: set[Target] = {name for name, form in _TARGETS if re.search(form, listed)}
    if trained or re.search(r"embed_tokens|\bwte\b", adapted):
        found.add("embedding")
    return frozenset(found)


def _bits(quant: str) -> Literal[4, 8, 16]:
    if re.search(r"4[- _]?bit|[nf][fp]4|int4|\bw4", quant):
        return 4
    if re.search(r"8[- _]?bit|int8|\bw8", quant):
        return 8
    return 4 if re.search(r"gptq|awq|hqq|quip|aqlm", quant) else 16  # nearly always of 4 bits


def _dtype(text: str) -> Literal["bf16", "fp16", "fp32", "fp8"]:
    if "fp8" in text or "float8" in text:
        return "fp8"
    if "bf16" in text or "bfloat16" in text:
        return "bf16"
    if "16" in text or "half" in text:
        return "fp16"
    return "fp32" if re.search(r"32|float|single|full", text) else "bf16"


# Tokens of a mean and of about the longest sample of public instruction data.
LENGTHS = {
    "alpaca": (110, 1000), "chip2": (60, 500), "oig": (60, 500), "dolly": (200, 4000), "metamath": (210, 2000),
    "oasst": (350, 4000), "open assistant": (350, 4000), "orca": (400, 4000),
}  # fmt: skip


def _data(words: str) -> str | None:
    """The public data set that the words name."""
    return next((name for name in LENGTHS if name in words), None)


def _lengths(limit: int, micro_batch: int, packed: bool, words: str, data: str | None) -> tuple[int, float | None]:
    """Tokens of the longest sample, of at most `limit`, and of a mean one, as far as a row says.

    A pass is padded to the longest of its samples: of lengths with an exponential tail, the mean's harmonic multiple.
    """
    mean, longest = LENGTHS[data] if data else (None, limit)
    if mean and not re.search(r"bucket|padding[- ]free|group\w*[- _]by[- _]length", words):
        mean *= math.log(micro_batch) + 0.5772 + 0.4228 / micro_batch  # the harmonic number, within 2 %
    if stated := re.search(r"mean tokens/step (\d{1,9})(?!\d)", words):
        mean = max(1, int(stated[1])) / micro_batch
    return (limit, None) if packed or mean is None else (min(limit, longest), min(limit, mean))


def _keeps_fp32(dtype: str, plain_peft: bool, own: bool) -> bool:
    """Whether a job that trains all weights keeps them in fp32: mixed precision, which is what a trainer's flag `bf16`
    asks for, and what programs for pretraining do."""
    if re.search(r"true|pure|32", dtype):
        return False
    return own or "amp" in dtype or "mixed" in dtype or (plain_peft and dtype in ("bf16", "fp16"))


def _checkpointing(value: bool | str | None, framework: str) -> Checkpointing:
    if value is None:
        return "none" if style(framework) in ("litgpt", "own") else "full"
    if isinstance(value, str):
        value = value.lower()
        value = {"true": True, "yes": True, "false": False, "no": False, "none": False, "off": False}.get(value, value)
        value = False if value in ("0", "nothing", "") else value
    if isinstance(value, str):
        return "selective" if re.search(r"sel|sac|op|layer", value) and "full" not in value else "full"
    return "full" if value else "none"


def _attention(words: str) -> Literal["usual", "flash", "eager"]:
    if _says("eager", words):
        return "eager"
    return "flash" if _says(r"flash[a-z_0-9 -]*|fa[23]?|xformers", words) else "usual"


def _loss(words: str, framework: str) -> Literal["plain", "fused", "chunked", "cut"]:
    if _says(r"liger[a-z_]*|cut[_ -]cross[_ -]entropy|cce", words):
        return "cut"
    if _says(r"chunked ce|chunked cross[_ -]entropy", words):
        return "chunked"
    if style(framework) == "unsloth" or re.search(r"foundry|composer", framework.lower()):
        return "fused"
    return "fused" if _says(r"(?:[\w]+-)*foak(?:-\w+)*|fast[_-]kernels|fused[_ ]cross[_ ]?entropy", words) else "plain"


def _sharding(text: str, framework: str, method: Method, gpus: int) -> str:
    """How the model is spread; NeMo divides an optimiser's states where nothing else does.

    DeepSpeed without a stage leaves frozen weights whole: what is trained beside them is small.
    """
    divided = spread(text, gpus)
    if method != "full" and text.strip().lower() in ("deepspeed", "zero"):
        return "zero2"
    if "nemo" in framework.lower() and divided.states == divided.tensor * divided.pipeline:
        return f"{text} distributed optimizer".strip()
    return text


def _optimizer(text: str) -> Literal["adamw", "adamw8bit", "paged", "sgd"]:
    if "paged" in text:
        return "paged"
    return "adamw8bit" if re.search(r"8[-_ ]?bit", text) else "sgd" if "sgd" in text else "adamw"


def _memory_kind(text: str) -> MemoryKind:
    if "alloc" in text or "active" in text:
        return "allocated"
    return (
        "card"
        if re.search(r"gpu|vram|card|smi|used|device|nvml|nvitop|wandb|system", text) and "reserved" not in text
        else "reserved"
    )
