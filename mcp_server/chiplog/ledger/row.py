"""A record as one flat row, in the field names that the field's benchmarks of log parsers use.

| row | record |
|---|---|
| terminal_state | state |
| gpu_type, n_gpus | usage.device, usage.gpus |
| final_step, total_steps, resumed_from_step, final_epoch | usage.steps, .steps_planned, .resumed_from, .epoch |
| last_loss, mean_train_loss | usage.loss_last, .loss_mean |
| train_elapsed_s, job_elapsed_s | usage.train_s, .elapsed_s |
| steps_per_s | usage.mean_steps_per_s, else .steps_per_s |
| peak_mem {value, unit, kind} | usage.peak_mem_bytes, .mem_kind |
| oom {kind, tried_gib, capacity_gib} | oom |
| n_runs | how many runs stand in the file or job |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chiplog.record import Record

GIB = 2**30


def row(records: Sequence[Record]) -> dict[str, Any]:
    """The last run of a file or job, and how many there are."""
    record = records[-1]
    usage, oom = record.usage, record.oom
    peak = _peak(record)
    return {
        "terminal_state": record.state.value,
        "job_id": record.job_id,
        "gpu_type": usage.device,
        "n_gpus": usage.gpus,
        "model": record.model,
        "final_step": usage.steps,
        "total_steps": usage.steps_planned,
        "resumed_from_step": usage.resumed_from,
        "final_epoch": usage.epoch,
        "last_loss": usage.loss_last,
        "mean_train_loss": usage.loss_mean,
        "train_elapsed_s": usage.train_s,
        "job_elapsed_s": usage.elapsed_s,
        "steps_per_s": usage.mean_steps_per_s or usage.steps_per_s,
        "peak_mem": peak,
        "oom": {"kind": oom.kind, "tried_gib": _gib(oom.tried_bytes), "capacity_gib": _gib(oom.capacity_bytes)}
        if oom
        else None,
        "n_runs": len(records),
    }


def _peak(record: Record) -> dict[str, Any] | None:
    """The peak as it is printed: logs differ in what they call a GB."""
    usage = record.usage
    if usage.peak_mem_bytes is None:
        return None
    printed = next((e.printed for e in record.evidence if e.of == "peak_mem_bytes" and e.printed), None)
    value, _, unit = (printed or f"{usage.peak_mem_bytes} bytes").partition(" ")
    return {"value": float(value), "unit": unit, "kind": usage.mem_kind}


def _gib(size: float | None) -> float | None:
    return None if size is None else size / GIB
