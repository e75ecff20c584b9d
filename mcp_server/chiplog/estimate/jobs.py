"""Runs of this ledger and of a plan as jobs: the settings that decide memory and time, read from either."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from chiplog.errors import ChiplogError, NotFoundError, PlanError
from chiplog.estimate.gpus import Gpu, gpu
from chiplog.estimate.history import TIME_SPREAD, is_amount, name_of
from chiplog.estimate.job import ALL_LINEAR, FROZEN, Job, Measured, MemoryKind, Method, Target
from chiplog.estimate.memory import at_start
from chiplog.estimate.shapes import Shape, find, known_as, shape_of
from chiplog.estimate.tokens import Steps
from chiplog.plan import Config
from chiplog.record import Record, State

NO_PEAK = 1.02  # times the weights: what a training holds no less than
HERE = "this ledger"  # the place of its runs, as a suite is that of a table's
TARGETS: dict[str, Target] = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "output_proj": "o",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
METHODS: dict[str, Method] = {"full": "full", "lora": "lora", "dora": "lora", "qlora": "qlora"}
KINDS: dict[str, MemoryKind] = {
    "allocated": "allocated", "active": "allocated", "reserved": "reserved", "whole_card": "card",
}  # fmt: skip


def shape_at(model: str) -> Shape:
    """The shape of a model by its folder, its config.json, or its name in the catalogue.

    Raises NotFoundError for a name or an architecture that is not known, PlanError for a config.json that is wrong.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        try:
            return _shape_in(str(path), path.stat().st_mtime_ns)
        except OSError as error:
            raise NotFoundError(
                f"{path} cannot be read: {error.strerror}. Name the model's folder or its name"
            ) from error
    if shape := find(_bare(model)):
        return shape
    raise NotFoundError(
        f"the model {model!r} is no folder and not in the catalogue of published shapes: "
        "give the folder that holds its config.json, or a name such as meta-llama/Llama-3.2-1B"
    )


@lru_cache(maxsize=512)
def _shape_in(path: str, _: int) -> Shape:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(config, Mapping):
        raise PlanError(f"{path} is no JSON object: download it again")
    try:
        return shape_of(config)
    except (NotFoundError, PlanError) as error:
        raise type(error)(f"{path}: {error}") from error


def job_of_config(
    config: Mapping[str, Any], *, model: str, framework: str, method: str | None, card: Gpu | None, gpus: int,
    micro_batch: int, grad_accum: int, seq_len: int, mean_len: float, memory_kind: MemoryKind = "allocated",
) -> Job:  # fmt: skip
    """A job with these settings. `seq_len` and `mean_len`: tokens of the longest and the mean sample, padded.

    Raises NotFoundError, whose words are the reason, where the model's shape is not known.
    """
    own = framework == "torchtune"
    kind = method or ("lora" if config.get("lora_rank") else "full")
    kind = "qlora" if kind == "lora" and config.get("quantize_base") is True else kind
    dtype: dict[str, Literal["bf16", "fp16", "fp32"]] = {"fp32": "fp32", "fp16": "fp16"}
    unsure = [] if own or "activation_checkpointing" in config else ["act_ckpt"]
    return Job(
        framework=framework, model=called(model), shape=shape_at(model),
        method=METHODS.get(kind, "adapter"), dora=kind == "dora" or config.get("use_dora") is True,
        rank=_count(config.get("lora_rank")) or 16, targets=_targets(config.get("lora_targets")),
        dtype=dtype.get(str(config.get("dtype")), "bf16"), weight_bits=4 if kind == "qlora" else 16,
        micro_batch=micro_batch, grad_accum=grad_accum, seq_len=seq_len, mean_len=mean_len,
        packed=config.get("packed") is True,
        checkpointing="full" if config.get("activation_checkpointing") is True else "none",
        loss="chunked" if own and config.get("chunked_loss") is not False else "plain",
        compile=config.get("compile") is True,
        optimizer=_optimizer(str(config.get("optimizer") or "")),
        in_backward=config.get("optimizer_in_bwd") is True, dropout=bool(config.get("lora_dropout")) or not own,
        gpu=card.key if card else None, gpus=max(1, gpus), sharding=_sharding(config) if gpus > 1 else "",
        memory_kind=memory_kind, data=Path(str(config.get("dataset") or "")).stem.lower(), unsure=tuple(unsure),
    )  # fmt: skip


def planned_job(config: Config, trained: Steps, *, card: Gpu, gpus: int) -> Job:
    """The training of a run that is planned, from the lengths of its samples; each GPU takes its part of the batch."""
    each = max(1, config["batch_size"] // gpus)
    micro = min(trained.micro_batch, each)
    padded = trained.tokens_per_step_mean / max(1 - trained.padding_share, 1e-6)
    return job_of_config(
        config, model=config["model"], framework="torchtune", method=None, card=card, gpus=gpus,
        micro_batch=micro, grad_accum=-(-each // micro),
        seq_len=max(1, -(-trained.tokens_longest_pass // trained.micro_batch)),
        mean_len=max(1.0, padded / (trained.micro_batch * trained.grad_accum)),
    )  # fmt: skip


def control_job(config: Config, card: Gpu) -> Job:
    """The model of a run that only evaluates, one token at a time."""
    return job_of_config(
        config, model=config["model"], framework="torchtune", method="lora", card=card, gpus=1, micro_batch=1,
        grad_accum=1, seq_len=1, mean_len=1.0,
    )  # fmt: skip


def measured_run(record: Record, only: Gpu | None) -> Measured | None:
    """A run of the ledger as a measured one; None where it says nothing that can be compared.

    `only` is the one card there is, taken for runs whose log names none.
    """
    usage, config, gpus = record.usage, record.config, record.usage.gpus or 1
    card = _card(usage.device) if usage.device else only
    batch = batch_of(config, gpus)
    if card is None or batch is None or not record.model or gpus < 1:
        return None
    micro, accum = batch
    steps = (usage.steps or 0) - (usage.resumed_from or 0)
    rate = steps / usage.train_s if is_amount(usage.train_s) and steps > 0 else usage.mean_steps_per_s
    rate = rate if is_amount(rate) else usage.steps_per_s
    training = record.steps.get("train") is not State.COMPLETED  # else it was evaluating when it ended
    ran_out = record.state is State.OUT_OF_MEMORY and record.oom is not None and record.oom.kind == "gpu" and training
    lengths = _lengths(record, micro, steps * accum * micro * gpus, ran_out)
    if lengths is None:
        return None
    kind = KINDS.get(usage.mem_kind or "")
    try:
        job = job_of_config(
            config, model=record.model, framework=record.framework or "torchtune", method=record.method, card=card,
            gpus=gpus, micro_batch=micro, grad_accum=accum, seq_len=lengths[0], mean_len=lengths[1],
            memory_kind="reserved" if ran_out else kind or "allocated",
        )  # fmt: skip
    except ChiplogError:
        return None
    peak = usage.train_peak_mem_bytes or (None if usage.eval_s else usage.peak_mem_bytes)
    capacity = record.oom and record.oom.capacity_bytes
    return Measured(
        job=job,
        place=HERE,
        source=name_of(record),
        peak_bytes=float(peak) if kind and not ran_out and is_amount(peak) and peak > NO_PEAK * at_start(job) else None,
        pass_s=1 / rate / accum if rate and is_amount(rate) else None,
        pass_spread=TIME_SPREAD,
        above_bytes=(capacity if is_amount(capacity) else float(card.memory_bytes)) if ran_out else None,
    )


def batch_of(config: Mapping[str, Any], gpus: int) -> tuple[int, int] | None:
    """Micro-batch and accumulation on each GPU; None where the settings do not say."""
    batch, micro, accum = (_count(config.get(name)) for name in ("batch_size", "micro_batch_size", "grad_accum"))
    if micro is None and batch is None:
        return None
    if micro is None:
        micro = max(1, (batch or 1) // ((accum or 1) * max(1, gpus)))
    return micro, accum or max(1, (batch or micro) // (micro * max(1, gpus)))


def _lengths(record: Record, micro: int, samples: int, ran_out: bool) -> tuple[int, float] | None:
    """Tokens of the longest and the mean sample, padded. None where they are not known: it is no measure of another.

    Of a run that ran out of memory, the longest is what its data can make: what it got through is what fitted.
    """
    usage, limit = record.usage, _count(record.config.get("max_seq_len"))
    if record.config.get("packed") is True and limit:
        return limit, float(limit)
    longest = usage.longest_pass_tokens
    if ran_out:
        longest = record.predicted.longest_pass_tokens if record.predicted else None
    if not longest or longest < 1:
        return None
    seq_len = -(-longest // micro)
    mean = usage.padded_tokens / samples if is_amount(usage.padded_tokens) and samples > 0 else float(seq_len)
    return seq_len, max(1.0, min(mean, float(seq_len)))


def _optimizer(name: str) -> Literal["adamw", "adamw8bit", "paged", "sgd"]:
    name = name.lower()
    return "paged" if "paged" in name else "adamw8bit" if "8bit" in name else "sgd" if "sgd" in name else "adamw"


def _sharding(config: Mapping[str, Any]) -> str:
    """How several GPUs divide the model: as a log of DeepSpeed or our recipe says; else as torchtune does.

    Our recipes are known by `chunked_loss`, which no other has.
    """
    stage = config.get("zero_stage")
    whole = stage == 0 or ("chunked_loss" in config and config.get("shard_model") is not True)
    if "chunked_loss" in config and not whole:
        return f"FSDP of {FROZEN}"
    return f"ZeRO-{stage}" if stage in (1, 2, 3) else "DDP" if whole else "FSDP"


def called(model: str) -> str:
    """The entry of the catalogue that a name or folder means, else its last part."""
    return known_as(_bare(model)) or Path(model).name.lower()


def _bare(model: str) -> str:
    """A model's name without what torchtune's builders put before it: `lora_llama3_2_1b`."""
    return re.sub(r"^q?lora_", "", model)


def _card(device: str) -> Gpu | None:
    try:
        return gpu(device)
    except NotFoundError:
        return None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _targets(value: Any) -> frozenset[Target]:
    names = value if isinstance(value, list) else []
    named: frozenset[Target] = frozenset(TARGETS[name] for name in names if name in TARGETS)
    return named or ALL_LINEAR - {"k"}
