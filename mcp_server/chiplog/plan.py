"""The nouns of planning, and the pure step from a plan to its runs.

    question → Plan → Experiment → Run

A plan is what a person would write down: what is asked, what varies, what stays fixed. `expand` makes the runs,
each with a unique name made of what varies and the complete configuration that its job will read.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from chiplog.controls import with_controls
from chiplog.errors import PlanError
from chiplog.schema import Frozen, plain_errors
from chiplog.values import Kind, Value, check_value

Config = dict[str, Any]
Control = Literal["base_model", "none"] | dict[str, Value]
Metric = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,39}$")]

# Names become folders, job names and file names in shell scripts: no character that any of them would read twice.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
# Settings that read better short in a run's name.
SHORT = {"lora_rank": "rank", "batch_size": "batch", "micro_batch_size": "micro", "model": "", "dataset": ""}

VAL_LOSS = "val_loss"  # the result of a training that makes a model of its own; lower is better


class Manual(Frozen):
    """What the YAML beside a recipe says of its settings."""

    framework: Literal["torchtune", "trainer"] = Field(default="torchtune", description="What it is built on.")
    defaults: Config = Field(description="Every setting with its default.")
    takes: dict[str, Kind | list[str]] = Field(
        default={}, description="Kind or choices of the settings whose default does not say it."
    )

    def checked(self, key: str, value: Value) -> Value:
        """The value as the setting reads it. Raises PlanError where there is no such setting, or it cannot be that."""
        if key not in self.defaults:
            near = difflib.get_close_matches(key, self.defaults, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(self.defaults))}"
            raise PlanError(f"there is no setting {key!r}: {hint}")
        return check_value(key, value, self.defaults[key], self.takes)


class Resources(Frozen):
    """What one run asks for: a process for each GPU, or one on each node that has none."""

    nodes: int = Field(default=1, ge=1, description="Nodes.")
    gpus: int = Field(default=0, ge=0, description="GPUs on each node; 0 runs on the CPU.")
    gpu: str | None = Field(default=None, description="Name of the GPU in chiplog.toml.")
    cpus: int = Field(default=1, ge=1, description="CPU cores of each process.")
    mem_gib: int | None = Field(
        default=None,
        ge=1,
        description="Host memory of each node in GiB; null: estimated where runs tell, else the partition's default.",
    )
    time_limit_s: int | None = Field(
        default=None, ge=1, description="Seconds after which the job is ended; null: no limit."
    )
    eval_time_limit_s: int | None = Field(
        default=None, ge=1, description="The same of the job that evaluates what was trained; null: time_limit_s."
    )

    @property
    def processes(self) -> int:
        """Processes of a training."""
        return self.nodes * max(self.gpus, 1)

    @property
    def all_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus

    @property
    def all_cpus(self) -> int:
        """CPU cores of all processes."""
        return self.processes * self.cpus

    @property
    def alone(self) -> Resources:
        """The same for one process, as an evaluation is."""
        return self.model_copy(update={"nodes": 1, "gpus": min(self.gpus, 1)})


class Experiment(Frozen):
    """What varies and what stays fixed. Runs are the product of `variables`, or the explicit list `runs`."""

    framework: Literal["torchtune", "trainer"] = Field(
        default="torchtune", description="What trains: torchtune fine-tunes models, trainer makes its own."
    )
    recipe: str = Field(description="File under recipes/ or trainer/, without .py.")
    controls: dict[str, Value] = Field(default={}, description="Settings that are the same in every run.")
    variables: dict[str, list[Value]] = Field(default={}, description="Settings that vary, each with its values.")
    runs: list[dict[str, Value]] = Field(default=[], description="Settings of each run, where they are no product.")
    seeds: list[int] = Field(default=[0], min_length=1, description="One replicate of every run for each seed.")
    control: Control = Field(
        default_factory=lambda known: "none" if known.get("framework") == "trainer" else "base_model",
        description="base_model: each base model is evaluated too, without fine-tuning; of trainer: none. Settings, "
        "such as {activation: gelu}: the runs that have them are the control of the others.",
    )
    resources: Resources = Field(default=Resources(), description="What one run asks for.")
    time_limits_s: dict[str, int] = Field(default={}, description="Time limits of single runs, by name, in seconds.")
    eval_time_limits_s: dict[str, int] = Field(default={}, description="The same of their evaluations.")

    @model_validator(mode="after")
    def _no_base_model(self) -> Experiment:
        if self.framework == "trainer" and self.control == "base_model":
            raise ValueError(
                "a training of trainer has no base model that could be its control: leave control out, or name one of "
                "the runs by its settings"
            )
        return self


class Plan(Frozen):
    """A question and the experiments that should answer it."""

    name: str = Field(description="Name of the plan and of its folder.")
    question: str = Field(min_length=1, description="What should be found out.")
    hypothesis: str = Field(default="", description="What is expected, and why.")
    metrics: list[Metric] = Field(
        default=["exact_match"], min_length=1, description="Scores to report; the first decides."
    )
    study: str | None = Field(default=None, description="Folder under tasks/ that the plan belongs to.")
    models: dict[str, str] = Field(
        default={}, description="Short name of each base model and its folder; trainer needs none."
    )
    datasets: dict[str, str] = Field(min_length=1, description="Short name of each data set and its file or folder.")
    dataset_sha256: dict[str, str] = Field(default={}, description="Hash of each data set when it was planned.")
    experiments: list[Experiment] = Field(min_length=1, description="What varies and what stays fixed.")
    gpu_hours: float | None = Field(default=None, gt=0, description="Budget; null: the one of chiplog.toml.")

    @property
    def framework(self) -> str:
        """What trains all of its runs."""
        return self.experiments[0].framework

    @model_validator(mode="before")
    @classmethod
    def _measured_by_its_loss(cls, values: Any) -> Any:
        """Of a plan whose trainings make models of their own, the metric is the validation loss."""
        if isinstance(values, dict) and not values.get("metrics"):
            listed = values.get("experiments")
            made = listed if isinstance(listed, list | tuple) else []
            kinds = {e.get("framework") if isinstance(e, dict) else getattr(e, "framework", None) for e in made}
            return {**values, "metrics": [VAL_LOSS]} if kinds == {"trainer"} else values
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> Plan:
        """One metric decides, so the runs of a plan are all scored on answers, or all measured by their loss."""
        if len({experiment.framework for experiment in self.experiments}) > 1:
            raise ValueError("some experiments fine-tune models and some make their own: make a plan of each kind")
        if self.framework == "trainer" and self.metrics != [VAL_LOSS]:
            raise ValueError(f"a training of trainer is measured by its {VAL_LOSS}: leave metrics out")
        if self.framework == "torchtune" and not self.models:
            raise ValueError("models: name at least one, which is fine-tuned, or take the recipe train")
        if self.framework == "trainer" and self.models:
            raise ValueError("a training of trainer makes its own model: leave models out")
        return self


class Run(Frozen):
    """One job: a complete configuration and a name."""

    name: str = Field(description="Unique in the plan; made of what varies.")
    kind: Literal["finetune", "train", "control"] = Field(description="control: evaluation only.")
    recipe: str | None = Field(description="What trains it; null for a control.")
    model: str | None = Field(description="Short name of the base model; null where it makes its own.")
    dataset: str = Field(description="Short name of the data set.")
    seed: int = Field(description="Seed of the replicate.")
    varied: dict[str, Value] = Field(description="The settings that differ between runs.")
    config: Config = Field(description="Every setting that the job reads.")
    resources: Resources = Field(description="What the job asks for.")
    control: str | None = Field(default=None, description="Trained run that the plan names as its control.")
    depends_on: list[str] = Field(default=[], description="Names of runs that must end well before this one.")


def read_config(file: Path) -> Config | None:
    """The settings in a run's `config.yaml`; null where it holds none."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def read_plan(file: Path) -> Plan:
    """The plan in a `plan.yaml`. Raises PlanError that names the file and the field."""
    try:
        return parse_plan(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{file} is not YAML: {error}. Mend it or plan again.") from error


def parse_plan(values: Any, source: str) -> Plan:
    """A plan from plain values; `source` is named in the PlanError of a wrong field."""
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise PlanError(f"{source} is no plan:\n{plain_errors(error)}\nMend these fields.") from error


def dump_plan(plan: Plan) -> str:
    """The text of `plan.yaml`: the same plan gives the same bytes."""
    values = plan.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def check_name(name: str, what: str) -> str:
    """`name`, if it can be a folder, a job name and a word in a shell script.

    Raises PlanError otherwise.
    """
    if NAME.fullmatch(name):
        return name
    raise PlanError(
        f"{what} {name!r} cannot be a folder and a job name: use 1 to 80 letters, digits, '.', '_' and '-', "
        "the first a letter or digit"
    )


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


def columns(varied: Iterable[Mapping[str, Value]]) -> list[str]:
    """The settings that differ between runs, beside a base model, which has a column of its own in every table."""
    return [key for key in dict.fromkeys(key for one in varied for key in one) if key != "model"]


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
        runs = with_controls(runs, experiment.control, known)
    return runs + list(controls.values())


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
