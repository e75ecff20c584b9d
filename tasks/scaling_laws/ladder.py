"""The ablation ladder: arms that differ from a control in one thing, seed by seed at the same size and tokens."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from tasks.scaling_laws.runs import Run, usual

Arm = tuple[tuple[str, object], ...]
LEVEL = 0.95


@dataclass(frozen=True)
class Rung:
    """One change against the control. `difference`: its loss less the control's, mean over pairs of equal seeds."""

    change: str
    cell: str  # size and steps
    losses: list[float]
    difference: float | None
    ci: list[float] | None  # over seeds; null from fewer than two pairs
    n_params: int
    p: float | None = None
    shown: bool = False  # after Holm's adjustment over all rungs

    @property
    def words(self) -> str:
        """One sentence."""
        if self.difference is None or self.ci is None:
            return f"{self.change} ({self.cell}): not shown, there are fewer than two pairs of equal seeds."
        less = "lower" if self.difference < 0 else "higher"
        size = f"{abs(self.difference):.4f} nats {less} loss ({self.ci[0]:+.4f} to {self.ci[1]:+.4f})"
        return f"{self.change} ({self.cell}): {size}; {'shown' if self.shown else 'not shown'}."


def rungs(runs: Sequence[Run]) -> tuple[Arm | None, list[Rung]]:
    """The control, the arm from which most others differ in one thing, and its ladder; null where there is none."""
    cells: dict[tuple, dict[Arm, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[run.cell][run.arm].append(run)
    compared = {cell: arms for cell, arms in cells.items() if len(arms) > 1}
    near = Counter(arm for arms in compared.values() for arm in arms for other in arms if change(arm, other))
    if not near:
        return None, []
    control = max(near, key=lambda arm: (near[arm], usual(arm)))
    found = [
        _rung(arms[control], others, words)
        for arms in compared.values()
        if control in arms
        for arm, others in arms.items()
        if (words := change(control, arm))
    ]
    return control, _adjusted(found)


def change(control: Arm, arm: Arm) -> str | None:
    """The one setting that differs, in words; null where none or several do."""
    ours, theirs = dict(control), dict(arm)
    if ours.keys() != theirs.keys():
        return None
    differs = [key for key in ours if ours[key] != theirs[key]]
    return f"{differs[0]} {theirs[differs[0]]} for {ours[differs[0]]}" if len(differs) == 1 else None


def _rung(control: list[Run], arm: list[Run], words: str) -> Rung:
    by_seed = {run.config["seed"]: run.loss for run in control}
    pairs = [run.loss - by_seed[run.config["seed"]] for run in arm if run.config["seed"] in by_seed]
    config = arm[0].config
    cell = f"width {config['width']}, {config['max_steps']} steps"
    losses = [run.loss for run in arm]
    mean = float(np.mean(pairs)) if pairs else None
    if len(pairs) < 2 or mean is None:
        return Rung(words, cell, losses, mean, None, arm[0].n)
    error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(pairs) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(pairs) - 1)) if error else float(mean == 0)
    return Rung(words, cell, losses, mean, [mean - reach, mean + reach], arm[0].n, p)


def _adjusted(found: list[Rung]) -> list[Rung]:
    """With `shown` by Holm's method: of many rungs some differ by chance."""
    tested = sorted((rung.p, place) for place, rung in enumerate(found) if rung.p is not None)
    shown: set[int] = set()
    for rank, (p, place) in enumerate(tested):
        if p > (1 - LEVEL) / (len(tested) - rank):
            break
        shown.add(place)
    return [replace(rung, shown=place in shown) for place, rung in enumerate(found)]
