"""What the runs of a plan will need all together: against the clock, the budget, the cards and the disk."""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from chiplog.checks import Check, warning
from chiplog.engines.local import available_gpus
from chiplog.errors import PlanError
from chiplog.estimate import NAMED, Estimate
from chiplog.estimate.model import BASES
from chiplog.machine import available_cpus
from chiplog.plan import Plan, Run
from chiplog.schema import Frozen
from chiplog.settings import Settings
from chiplog.sizing import PlannedRun, device_of
from chiplog.text import size

UNSURE = 0.05  # chance of running out of memory from which it is said


class Totals(Frozen):
    """What all runs will need together; runs without evidence are counted, not guessed."""

    runs: int = Field(description="Jobs in all.")
    controls: int = Field(description="Of these, evaluations of a base model.")
    unknown: int = Field(description="Runs whose time nothing tells yet.")
    in_sequence_s: Estimate | None = Field(description="Seconds one after another; null if a run is unknown.")
    in_parallel_s: float | None = Field(
        description="Seconds with as many at once as jobs_at_once, CPUs and GPUs allow; null: not known."
    )
    gpu_hours: float | None = Field(description="GPU hours; null if a run is unknown.")
    cost: float | None = Field(default=None, description="Price of these; null if a GPU has none in chiplog.toml.")
    disk_bytes: int | None = Field(default=None, description="Bytes that they leave on disk; null: not known.")
    disk_free_bytes: int | None = Field(default=None, description="Bytes that are free there.")


def make_totals(rows: Sequence[PlannedRun], settings: Settings) -> Totals:
    """Sums over the runs. The ends of the interval add up too, which is wider than it need be."""
    times = [(row.run, row.estimate.elapsed) for row in rows]
    known = [time for _, time in times if time]
    complete = len(known) == len(rows)
    together = None
    names = sorted({name for time in known for name in time.evidence})
    if complete and known:
        together = Estimate(
            value=sum(time.value for time in known),
            low=sum(time.low for time in known),
            high=sum(time.high for time in known),
            coverage=None,
            basis=BASES[max(BASES.index(time.basis) for time in known)],
            evidence=names[:NAMED],
            n_evidence=len(names),
        )
    costs = [row.estimate.cost for row in rows]
    disks = [row.estimate.disk_bytes for row in rows]
    return Totals(
        runs=len(rows),
        controls=sum(row.run.kind == "control" for row in rows),
        unknown=len(rows) - len(known),
        in_sequence_s=together,
        in_parallel_s=_parallel([(run, time.value) for run, time in times if time], settings) if complete else None,
        gpu_hours=sum(time.value * run.resources.all_gpus for run, time in times if time) / 3600 if complete else None,
        cost=sum(cost for cost in costs if cost is not None) if None not in costs else None,
        disk_bytes=sum(disk for disk in disks if disk is not None) if None not in disks else None,
        disk_free_bytes=_free(settings.experiments),
    )


def refuse_over_budget(plan: Plan, rows: Sequence[PlannedRun], settings: Settings) -> None:
    """Raises PlanError for a plan that needs more GPU hours, or costs more, than it may, with how much would fit."""
    limits = [
        ("GPU hours", "gpu_hours", plan.gpu_hours or settings.budget.gpu_hours),
        ("in cost", "cost", settings.budget.cost),
    ]
    for words, field, limit in limits:
        needs = [getattr(row.estimate, field) or 0.0 for row in rows]
        if limit and sum(needs) > limit:
            within, total = 0, 0.0
            for need in sorted(needs):
                total += need
                within += total <= limit
            raise PlanError(
                f"the plan needs about {sum(needs):.1f} {words} and the budget is {limit:g}: within it are the "
                f"{within} shortest of its {len(rows)} runs, or {limit / sum(needs):.0%} of the training; "
                "take fewer values, fewer seeds or fewer epochs, or raise the budget"
            )


def check_room(rows: Sequence[PlannedRun], totals: Totals, settings: Settings) -> list[Check]:
    """Runs that may run out of memory, a disk that may not hold what they leave, a budget that cannot be checked."""
    found = []
    if settings.budget.gpu_hours and totals.unknown:
        words = f"nothing tells the time of {totals.unknown} runs, so the plan may need more GPU hours than it may"
        found.append(warning("budget", words, "Probe them with max_steps 20 first"))
    if settings.budget.cost and totals.cost is None:
        words = "nothing tells what the plan costs: a run's time is not known, or a GPU has no price_per_hour"
        found.append(warning("budget", words, "Give the price in chiplog.toml, and probe the runs"))
    for row in rows:
        if (chance := row.estimate.out_of_memory) and chance > UNSURE:
            micro = row.estimate.micro_batch_size
            mend = f"micro_batch_size {micro} fits 95 % of such runs" if micro else "Probe it with max_steps 20 first"
            found.append(
                warning("memory", f"{row.run.name} runs out of GPU memory with a chance of {chance:.0%}", mend)
            )
    if totals.disk_bytes and totals.disk_free_bytes is not None and totals.disk_bytes > totals.disk_free_bytes:
        words = f"the runs leave up to {size(totals.disk_bytes)} and {size(totals.disk_free_bytes)} are free"
        found.append(warning("disk", words, "Free some, or set [paths] experiments to another disk"))
    return found


def _parallel(jobs: Sequence[tuple[Run, float]], settings: Settings) -> float | None:
    """Seconds until the last job ends if each starts, in order, as soon as what it needs is free; null: not known."""
    have: dict[str, int] = {}
    for run, _ in jobs:
        device, asked = device_of(run, settings), run.resources
        if device == "cpu" and not settings.slurm:
            have[device] = available_cpus()
        elif device != "cpu":
            named = next((g for g in settings.gpus if g.name == device), None)
            count = named.count if named else len(available_gpus()) if not settings.slurm else None
            have[device] = count or settings.budget.jobs_at_once or 0
        elif settings.budget.jobs_at_once:
            have[device] = settings.budget.jobs_at_once * asked.all_cpus
        if have.get(device, 0) < (asked.all_cpus if device == "cpu" else asked.all_gpus):
            return None
    free = {device: [0.0] * count for device, count in have.items()}
    slots = [0.0] * (settings.budget.jobs_at_once or len(jobs))
    last = 0.0
    for run, seconds in jobs:
        device = device_of(run, settings)
        n = run.resources.all_cpus if device == "cpu" else run.resources.all_gpus
        taken = [heapq.heappop(free[device]) for _ in range(n)]
        end = max(*taken, heapq.heappop(slots)) + seconds
        for _ in taken:
            heapq.heappush(free[device], end)
        heapq.heappush(slots, end)
        last = max(last, end)
    return last


def _free(folder: Path) -> int | None:
    """Bytes free on the disk that a folder is or will be on."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    with suppress(OSError):
        return shutil.disk_usage(there).free if there else None
    return None
