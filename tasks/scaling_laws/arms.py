"""Which runs are one arm: those that are alike but for size, length, learning rate, seed and machine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer import job
from trainer.settings import FREE
from trainer.shape import GATED, default_heads

TRAIN = Path(__file__).resolve().parents[2] / "trainer" / "train.yaml"
# Where and how a run is made and looked at, not what is learned.
MACHINE = FREE - {"dataset", "max_steps"} | {"deterministic", "val_tokens"}
SIZE_AND_LENGTH = ("width", "depth", "heads", "max_steps", "warmup_steps", "batch_size")
BASES = ("base_width", "base_depth", "base_heads")  # what the standard parametrisation does not read
Arm = tuple[tuple[str, Any], ...]


def arm_of(config: Mapping[str, Any]) -> Arm:
    """The settings by which arms differ, with their names. Layers of an LSTM are one of them."""
    known = comparable(config)
    apart = {*SIZE_AND_LENGTH, "lr", "seed"} - ({"depth"} if known["architecture"] == "lstm" else set())
    return tuple((key, value) for key, value in known.items() if key not in apart)


def cell_of(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs of different arms must share to be compared one by one: size, length and learning rate."""
    known = comparable(config)
    return tuple(known[key] for key in (*SIZE_AND_LENGTH, "lr"))


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run, said alike where it is alike."""
    known = {"architecture": config["architecture"]}  # which names it begins with
    known |= {key: value for key, value in config.items() if key not in MACHINE}
    known["dataset"] = known["dataset"] and Path(known["dataset"]).name
    known["heads"] = known["heads"] or default_heads(known["width"])
    if known["parametrization"] == "standard":
        known |= dict.fromkeys(BASES)
    return known


def change(control: Arm, arm: Arm) -> str | None:
    """The one setting that differs, in words; null where none or several do.

    A gated activation with a feed-forward ratio that keeps the number of parameters is one change, and so is a
    parametrisation with its base shape.
    """
    ours, theirs = dict(control), dict(arm)
    if ours.keys() != theirs.keys():
        return None
    differs = [key for key in ours if ours[key] != theirs[key]]
    if "parametrization" in differs:
        differs = [key for key in differs if key not in BASES]
    if set(differs) == {"activation", "ffn_ratio"} and math.isclose(_matrices(ours), _matrices(theirs), rel_tol=1e-3):
        differs = ["activation"]
    return f"{differs[0]} {theirs[differs[0]]} for {ours[differs[0]]}" if len(differs) == 1 else None


def _matrices(settings: Mapping[str, Any]) -> float:
    """The parameters of a feed-forward network, in squares of the width: a gated one has three matrices."""
    return settings["ffn_ratio"] * (3 if settings["activation"] in GATED else 2)


def usual(arm: Arm) -> int:
    """How many settings of an arm are the trainer's defaults: of two that could be the control, the plainer one is."""
    defaults = job.default_settings(TRAIN)
    return sum(defaults.get(key) == value for key, value in arm)


def arm_names(arms: Iterable[Arm]) -> dict[Arm, str]:
    """A short name for each arm: its architecture, and what is not the trainer's default and differs between its like.

    An arm's like are those of its architecture; for base shapes, those of its parametrisation too.
    """
    arms, defaults = list(dict.fromkeys(arms)), job.default_settings(TRAIN)
    seen: dict[tuple, set[Any]] = defaultdict(set)
    for arm in arms:
        for key, value in arm:
            seen[_like(arm, key)].add(value)

    def told(arm: Arm, key: str, value: Any) -> bool:
        if key in ("architecture", "depth"):
            return True
        return len(seen[_like(arm, key)]) > 1 and (value != defaults.get(key) or key == "parametrization")

    return {arm: ", ".join(_in_words(key, value) for key, value in arm if told(arm, key, value)) for arm in arms}


def _like(arm: Arm, key: str) -> tuple[Any, ...]:
    settings = dict(arm)
    return key, settings["architecture"], settings["parametrization"] if key in BASES else None


def _in_words(key: str, value: Any) -> str:
    """A setting in a name: words speak for themselves, numbers and switches do not."""
    if key == "depth":
        return f"{value} layer{'s' * (value > 1)}"
    if isinstance(value, bool) or value is None:
        return {"tied": "untied"}.get(key, f"no {key}") if not value else key
    if key == "dataset":
        return f"on {value}"
    return value if isinstance(value, str) else f"{key} {value!r}"
