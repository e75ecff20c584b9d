"""Measured runs: those that are shipped, facts of public tables, and those of any table in the same columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from chiplog.errors import NotFoundError, RecordError
from chiplog.estimate.forecast import Measured
from chiplog.estimate.gpus import gpu
from chiplog.estimate.job import Job, of_row

SHIPPED = Path(__file__).parent / "data" / "evidence.jsonl"
GB = 1e9
Row = Mapping[str, Any]


@cache
def shipped() -> tuple[Row, ...]:
    """The rows that are shipped; their first line, which says where they come from, left out."""
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines[1:])


def read_table(path: Path) -> list[Row]:
    """The rows of a table of measurements, a JSON list. Raises RecordError for what is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is no table of measurements ({error}): a JSON list of rows is needed") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"{path} is no table of measurements: a JSON list of rows is needed")
    return rows


def measured(row: Row) -> Measured:
    """A row as a measured run. Raises a ChiplogError, whose words are the reason, where it is not covered."""
    job = of_row(row)
    if job.gpu:
        try:
            job = job.model_copy(update={"gpu": gpu(job.gpu, row.get("gpu_mem_gb")).key})
        except NotFoundError:
            job = job.model_copy(update={"gpu": None})
    peak = row.get("peak_mem_gb")
    if peak and "total" in str(row.get("mem_scope", "")):
        peak = peak / job.gpus
    quality = str(row.get("quality", ""))
    ran_out = row.get("oom") is True and job.gpu
    if ran_out:
        job = job.model_copy(update={"memory_kind": "reserved"})
    return Measured(
        job=job,
        place=str(row.get("suite", "")),
        source=str(row.get("source", "")),
        peak_bytes=peak * GB if peak and not row.get("oom") else None,
        pass_s=_pass_s(row, job),
        above_bytes=gpu(job.gpu).memory_bytes if ran_out and job.gpu else None,
        rough="approx" in quality or "extrapolated" in quality,
    )


def passes(row: Row, job: Job) -> float | None:
    """Forward and backward passes of one card in a whole run; null where the table does not say."""
    if "steps unknown" in str(row.get("quality", "")):
        return None
    if row.get("steps"):
        return row["steps"] * job.grad_accum
    if row.get("samples") and row.get("epochs"):
        return row["samples"] * row["epochs"] / job.micro_batch / (job.gpus if job.sharding else 1)
    return None


def _pass_s(row: Row, job: Job) -> float | None:
    """Seconds of one pass: from tokens a second of the cards that share it, from a step, or from the whole run."""
    rate, scope = row.get("tokens_per_s"), str(row.get("tokens_scope", "")).lower()
    if not job.gpu:
        return None
    if rate and "unmasked" not in scope:
        each = rate / job.gpus if scope.startswith("total") and "=per_gpu" not in scope else rate
        return job.mean_tokens / (each * job.divided)
    if row.get("s_per_step"):
        return row["s_per_step"] / job.grad_accum
    done = passes(row, job)
    return row["runtime_s"] / done if row.get("runtime_s") and done else None
