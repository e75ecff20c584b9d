"""What is to be held against conclusions from runs: their guards, and what cannot be compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from tasks.scaling_laws.arms import cell_of
from tasks.scaling_laws.runs import Run


def doubts(runs: Iterable[Run]) -> list[str]:
    """A sentence for each; none where the runs can bear a conclusion."""
    runs = list(runs)
    said = []
    if failed := [run for run in runs if run.failed_guards]:
        first = failed[0]
        said.append(f"Guards failed in {len(failed)} runs: in {first.name}, {', '.join(first.failed_guards)}.")
    if unknown := [run for run in runs if not run.val_sha256]:
        said.append(f"The metrics of {len(unknown)} runs do not say on which tokens they were validated.")
    if (n := len({run.val_sha256 for run in runs} - {""})) > 1:
        said.append(f"The runs were validated on {n} different sets of tokens.")
    trained = defaultdict(list)
    for run in runs:
        trained[run.losses_sha256].append(run.name)
    if same := [names for told, names in trained.items() if told and len(names) > 1]:
        words = f"{', '.join(same[0][:3])} have the same losses, step for step: what differs in them trained nothing."
        said.append(words)
    if n := sum(run.undecayed for run in runs):
        said.append(f"The learning rate of {n} runs had not decayed at their end.")
    return said


def doubts_of_points(runs: Iterable[Run]) -> list[str]:
    """The same, where runs of one size and length are to be points of one law: they may differ in the seed alone."""
    runs, made = list(runs), defaultdict(set)
    for run in runs:
        made[run.n, run.d].add(cell_of(run.config))
    several = sum(len(cells) > 1 for cells in made.values())
    mixed = f"{several} sizes and lengths were trained with several learning rates or batches: analyse them apart."
    return [mixed] * (several > 0) + doubts(runs)
