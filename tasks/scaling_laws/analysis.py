"""What the runs of an experiment say: one function for each question, each answer with what it rests on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tasks.scaling_laws import fit, isoflop, ladder, learning_rates, power
from tasks.scaling_laws.runs import Found, Run, arm_names, arm_of, usual
from tasks.scaling_laws.table import NEEDED, Points

Arm = tuple[tuple[str, Any], ...]
LEAST_LRS = 3  # learning rates of the same run that make a sweep


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
    sweeps: dict[str, dict[str, Any]]
    ladder_control: str | None
    rungs: list[ladder.Rung]
    failed_guards: dict[str, tuple[str, ...]]  # by run
    validations: set[str]  # hashes of the validation sets
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
            "isoflop_exponent": isoflop.growth(self.isoflop),
            "learning_rates": self.sweeps,
            "ladder_control": self.ladder_control,
            "ladder": [asdict(rung) for rung in self.rungs],
            "failed_guards": self.failed_guards,
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
    floor = floor_of(laws.get(control or ""))
    draws = min(bootstrap, 1000)
    powers = {name: power.power_law(runs, floor if name == control else None, draws, seed)
              for name, runs in grid.items()}  # fmt: skip
    ladder_arm, rungs = ladder.rungs(single)
    return Analysis(
        found=found,
        grid=dict(grid),
        control=control,
        laws=laws,
        powers={name: one for name, one in powers.items() if one},
        multipliers={name: power.multiplier(grid[control or ""], runs, floor, draws, seed)
                     for name, runs in grid.items() if name != control},
        isoflop=isoflop.isoflop(grid[control]) if control else [],
        sweeps=sweeps_of(swept, names),
        ladder_control=names[ladder_arm] if ladder_arm else None,
        rungs=rungs,
        failed_guards={run.name: run.failed_guards for run in found.runs if run.failed_guards},
        validations={run.val_sha256 for run in found.runs},
    )  # fmt: skip


def split_sweeps(found: Found) -> tuple[list[tuple[Any, float]], list[Run]]:
    """The points (configuration, loss) of learning-rate sweeps, diverged ones with NaN, and the other runs.

    A sweep is LEAST_LRS learning rates of runs that are alike but for them and the seed.
    """
    rates: dict[tuple, set[float]] = defaultdict(set)
    points = [(run.config, run.n, run.loss) for run in found.runs]
    points += [(one.config, 0, float("nan")) for one in found.lost if one.diverged]
    for config, _, _ in points:
        rates[_alike(config)].add(config["lr"])
    is_swept = {key for key, lrs in rates.items() if len(lrs) >= LEAST_LRS}
    swept = [((config, n), loss) for config, n, loss in points if _alike(config) in is_swept]
    return swept, [run for run in found.runs if _alike(run.config) not in is_swept]


def law_of(runs: Sequence[Run], bootstrap: int, seed: int) -> dict[str, Any] | str:
    """The law of one arm as fit.py prints it; in words why there is none."""
    if len(runs) < NEEDED:
        return f"{len(runs)} runs are too few for a law of 5 parameters, which needs {NEEDED}"
    n, d, loss = (np.array([getattr(run, key) for run in runs], dtype=float) for key in ("n", "d", "loss"))
    return fit.fit_law(Points(n, d, loss, [run.name for run in runs]), bootstrap, seed)


def floor_of(law: dict[str, Any] | str | None) -> float | None:
    """E of a law that is identified; null else."""
    return law["E"] if isinstance(law, dict) and law["identifiable"] else None


def sweeps_of(swept: Sequence[tuple[Any, float]], names: dict[Arm, str]) -> dict[str, dict[str, Any]]:
    """By arm: the learning-rate law over all seeds, the drift of each seed, and the points for the picture."""
    arms: dict[str, list[tuple[dict[str, Any], int, float]]] = defaultdict(list)
    for (config, n), loss in swept:
        arms[names[arm_of(config)]].append((config, n, loss))
    return {name: _sweep(points) for name, points in arms.items()}


def _sweep(points: list[tuple[dict[str, Any], int, float]]) -> dict[str, Any]:
    params = {config["width"]: n for config, n, _ in points if n}
    seeds = sorted({config["seed"] for config, _, _ in points})
    of_seeds = [_law_of([p for p in points if p[0]["seed"] == seed], params) for seed in seeds]
    drifts = [one["in_width"].get("drift_octaves") for one in of_seeds]
    doubts = [one["doubt_octaves"] for one in of_seeds]
    steps = sorted({config["max_steps"] for config, _, _ in points})
    shown = [[config["width"], config["lr"], loss] for config, _, loss in points]
    return {
        **_law_of(points, params),
        "seeds": seeds,
        "drift_of_seeds": drifts,
        "doubt_of_seeds": doubts,
        "steps": steps,
        "points": shown,
    }


def _law_of(points: list[tuple[dict[str, Any], int, float]], params: dict[int, int]) -> dict[str, Any]:
    by_width: dict[int, list[tuple[int, float, float]]] = defaultdict(list)
    for config, _, loss in points:
        by_width[config["width"]].append((config["seed"], config["lr"], loss))
    found = {
        width: learning_rates.best_lr(*zip(*_without_seeds(each), strict=True)) for width, each in by_width.items()
    }
    return learning_rates.sweep_law({width: best for width, best in found.items() if best}, params)


def _without_seeds(points: list[tuple[int, float, float]]) -> list[tuple[float, float]]:
    """Points (lr, loss) of (seed, lr, loss), each seed moved as a whole to the mean of all.

    A seed is better or worse at every learning rate, which says nothing of the best. Where seeds have not the same
    finite learning rates, only those that all have tell by how much.
    """
    seeds: dict[int, dict[float, float]] = defaultdict(dict)
    for seed, lr, loss in points:
        seeds[seed][lr] = loss
    shared = set.intersection(*({lr for lr, loss in each.items() if np.isfinite(loss)} for each in seeds.values()))
    if not shared:
        return [(lr, loss) for _, lr, loss in points]
    means = {seed: float(np.mean([each[lr] for lr in shared])) for seed, each in seeds.items()}
    middle = float(np.mean(list(means.values())))
    return [(lr, loss - means[seed] + middle) for seed, lr, loss in points]


def _alike(config: dict[str, Any]) -> tuple:
    keys = ("width", "depth", "heads", "max_steps", "batch_size", "seq_len", "ffn_ratio")
    return (*arm_of(config), *(config[key] for key in keys))
