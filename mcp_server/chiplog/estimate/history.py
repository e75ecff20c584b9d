"""Estimates from this ledger's own runs: the same configuration, or the nearest one scaled by tokens.

Nothing here is a constant of a model or a GPU. Where no run of the same model, recipe and device is on record, there
is no number, and a probe is offered.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from chiplog.estimate.model import NAMED, Basis, Estimate, RunEstimate, Workload
from chiplog.plan import Config, Run
from chiplog.record import Record, State

# Spread of the log of repeated measurements, before any is made here. Time: two runs that differed only in LoRA rank
# took 22:34 and 15:46, one draw of a difference. Memory: fits of measured peaks err by 2.3-3.3 %.
TIME_SPREAD = math.log(22.57 / 15.77) / math.sqrt(2)
MEMORY_SPREAD = 0.033
PRIOR_WEIGHT = 4  # measurements that the spread above counts as
SCALED_SPREAD = 2.0  # a scaled estimate is taken to spread this much more
COVERAGE = 0.90
# Settings that change neither the time nor the memory of a step.
NEUTRAL = {"seed", "lr", "lr_schedule", "warmup_steps", "weight_decay", "scorer"}
# Settings that change how much is done, not how fast a token goes through.
AMOUNT = {"dataset", "system_prompt", "prompt", "epochs", "max_steps", "eval_split", "eval_limit"}
# Of these, what changes how long the samples are, and so the memory.
LENGTH = {"dataset", "system_prompt", "prompt"}
# Settings that move time and memory little enough to scale across, with a wider interval.
NEAR = {"lora_rank", "lora_alpha", "save_every_n_steps", "log_every_n_steps", "max_new_tokens"}


def estimate_run(run: Run, work: Workload, records: Sequence[Record]) -> RunEstimate:
    """Time and memory of `run` from completed records of the same device; those of other devices must not be given."""
    usable = [r for r in records if r.state is State.COMPLETED and r.kind == run.kind and r.recipe == run.recipe]
    usable = [r for r in usable if r.config.get("model") == run.config["model"]]
    usable = [r for r in usable if (r.usage.cpus, r.usage.gpus) == (run.resources.cpus, run.resources.gpus)]
    differs = {r.key: _differs(run.config, r.config) - NEUTRAL for r in usable}
    same = [r for r in usable if not differs[r.key] and _same_work(r, work)]
    near = [r for r in usable if differs[r.key] <= AMOUNT | NEAR]
    elapsed = _same_elapsed([r for r in same if not r.usage.resumed]) or _scaled_elapsed(
        run, work, _nearest(near, differs)
    )
    peak, kind = _peak(same, _nearest([r for r in near if not differs[r.key] & LENGTH], differs))
    return RunEstimate(elapsed=elapsed, peak_mem=peak, mem_kind=kind)


def _differs(one: Config, other: Config) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def _same_work(record: Record, work: Workload) -> bool:
    """Whether it did as much: a file may hold other rows than it did."""
    return (record.usage.steps or 0, record.usage.eval_samples) == (work.steps, work.eval_samples)


def _nearest(records: Sequence[Record], differs: Mapping[str, set[str]]) -> list[Record]:
    """The records that differ in the fewest settings."""
    fewest = min((len(differs[r.key]) for r in records), default=0)
    return [r for r in records if len(differs[r.key]) == fewest]


def _same_elapsed(records: Sequence[Record]) -> Estimate | None:
    values = [r.usage.elapsed_s for r in records if r.usage.elapsed_s]
    return _estimate(values, TIME_SPREAD, "same-configuration", records) if values else None


def _scaled_elapsed(run: Run, work: Workload, records: Sequence[Record]) -> Estimate | None:
    """The terms of the time, each scaled by what it grows with: training by tokens, evaluation by samples."""
    values, by_steps, used = [], [], []
    for record in records:
        usage = record.usage
        if not (usage.eval_s and usage.eval_samples):
            continue
        fixed = (usage.setup_s or 0.0) + (usage.checkpoint_s or 0.0) + (usage.eval_setup_s or 0.0)
        fixed += usage.eval_s * work.eval_samples / usage.eval_samples
        if run.kind == "control":
            values.append(fixed)
        elif work.tokens and usage.tokens and usage.train_s and usage.steps:
            values.append(fixed + usage.train_s * work.tokens / usage.tokens)
            by_steps.append(fixed + usage.train_s * work.steps / usage.steps)
        else:
            continue
        used.append(record)
    if not values:
        return None
    estimate = _estimate(values, TIME_SPREAD * SCALED_SPREAD, "scaled", used)
    # A small model is bound by its steps, a large one by its tokens: the truth lies between the two.
    low, high = min([estimate.low, *by_steps]), max([estimate.high, *by_steps])
    assumed = ["training time grows with tokens, evaluation time with samples"]
    return estimate.model_copy(update={"low": low, "high": high, "assumed": assumed})


def _peak(same: Sequence[Record], near: Sequence[Record]) -> tuple[Estimate | None, str | None]:
    """Peak memory of runs with the same batch and lengths; it is never scaled by hand."""
    choices: list[tuple[Sequence[Record], Basis, float]] = [
        (same, "same-configuration", MEMORY_SPREAD),
        (near, "scaled", MEMORY_SPREAD * SCALED_SPREAD),
    ]
    for records, basis, spread in choices:
        for kind in sorted({r.usage.mem_kind for r in records if r.usage.mem_kind} - {"after_init"}):
            used = [r for r in records if r.usage.mem_kind == kind and r.usage.peak_mem_bytes]
            if used:
                values = [float(r.usage.peak_mem_bytes or 0) for r in used]
                return _estimate(values, spread, basis, used), kind
    return None, None


def _estimate(values: Sequence[float], spread: float, basis: Basis, records: Sequence[Record]) -> Estimate:
    """Prediction interval of one more value on the log scale: Student's t, the spread pooled with the one before."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    logs = [math.log(value) for value in values]
    n, centre = len(logs), statistics.fmean(logs)
    freedom = n - 1 + PRIOR_WEIGHT
    pooled = math.sqrt((sum((x - centre) ** 2 for x in logs) + PRIOR_WEIGHT * spread**2) / freedom)
    half = float(stdtrit(freedom, (1 + COVERAGE) / 2)) * pooled * math.sqrt(1 + 1 / n)
    names = sorted({f"{r.experiment}/{r.run}" for r in records})
    return Estimate(
        value=math.exp(centre),
        low=math.exp(centre - half),
        high=math.exp(centre + half),
        coverage=None,
        basis=basis,
        evidence=names[:NAMED],
        n_evidence=len(names),
    )
