"""The ablation ladder: arms that differ from a control in one setting, seed by seed at equal size, length and rate."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from tasks.scaling_laws.arms import Arm, arm_of, cell_of, change, usual
from tasks.scaling_laws.doubts import doubts
from tasks.scaling_laws.runs import Found, Lost, Run

LEVEL = 0.95
Members = list[Run | Lost]


@dataclass(frozen=True)
class Rung:
    """One change against the control. `difference`: its loss less the control's, mean over pairs of equal seeds."""

    change: str
    cell: str  # size and steps
    losses: list[float]
    difference: float | None
    ci: list[float] | None  # over seeds; null from fewer than two pairs
    n_pairs: int
    n_planned: int
    doubts: list[str] = field(default_factory=list)  # why nothing is shown whatever the losses are
    p: float | None = None
    shown: bool = False  # after Holm's adjustment over all rungs

    @property
    def words(self) -> str:
        """What it shows, with the verdict first."""
        pairs = f"{self.n_pairs} of {self.n_planned} pairs"
        if self.difference is None or self.ci is None:
            few = [f"There are {pairs} of equal seeds, and an interval needs two."]
            return " ".join([f"Not shown: {self.change} ({self.cell}).", *few, *self.doubts])
        less = "lower" if self.difference < 0 else "higher"
        size = f"{abs(self.difference):.4f} nats {less} loss ({self.ci[0]:+.4f} to {self.ci[1]:+.4f}, {pairs})"
        verdict = "Shown" if self.shown else "Not shown"
        return " ".join([f"{verdict}: {self.change} ({self.cell}): {size}.", *self.doubts])


def rungs(found: Found, single: Sequence[Run]) -> tuple[Arm | None, list[Rung]]:
    """The control, the arm from which most others differ in one thing, and its ladder; null where there is none.

    Cells are those of `single`, the runs of no sweep; runs of sweeps and lost ones that are of them count too. Of arms
    that could be the control the plan's own is taken, else the one with most neighbours.
    """
    cells: dict[tuple, dict[Arm, Members]] = {cell_of(run.config): defaultdict(list) for run in single}
    for one in (*found.runs, *(one for one in found.lost if one.config)):
        if (cell := cell_of(one.config)) in cells:
            cells[cell][arm_of(one.config)].append(one)
    compared = {cell: arms for cell, arms in cells.items() if len(arms) > 1}
    near = Counter(arm for arms in compared.values() for arm in arms for other in arms if change(arm, other))
    if not near:
        return None, []
    control = max(near, key=lambda arm: (_is_named(arm, found.controls), near[arm], usual(arm)))
    made = [
        _rung(arms[control], others, words)
        for arms in compared.values()
        if control in arms
        for arm, others in arms.items()
        if (words := change(control, arm))
    ]
    return control, _adjusted(made)


def _is_named(arm: Arm, controls: Sequence[dict[str, Any]]) -> bool:
    """Whether the plan names it as a control, by settings that it has."""
    settings = dict(arm)
    return any(all(settings.get(key) == value for key, value in named.items()) for named in controls)


def _rung(control: Members, arm: Members, words: str) -> Rung:
    ours, theirs = ({one.config["seed"]: one for one in members} for members in (control, arm))
    planned = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    pairs = [(a, b) for a, b in planned if isinstance(a, Run) and isinstance(b, Run)]
    config, runs = arm[0].config, [run for pair in pairs for run in pair]
    wrong = [f"{one.name} diverged, and those that did not are no fair sample." for pair in planned for one in pair
             if isinstance(one, Lost) and one.diverged][:1]  # fmt: skip
    if len(ours) < len(control) or len(theirs) < len(arm):
        wrong.append("A seed was trained twice, and nothing says which run counts.")
    if any(len(pairs) > 1 and len({one.loss for one in side}) == 1 for side in zip(*pairs, strict=True)):
        wrong.append("All seeds have the same loss: see that the seed is used.")
    rung = Rung(
        change=words,
        cell=f"width {config['width']}, {config['max_steps']} steps",
        losses=[one.loss for one in arm if isinstance(one, Run)],
        difference=float(np.mean([b.loss - a.loss for a, b in pairs])) if pairs else None,
        ci=None,
        n_pairs=len(pairs),
        n_planned=len(planned),
        doubts=[*wrong, *doubts(runs)],
    )
    return _tested(rung, [b.loss - a.loss for a, b in pairs])


def _tested(rung: Rung, differences: list[float]) -> Rung:
    """With interval and p of a paired t-test, where there are two pairs."""
    n, mean = len(differences), rung.difference
    if n < 2 or mean is None:
        return rung
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return replace(rung, ci=[mean - reach, mean + reach], p=p)


def _adjusted(found: list[Rung]) -> list[Rung]:
    """With `shown` by Holm's method: of many rungs some differ by chance."""
    tested = sorted((rung.p, place) for place, rung in enumerate(found) if rung.p is not None)
    shown: set[int] = set()
    for rank, (p, place) in enumerate(tested):
        if p > (1 - LEVEL) / (len(tested) - rank):
            break
        shown.add(place)
    return [replace(rung, shown=place in shown and not rung.doubts) for place, rung in enumerate(found)]
