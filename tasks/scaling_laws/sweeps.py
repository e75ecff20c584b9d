"""Sweeps of learning rates: which runs are one, the best of each width, and how it moves from width to width."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.scaling_laws import learning_rates
from tasks.scaling_laws.arms import Arm, arm_of, cell_of
from tasks.scaling_laws.doubts import doubts
from tasks.scaling_laws.learning_rates import Best
from tasks.scaling_laws.runs import Found, Lost, Run

LEAST_LRS = 3  # learning rates of the same run that make a sweep
Member = Run | Lost


def split_sweeps(found: Found) -> tuple[list[Member], list[Run]]:
    """The runs of sweeps, lost ones too, and all other runs that have a loss.

    A sweep is LEAST_LRS learning rates of runs that are alike but for them and the seed, whether or not they ended.
    """
    members: list[Member] = [*found.runs, *(one for one in found.lost if one.config)]
    rates: dict[tuple, set[float]] = defaultdict(set)
    for one in members:
        rates[_alike(one.config)].add(one.config["lr"])
    is_swept = {key for key, lrs in rates.items() if len(lrs) >= LEAST_LRS}
    swept = [one for one in members if _alike(one.config) in is_swept]
    return swept, [run for run in found.runs if _alike(run.config) not in is_swept]


def sweeps_of(swept: Sequence[Member], names: Mapping[Arm, str]) -> dict[str, dict[str, Any]]:
    """The sweep of each arm, by its name."""
    arms: dict[str, list[Member]] = defaultdict(list)
    for one in swept:
        arms[names[arm_of(one.config)]].append(one)
    return {name: sweep_of(members) for name, members in arms.items()}


def sweep_of(members: Sequence[Member]) -> dict[str, Any]:
    """Of one arm: the best of each width and its laws, over all seeds; how far it moves in each; what is missing."""
    tried = [one for one in members if isinstance(one, Run) or one.diverged]
    runs = [one for one in members if isinstance(one, Run)]
    seeds, widths = (sorted({one.config[key] for one in members}) for key in ("seed", "width"))
    best = _best_of(tried)
    of_seeds = {seed: _best_of([one for one in tried if one.config["seed"] == seed]) for seed in seeds}
    return {
        **learning_rates.sweep_law(best, {run.config["width"]: run.n for run in runs}),
        "ends": learning_rates.ends(best),
        "farthest": learning_rates.farthest(best),
        "seeds": {seed: learning_rates.ends(found) for seed, found in of_seeds.items()},
        "missing": [f"{width} with seed {seed}" for width in widths for seed in seeds if width not in of_seeds[seed]],
        "lost": [one.name for one in members if isinstance(one, Lost) and not one.diverged],
        "doubts": [*_mixed(members), *doubts(runs)],
        "points": [{"name": one.name, "width": one.config["width"], "lr": one.config["lr"], "loss": _loss(one)}
                   for one in tried],
    }  # fmt: skip


def _best_of(tried: Sequence[Member]) -> dict[int, Best]:
    """The best of each width that has a finite loss."""
    of_width: dict[int, list[Member]] = defaultdict(list)
    for one in tried:
        of_width[one.config["width"]].append(one)
    found = {width: learning_rates.best_lr(*zip(*_without_seeds(each), strict=True))
             for width, each in sorted(of_width.items())}  # fmt: skip
    return {width: best for width, best in found.items() if best}


def _without_seeds(tried: Sequence[Member]) -> list[tuple[float, float]]:
    """Points (lr, loss), those of each seed moved as a whole to the mean of all.

    A seed is better or worse at every learning rate, which says nothing of the best. Where seeds have not the same
    finite learning rates, only those that all have tell by how much.
    """
    seeds: dict[int, dict[float, float]] = defaultdict(dict)
    for one in tried:
        seeds[one.config["seed"]][one.config["lr"]] = _loss(one)
    shared = set.intersection(*({lr for lr, loss in each.items() if np.isfinite(loss)} for each in seeds.values()))
    if not shared:
        return [(one.config["lr"], _loss(one)) for one in tried]
    means = {seed: float(np.mean([each[lr] for lr in shared])) for seed, each in seeds.items()}
    middle = float(np.mean(list(means.values())))
    return [(lr, loss - means[seed] + middle) for seed, each in seeds.items() for lr, loss in each.items()]


def _mixed(members: Sequence[Member]) -> list[str]:
    """A width that was swept at several lengths or depths has several bests; so has a rate with two runs."""
    cells: dict[int, set[tuple]] = defaultdict(set)
    for one in members:
        cells[one.config["width"]].add(_alike(one.config))
    mixed = [f"Width {width} was swept in {len(each)} depths, batches or lengths: analyse them in experiments apart."
             for width, each in cells.items() if len(each) > 1][:1]  # fmt: skip
    times = Counter((*cell_of(one.config), one.config["seed"]) for one in members)
    twice = "A learning rate was trained twice with one seed, and nothing says which run counts."
    return mixed + [twice] * (max(times.values()) > 1)


def _loss(one: Member) -> float:
    """NaN where it diverged."""
    return one.loss if isinstance(one, Run) else float("nan")


def _alike(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return arm_of(config), *cell_of(config)[:-1]
