"""What the runs of an experiment say: one function for each question, each answer with what it rests on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tasks.scaling_laws import fit, isoflop, ladder, power
from tasks.scaling_laws.arms import arm_names, arm_of, usual
from tasks.scaling_laws.runs import Found, Run
from tasks.scaling_laws.sweeps import split_sweeps, sweeps_of
from tasks.scaling_laws.table import NEEDED, Points


@dataclass(frozen=True)
class Analysis:
    """Answers by the names of arms; `control` is the arm with most sizes and lengths, of equal ones the plainest."""

    found: Found
    grid: dict[str, list[Run]]  # runs of no sweep, by arm
    control: str | None
    laws: dict[str, dict[str, Any] | str]  # in words where there is none
    powers: dict[str, dict[str, Any]]
    multipliers: dict[str, dict[str, Any] | str]
    isoflop: list[dict[str, Any]]
    isoflop_growth: dict[str, Any] | None
    sweeps: dict[str, dict[str, Any]]
    ladder_control: str | None
    rungs: list[ladder.Rung]
    coordinates: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What analysis.json holds."""
        return {
            "runs": len(self.found.runs),
            "left_out": {one.name: one.why for one in self.found.lost},
            "notes": self.found.notes,
            "control": self.control,
            "laws": self.laws,
            "power_laws": self.powers,
            "multipliers": self.multipliers,
            "isoflop": self.isoflop,
            "isoflop_growth": self.isoflop_growth,
            "learning_rates": self.sweeps,
            "ladder_control": self.ladder_control,
            "ladder": [asdict(rung) for rung in self.rungs],
            "failed_guards": {run.name: run.failed_guards for run in self.found.runs if run.failed_guards},
            "coordinates": self.coordinates,
        }


def analyse(found: Found, bootstrap: int, seed: int) -> Analysis:
    """Everything but the coordinate check, which trains."""
    swept, single = split_sweeps(found)
    names = arm_names([*(run.arm for run in found.runs), *(arm_of(one.config) for one in found.lost if one.config)])
    grid: dict[str, list[Run]] = defaultdict(list)
    for run in single:
        grid[names[run.arm]].append(run)
    control = max(grid, key=lambda name: (len({(run.n, run.d) for run in grid[name]}), usual(grid[name][0].arm)),
                  default=None)  # fmt: skip
    laws = {name: law_of(runs, bootstrap, seed) for name, runs in grid.items()}
    law = laws.get(control or "")
    known = law if isinstance(law, dict) and law["identifiable"] else {}  # the control's, where its floor is
    floor, floor_ci, draws = known.get("E"), known.get("ci", {}).get("E", ()), min(bootstrap, 1000)
    draws = draws if draws >= fit.FEWEST else 0
    powers = {name: power.power_law(runs, *((floor, floor_ci) if name == control else (None, ())), draws, seed)
              for name, runs in grid.items()}  # fmt: skip
    ladder_arm, rungs = ladder.rungs(found, single)
    return Analysis(
        found=found,
        grid=dict(grid),
        control=control,
        laws=laws,
        powers={name: one for name, one in powers.items() if one},
        multipliers={name: power.multiplier(grid[control or ""], runs, floor, draws, seed)
                     for name, runs in grid.items() if name != control},
        isoflop=isoflop.isoflop(grid[control]) if control else [],
        isoflop_growth=isoflop.growth(grid[control]) if control else None,
        sweeps=sweeps_of(swept, names),
        ladder_control=names[ladder_arm] if ladder_arm else None,
        rungs=rungs,
    )  # fmt: skip


def law_of(runs: Sequence[Run], bootstrap: int, seed: int) -> dict[str, Any] | str:
    """The law of one arm as fit.py prints it; in words why there is none."""
    if len(runs) < NEEDED:
        return f"{len(runs)} runs are too few for a law of 5 parameters, which needs {NEEDED}"
    n, d, loss = (np.array([getattr(run, key) for run in runs], dtype=float) for key in ("n", "d", "loss"))
    undecayed = sum(run.undecayed for run in runs)
    return fit.fit_law(Points(n, d, loss, [run.name for run in runs], undecayed), bootstrap, seed)
