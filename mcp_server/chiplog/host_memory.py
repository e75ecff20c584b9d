"""Host memory of the jobs of a plan: what they ask Slurm for as `--mem`, and where that may be too little.

It is asked for only where runs of the same configuration measured it, as those on a CPU do. Of a run on a GPU nothing
measures it, and what is computed (`host_memory` of the estimator) leaves out the samples, the type of the weights on
disk and what libraries hold: a job that is killed for such a number is worse off than with the partition's default. Nor
is it taken from near runs: a larger rank or a longer sample needs more. So all else is said, and left to the user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from chiplog.checks import Check, warning
from chiplog.expand import expand
from chiplog.plan import Experiment, Plan
from chiplog.recipes import manual
from chiplog.settings import Settings
from chiplog.sizing import PlannedRun
from chiplog.text import size

GIB = 2**30
LEAST_GIB = 4  # of a job: less is no matter to a cluster, and what torch holds at its start varies with its version
# Of the high end, to ask for. What was measured is the process alone; Slurm counts its shell and the pages of the files
# that it reads and writes too, and too much costs a wait in the queue, too little the run.
MARGIN = 1.5
# Of a core, where nothing is asked for, on a generous cluster (FSU RCC, Job Resource Planning: 3.9 GB a CPU).
USUAL_GIB = 4


def with_host_memory(plan: Plan, rows: Sequence[PlannedRun]) -> Plan:
    """The plan with `mem_gib` for experiments that have none and whose every run was measured before.

    One number for a whole experiment, so that its jobs can still be one array.
    """
    kept = []
    for experiment in plan.experiments:
        found = experiment.resources.mem_gib or _measured_gib(_rows_of(plan, experiment, rows))
        resources = experiment.resources.model_copy(update={"mem_gib": found})
        kept.append(experiment.model_copy(update={"resources": resources}))
    return plan.model_copy(update={"experiments": kept})


def check_host_memory(rows: Sequence[PlannedRun], settings: Settings) -> list[Check]:
    """The run that lacks most host memory on Slurm, by what it asks for or what partitions usually give."""
    lacking = [(_needed(row) - _given_gib(row) * GIB, row) for row in rows if settings.slurm]
    lack, row = max(lacking, key=lambda pair: pair[0], default=(0.0, None))
    if row is None or lack < GIB / 2:  # a figure of half a GiB more is none
        return []
    how = "as measured" if _is_measured(row) else "computed from its weights, not measured"
    needs = f"{row.run.name} needs about {size(_needed(row))} of host memory ({how})"
    if asked := row.run.resources.mem_gib:
        return [warning("host memory", f"{needs} and mem_gib asks for {asked} GiB", "Raise mem_gib")]
    return [
        warning(
            "host memory",
            f"{needs} and asks for none: partitions seldom give more than {USUAL_GIB} GiB a core by themselves",
            "Set mem_gib, unless DefMemPerCPU or DefMemPerNode of `scontrol show partition` is enough",
        )
    ]


def _rows_of(plan: Plan, experiment: Experiment, rows: Sequence[PlannedRun]) -> list[PlannedRun]:
    names = {run.name for run in expand(plan.model_copy(update={"experiments": [experiment]}), manual)}
    return [row for row in rows if row.run.name in names]


def _measured_gib(rows: Sequence[PlannedRun]) -> int | None:
    """What the largest of these runs should ask for; null where one was never measured."""
    peaks = [row.estimate.peak_mem for row in rows if _is_measured(row)]
    highs = [peak.high for peak in peaks if peak and peak.basis == "same-configuration"]
    return max(LEAST_GIB, math.ceil(MARGIN * max(highs) / GIB)) if highs and len(highs) == len(rows) else None


def _is_measured(row: PlannedRun) -> bool:
    return row.estimate.peak_mem is not None and row.estimate.mem_kind == "host_rss"


def _needed(row: PlannedRun) -> float:
    """Bytes of each node: the high end of what was measured, else its part of what is computed; 0 where neither is."""
    if row.estimate.peak_mem and _is_measured(row):
        return row.estimate.peak_mem.high
    return (row.estimate.host_mem_bytes or 0) / row.run.resources.nodes


def _given_gib(row: PlannedRun) -> int:
    asked = row.run.resources
    return asked.mem_gib or USUAL_GIB * asked.cpus * max(asked.gpus, 1)
