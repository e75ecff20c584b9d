"""From a plan to its runs: each with a name made of what varies, every setting, and the control that it has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from chiplog.errors import PlanError
from chiplog.plan import NAME, Config, Experiment, Manual, Plan, Run, check_name
from chiplog.values import Value

# Settings that read better short in a run's name.
SHORT = {"lora_rank": "rank", "batch_size": "batch", "micro_batch_size": "micro", "model": "", "dataset": ""}
SHORT_NAMES = ("model", "dataset")  # of which a plan gives short names


def expand(plan: Plan, manual: Callable[[str], Manual]) -> list[Run]:
    """All runs of a plan, controls after the runs they belong to.

    `manual(recipe)` gives every setting that a recipe and the evaluation know.
    Raises PlanError for a setting, model or data set that does not exist, and for names that collide or are illegal.
    """
    check_name(plan.name, "the plan's name")
    for key in (*plan.models, *plan.datasets):
        check_name(key, "the short name")
    runs: dict[str, Run] = {}
    for experiment in plan.experiments:
        for run in _limited(_expand_one(plan, experiment, manual), experiment):
            check_name(run.name, "the run's name")
            # Folded: some file systems hold one folder for names that differ only in case.
            other = runs.setdefault(run.name.lower(), run)
            if other is not run and not (run.kind == other.kind == "control" and run.config == other.config):
                raise PlanError(
                    f"two runs are called {run.name!r}: {other.varied} and {run.varied}. Names are made of what "
                    "varies: remove the repeated value, or let one setting more differ"
                )
    if not runs:
        raise PlanError("the plan has no run: give variables or runs")
    return list(runs.values())


def _expand_one(plan: Plan, experiment: Experiment, manual: Callable[[str], Manual]) -> list[Run]:
    if experiment.variables and experiment.runs:
        raise PlanError("an experiment has either variables (their product is run) or runs (a list): remove one")
    known = manual(experiment.recipe)
    if known.framework != experiment.framework:
        raise PlanError(
            f"the recipe {experiment.recipe} is built on {known.framework} and the experiment says "
            f"{experiment.framework}: write framework: {known.framework}, or take another recipe"
        )
    tunes = experiment.framework == "torchtune"
    evaluated = manual("evaluate").defaults if tunes else {}
    for name, values in experiment.variables.items():
        if not values:
            raise PlanError(f"the variable {name!r} has no values: give at least one or remove it")
    product = itertools.product(*experiment.variables.values())
    cells = experiment.runs or [dict(zip(experiment.variables, values, strict=True)) for values in product]
    runs: list[Run] = []
    controls: dict[str, Run] = {}
    for cell, seed in itertools.product(cells, experiment.seeds):
        only = {**(_only(plan.models, "model") if tunes else {}), **_only(plan.datasets, "dataset")}
        chosen = {**only, **experiment.controls, **cell}
        model = _pick(chosen, "model", plan.models) if tunes else None
        dataset = _pick(chosen, "dataset", plan.datasets)
        if "seed" in chosen:
            raise PlanError(
                "seed is a setting of a run: give seeds=[...] instead, so that replicates are known as such"
            )
        settings = {**chosen, "seed": seed}
        config = _complete(settings, known) | {"dataset": plan.datasets[dataset]}
        if model is None:
            shown = cell or {"dataset": dataset}
        else:
            config["model"] = plan.models[model]
            shown = {"model": model, **cell} if len(plan.models) > 1 or not cell else cell
        many = {"seed": seed} if len(experiment.seeds) > 1 else {}
        run = Run(
            name=_name({**shown, **many}),
            kind="finetune" if tunes else "train",
            recipe=experiment.recipe,
            model=model,
            dataset=dataset,
            seed=seed,
            varied={**shown, **many},
            config=config,
            resources=experiment.resources,
        )
        runs.append(run)
        if experiment.control == "base_model":
            kept = {"model": model} | {key: value for key, value in cell.items() if key in evaluated}
            name = _name(kept) + "_base"
            controls.setdefault(name, _control(run, name, kept, {key: config[key] for key in evaluated}))
    if isinstance(experiment.control, dict):
        runs = _with_controls(runs, experiment.control, known)
    return runs + list(controls.values())


def _with_controls(runs: Sequence[Run], settings: Mapping[str, Any], manual: Manual) -> list[Run]:
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


def _limited(runs: Iterable[Run], experiment: Experiment) -> Iterator[Run]:
    """The runs with their own time limits, where the experiment has such."""
    for run in runs:
        asked = run.resources
        limits = {
            "time_limit_s": experiment.time_limits_s.get(run.name, asked.time_limit_s),
            "eval_time_limit_s": experiment.eval_time_limits_s.get(run.name, asked.eval_time_limit_s),
        }
        yield run.model_copy(update={"resources": asked.model_copy(update=limits)})


def _control(run: Run, name: str, varied: dict[str, Value], config: Config) -> Run:
    changed = {"name": name, "kind": "control", "recipe": None, "varied": varied, "config": config}
    changed["resources"] = run.resources.alone
    return run.model_copy(update=changed)


def _only(named: Mapping[str, str], setting: str) -> dict[str, Value]:
    return {setting: next(iter(named))} if len(named) == 1 else {}


def _pick(chosen: Mapping[str, Value], setting: str, named: Mapping[str, str]) -> str:
    value = chosen.get(setting)
    if isinstance(value, str) and value in named:
        return value
    given = "is not said" if value is None else f"is {value!r}"
    raise PlanError(f"the {setting} of a run {given}: say which of {', '.join(named)} in variables, controls or runs")


def _complete(settings: Mapping[str, Value], manual: Manual) -> Config:
    config = dict(manual.defaults)
    for key, value in settings.items():
        config[key] = manual.checked(key, value)
    batch, micro = config.get("batch_size"), config.get("micro_batch_size")
    if isinstance(batch, int) and isinstance(micro, int) and batch % micro:
        divisors = [str(n) for n in range(1, batch + 1) if batch % n == 0]
        raise PlanError(
            f"micro_batch_size {micro} does not divide batch_size {batch}: take one of {', '.join(divisors)}, "
            "or the effective batch would change"
        )
    return config


def _name(varied: Mapping[str, Value]) -> str:
    return "_".join(SHORT.get(key, key) + _word(key, value) for key, value in varied.items())


def _word(key: str, value: Value) -> str:
    if isinstance(value, bool):
        return "-on" if value else "-off"
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        text = f"{value:g}" if 0.001 <= value < 10_000 else f"{float(mantissa):g}e{int(exponent)}"
        return text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and NAME.fullmatch(value):
        return value if SHORT.get(key) == "" else f"-{value}"
    raise PlanError(
        f"{key} takes the value {value!r}, which cannot be part of a run's name: let it be the same in all runs, "
        "or put it in its own plan"
    )
