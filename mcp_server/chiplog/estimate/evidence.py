"""Measured runs: those that are shipped, facts of public tables, and those of any table in the same columns."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from chiplog.errors import NotFoundError, PlanError
from chiplog.estimate.gpus import Gpu, any_of, gpu
from chiplog.estimate.job import Job, Measured
from chiplog.estimate.table import Row, job_of

SHIPPED = Path(__file__).parent / "data" / "evidence.jsonl"
GB = 1e9
USABLE = 0.975  # GiB that a process can use of each GB that a card is sold by: the mean of those that were seen


@cache
def shipped() -> tuple[Row, ...]:
    """The rows that are shipped; their first line, which says where they come from, left out."""
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    return tuple(Row.model_validate_json(line) for line in lines[1:])


def measured(row: Row) -> Measured:
    """A row as a measured run. Raises a ChiplogError, whose words are the reason, where it is not covered."""
    job = job_of(row)
    if job.gpu:
        try:
            job = job.model_copy(update={"gpu": gpu(job.gpu, row.gpu_mem_gb).key})
        except NotFoundError:
            card = _nearly(job.gpu, row.gpu_mem_gb)
            job = job.model_copy(update={"gpu": card and card.key, "unsure": (*job.unsure, "gpu")})
    capacity = capacity_bytes(row, job)
    peak = row.peak_mem_gb
    if peak and _is_total(row.mem_scope):
        peak = peak / job.gpus
    if row.oom and capacity:
        job = job.model_copy(update={"memory_kind": "reserved"})
    return Measured(
        job=job,
        place=row.suite,
        source=f"{row.source} ({row.model} {row.method}, {job.micro_batch} x {job.seq_len} tokens)",
        peak_bytes=peak * GB if peak and not row.oom else None,
        pass_s=None if why_no_pace(row, job) else _pass_s(row, job),
        above_bytes=capacity if row.oom else None,
        rough="approx" in row.quality or "extrapolated" in row.quality,
    )


def capacity_bytes(row: Row, job: Job) -> float | None:
    """What a process could use of a row's card, where that is known; of one that only its memory names, about that."""
    if job.gpu and "gpu" not in job.unsure:
        return gpu(job.gpu).memory_bytes
    return None if job.gpu or not row.gpu or not row.gpu_mem_gb else USABLE * row.gpu_mem_gb * 2**30


def _nearly(name: str, memory_gb: float | None) -> Gpu | None:
    """A card of that name, of whatever memory."""
    with suppress(NotFoundError):
        return any_of(name, memory_gb)
    return None


def why_no_pace(row: Row, job: Job) -> str | None:
    """Why a row's speed tells nothing of a pass; null where it does."""
    if not job.gpu:
        return f"unknown GPU: {row.gpu}" if row.gpu else "no GPU is stated"
    try:
        gpu(job.gpu).peak(job.dtype)
    except PlanError as error:
        return str(error)
    return None


def _is_total(scope: str) -> bool:
    """Whether a figure is of all cards together."""
    scope = scope.lower()
    if re.match(r"\W*(?:per[ _-]?|each|=?per_)(?:gpu|device|card|rank)", scope) or "=per_gpu" in scope:
        return False
    return bool(re.search(r"total|whole|job|global|aggregate|\bsum\b|\ball\b", scope))


def passes(row: Row, job: Job) -> float | None:
    """Forward and backward passes of one card in a whole run; null where the table does not say."""
    if "steps unknown" in row.quality:
        return None
    if row.steps:
        return row.steps * job.grad_accum
    if row.samples and row.epochs:
        return row.samples * row.epochs / job.micro_batch / job.copies
    return None


def beyond_passes(row: Row, run: Measured) -> float | None:
    """Log of a run's time over that of its passes: what starting, evaluating and saving take; null where a pass was
    not timed apart."""
    done = passes(row, run.job)
    if not (done and row.runtime_s and run.pass_s) or not (
        row.s_per_step or (row.tokens_per_s and not is_unmasked(row))
    ):
        return None
    return math.log(row.runtime_s / (done * run.pass_s))


def is_unmasked(row: Row) -> bool:
    """Whether its tokens a second are of labels alone, which say nothing of what was computed."""
    return "unmasked" in row.tokens_scope.lower()


def _pass_s(row: Row, job: Job) -> float | None:
    """Seconds of one pass: from tokens a second of the cards that share it, from a step, or from the whole run."""
    rate = row.tokens_per_s
    if rate and not is_unmasked(row):
        each = rate / job.gpus if _is_total(row.tokens_scope) else rate
        return job.mean_tokens / (each * job.spread.sample)
    if row.s_per_step:
        return row.s_per_step / job.grad_accum
    done = passes(row, job)
    return row.runtime_s / done if row.runtime_s and done else None
