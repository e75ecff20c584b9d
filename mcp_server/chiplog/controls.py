"""Runs of a plan that it names, by settings that they have, as the control of its others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chiplog.errors import PlanError

if TYPE_CHECKING:
    from chiplog.plan import Manual, Run

SHORT_NAMES = ("model", "dataset")  # of which a plan gives short names


def with_controls(runs: Sequence[Run], settings: Mapping[str, Any], manual: Manual) -> list[Run]:
    """The runs, each but those of the control with the one of them that has its seed and is nearest to it in settings.

    Raises PlanError where `settings` are none of the recipe's, or tell no run from the others.
    """
    if "seed" in settings:
        raise PlanError("control names a seed, and every seed has its control: name other settings")
    wanted = {
        key: value if key in SHORT_NAMES else manual.checked(key, value) for key, value in settings.items()
    }  # fmt: skip
    named = [run for run in runs if all(_setting(run, key) == value for key, value in wanted.items())]
    if not named or len(named) == len(runs):
        raise PlanError(
            f"{'every run' if named else 'no run'} has the settings of control, {wanted}: give those by which one arm "
            "is known"
        )
    return [run if run in named else run.model_copy(update={"control": _nearest(run, named)}) for run in runs]


def _setting(run: Run, key: str) -> Any:
    return getattr(run, key) if key in SHORT_NAMES else run.config[key]


def _nearest(run: Run, named: Sequence[Run]) -> str | None:
    """The name of the one with its seed that differs in the fewest settings."""
    apart = {
        other.name: sum(other.config[key] != value for key, value in run.config.items())
        for other in named
        if other.seed == run.seed
    }
    return min(apart, key=lambda name: apart[name], default=None)
