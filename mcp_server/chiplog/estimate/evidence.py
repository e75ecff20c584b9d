"""Measured runs: those that are shipped, facts of public tables, and those of any table in the same columns."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from chiplog.errors import NotFoundError
from chiplog.estimate.gpus import gpu
from chiplog.estimate.job import Job, Measured
from chiplog.estimate.table import Row, job_of

SHIPPED = Path(__file__).parent / "data" / "evidence.jsonl"
GB = 1e9


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
            job = job.model_copy(update={"gpu": None})
    peak = row.peak_mem_gb
    if peak and "total" in row.mem_scope:
        peak = peak / job.gpus
    ran_out = row.oom and job.gpu
    if ran_out:
        job = job.model_copy(update={"memory_kind": "reserved"})
    return Measured(
        job=job,
        place=row.suite,
        source=f"{row.source} ({row.model} {row.method}, {job.micro_batch} x {job.seq_len} tokens)",
        peak_bytes=peak * GB if peak and not row.oom else None,
        pass_s=_pass_s(row, job),
        above_bytes=gpu(job.gpu).memory_bytes if ran_out and job.gpu else None,
        rough="approx" in row.quality or "extrapolated" in row.quality,
    )


def passes(row: Row, job: Job) -> float | None:
    """Forward and backward passes of one card in a whole run; null where the table does not say."""
    if "steps unknown" in row.quality:
        return None
    if row.steps:
        return row.steps * job.grad_accum
    if row.samples and row.epochs:
        return row.samples * row.epochs / job.micro_batch / job.copies
    return None


def _pass_s(row: Row, job: Job) -> float | None:
    """Seconds of one pass: from tokens a second of the cards that share it, from a step, or from the whole run."""
    rate, scope = row.tokens_per_s, row.tokens_scope.lower()
    if not job.gpu:
        return None
    gpu(job.gpu).peak(job.dtype)  # that it can compute in this type
    if rate and "unmasked" not in scope:
        each = rate / job.gpus if scope.startswith("total") and "=per_gpu" not in scope else rate
        return job.mean_tokens / (each * job.spread.sample)
    if row.s_per_step:
        return row.s_per_step / job.grad_accum
    done = passes(row, job)
    return row.runtime_s / done if row.runtime_s and done else None
