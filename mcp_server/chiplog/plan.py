"""The nouns of planning, and the pure step from a plan to its runs.

    question → Plan → Experiment → Run

A plan is what a person would write down: what is asked, what varies, what stays fixed. `expand` makes the runs,
each with a unique name made of what varies and the complete configuration that its job will read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from chiplog.errors import PlanError
from chiplog.schema import Frozen, plain_errors
from chiplog.values import Kind, Value, check_value

Config = dict[str, Any]
Control = Literal["base_model", "none"] | dict[str, Value]
Metric = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,39}$")]

# Names become folders, job names and file names in shell scripts: no character that any of them would read twice.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")

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


def columns(varied: Iterable[Mapping[str, Value]]) -> list[str]:
    """The settings that differ between runs, beside a base model, which has a column of its own in every table."""
    return [key for key in dict.fromkeys(key for one in varied for key in one) if key != "model"]
