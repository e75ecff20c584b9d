"""From a question to a checked plan with its estimates: what `plan_experiment` does, step by step."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from chiplog.bundle import study_folder, study_names
from chiplog.checks import Check, Report, warning
from chiplog.checks.dataset import DatasetReport, check_dataset
from chiplog.checks.lookup import resolve_dataset, resolve_model
from chiplog.checks.model import ModelReport, check_model
from chiplog.engines.local import available_gpus, gpu_name
from chiplog.errors import NotFoundError, PlanError
from chiplog.estimate import NAMED, Estimate, RunEstimate, estimate_run, workload
from chiplog.estimate.tokens import Steps
from chiplog.estimate.workload import training_steps
from chiplog.ledger import Ledger
from chiplog.machine import available_cpus
from chiplog.plan import Experiment, Plan, Run, Value, expand, parse_plan
from chiplog.recipes import choose_recipe, load_recipe, manual
from chiplog.record import Record
from chiplog.render import code_files, find_gpu
from chiplog.schema import Frozen, plain_errors
from chiplog.settings import Settings
from chiplog.studies import study_plan


class Request(Frozen):
    """What a plan is asked for; a null takes the study's plan, or the default."""

    question: str | None = Field(default=None, description="What should be found out.")
    name: str | None = Field(default=None, description="Name of the folder; null: today's date and the question.")
    study: str | None = Field(default=None, description="Folder under tasks/.")
    plan: str | None = Field(default=None, description="Name of one of the study's plans.")
    hypothesis: str | None = Field(default=None, description="What is expected, and why.")
    metrics: list[str] | None = Field(default=None, description="Scores to report; the first decides.")
    models: dict[str, str] | None = Field(default=None, description="Short name of each model and where it is.")
    dataset: str | None = Field(default=None, description="The data set.")
    variables: dict[str, list[Value]] | None = Field(default=None, description="What varies.")
    runs: list[dict[str, Value]] | None = Field(default=None, description="Runs that are no product.")
    controls: dict[str, Value] | None = Field(default=None, description="What stays fixed.")
    seeds: list[int] | None = Field(default=None, description="Replicates.")
    control: str | None = Field(default=None, description="base_model or none.")
    recipe: str | None = Field(default=None, description="Recipe; null: chosen from the GPUs and validation.")
    validation: bool = Field(default=False, description="Whether to validate during training.")
    gpus: int | None = Field(default=None, description="GPUs of each run.")
    gpu: str | None = Field(default=None, description="Name of the GPU in chiplog.toml.")
    cpus: int | None = Field(default=None, description="CPU cores of each run.")
    time_limit_s: int | None = Field(default=None, description="Seconds after which a run is ended.")


class PlannedRun(Frozen):
    """One row of the plan's table."""

    run: Run = Field(description="The run.")
    steps: int = Field(description="Optimiser steps that it will take; 0 for a control.")
    trained: Steps | None = Field(description="How its recipe makes them of the samples; null for a control.")
    estimate: RunEstimate = Field(description="What it will need.")


class Totals(Frozen):
    """What all runs will need together; runs without evidence are counted, not guessed."""

    runs: int = Field(description="Jobs in all.")
    controls: int = Field(description="Of these, evaluations of a base model.")
    unknown: int = Field(description="Runs whose time nothing tells yet.")
    in_sequence_s: Estimate | None = Field(description="Seconds one after another; null if a run is unknown.")
    in_parallel_s: float | None = Field(
        description="Seconds with as many at once as this machine has CPUs for; null for GPU runs."
    )
    gpu_hours: float | None = Field(description="GPU hours; null if a run is unknown.")


class Planned(Frozen):
    """A checked plan."""

    plan: Plan = Field(description="The plan.")
    rows: list[PlannedRun] = Field(description="Its runs with their estimates.")
    totals: Totals = Field(description="What they need together.")
    warnings: list[Check] = Field(description="What was found and does not stop it.")


def make_request(values: Mapping[str, Any]) -> Request:
    """A request from plain values. Raises PlanError that names what is wrong."""
    try:
        return Request.model_validate(dict(values))
    except ValidationError as error:
        raise PlanError(f"the plan is asked for wrongly:\n{plain_errors(error)}\nMend these.") from error


def make_plan(request: Request, settings: Settings, ledger: Ledger, progress=None) -> Planned:
    """Checks everything that can be checked before a job runs.

    Raises NotFoundError for a model or data set that is not there, PlanError for what would not run.
    """
    plan = _draft(request, settings)
    models = {key: check_model(Path(path)) for key, path in plan.models.items()}
    for key, model in models.items():
        stop_on(model, f"model {key}", plan.models[key])
    for experiment in plan.experiments:
        _check_recipe(experiment, models)
    runs = expand(plan, manual)
    datasets = DatasetReports(progress)
    for run in runs:
        _check_gpu(run, settings)
        _check_scorer(run, plan)
        _check_split(run, datasets.of(run))
    hashes = {run.dataset: datasets.of(run).sha256 for run in runs}
    plan = plan.model_copy(update={"dataset_sha256": {key: hashes[key] for key in plan.datasets if key in hashes}})
    records = ledger.records()
    rows = [plan_run(run, datasets.of(run), records, settings) for run in runs]
    for row in rows:
        _check_steps(row, datasets.of(row.run))
    if settings.slurm:
        plan = _with_time_limits(plan, rows)
        limited = {run.name: run for run in expand(plan, manual)}
        rows = [row.model_copy(update={"run": limited[row.run.name]}) for row in rows]
    totals = make_totals(rows)
    budget = plan.gpu_hours or settings.budget.gpu_hours
    if budget and totals.gpu_hours and totals.gpu_hours > budget:
        raise PlanError(
            f"the plan needs about {totals.gpu_hours:.1f} GPU hours and the budget is {budget:g}: "
            "take fewer values, fewer seeds or fewer epochs, or raise [budget] gpu_hours"
        )
    reports: list[Report] = [*models.values(), *datasets.found.values()]
    found = [check for report in reports for check in report.problems] + _check_warm_up(rows) + _check_own_rows(rows)
    warnings = list({(check.subject, check.found): check for check in found}.values())
    return Planned(plan=plan, rows=rows, totals=totals, warnings=warnings)


def _draft(request: Request, settings: Settings) -> Plan:
    """The plan as asked for, with every path resolved and the recipe chosen."""
    if request.plan and not request.study:
        raise PlanError(f"plan {request.plan!r} belongs to a study: say which with study, or give the design itself")
    values = dict(study_plan(request.study, request.plan)) if request.study and request.plan else {}
    for key in ("question", "hypothesis", "metrics", "models"):
        if (given := getattr(request, key)) is not None:
            values[key] = given
    if request.dataset is not None:
        values["datasets"] = {_short(request.dataset): request.dataset}
    missing = [key for key in ("question", "models", "datasets") if not values.get(key)]
    if missing:
        words = ", ".join("dataset" if key == "datasets" else key for key in missing)
        raise PlanError(f"the plan lacks {words}: give them, or name a plan of a study (list_studies shows them)")
    slug = request.plan or "-".join(re.findall(r"[a-z0-9]+", values["question"].lower())[:6]) or "plan"
    values["name"] = request.name or f"{date.today()}-{slug.replace('_', '-')}"
    values["study"] = request.study
    values["models"] = {
        key: str(settings.allowed(resolve_model(path, settings.model_roots, settings.workspace)))
        for key, path in values["models"].items()
    }
    values["datasets"] = {
        key: str(find_dataset(path, settings, request.study)) for key, path in values["datasets"].items()
    }
    values["experiments"] = [_experiment(request, dict(e), settings) for e in values.get("experiments") or [{}]]
    return parse_plan(values, "the request")


def _experiment(request: Request, values: dict[str, Any], settings: Settings) -> dict[str, Any]:
    for key in ("variables", "runs", "seeds", "control", "recipe"):
        if (given := getattr(request, key)) is not None:
            values[key] = given
    controls = {**values.get("controls", {}), **(request.controls or {})}
    if request.study and (study_folder(request.study) / "evaluate.py").is_file():
        controls.setdefault("scorer", f"tasks/{request.study}/evaluate.py")
    resources = dict(values.get("resources", {}))
    for key in ("gpus", "gpu", "cpus", "time_limit_s"):
        if (given := getattr(request, key)) is not None:
            resources[key] = given
    has_gpus = bool(settings.gpus) or (settings.slurm is None and bool(available_gpus()))
    resources.setdefault("gpus", 1 if has_gpus else 0)
    if not values.get("recipe"):
        values["recipe"] = choose_recipe(resources["gpus"], request.validation).name
    return {**values, "controls": controls, "resources": resources}


def find_dataset(name: str, settings: Settings, study: str | None = None) -> Path:
    """Its path. Raises NotFoundError with what is near, and which studies can make data sets."""
    try:
        return settings.allowed(resolve_dataset(name, settings.dataset_roots, settings.workspace))
    except NotFoundError as error:
        makers = [
            maker for maker in ([study] if study else study_names()) if (study_folder(maker) / "data.py").is_file()
        ]
        if not makers:
            raise
        words = f"create_dataset makes data sets of the study {', '.join(makers)}"
        raise NotFoundError(f"{error}\n{words}") from error


def _short(path: str) -> str:
    stem = Path(path).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "data"


class DatasetReports:
    """What was found of each data set, with the tokenizer and the prompts of the runs that read it."""

    def __init__(self, progress=None) -> None:
        self.progress = progress
        self.found: dict[tuple[str, ...], DatasetReport] = {}

    def of(self, run: Run) -> DatasetReport:
        """Raises PlanError if the data set cannot be used so."""
        config = run.config
        prompts = {name: config[name] for name in ("system_prompt", "prompt")}
        key = (config["dataset"], config["model"], *(str(text) for text in prompts.values()))
        if key not in self.found:
            report = check_dataset(Path(key[0]), model=Path(key[1]), **prompts, progress=self.progress)
            stop_on(report, f"data set {run.dataset}", key[0])
            self.found[key] = report
        return self.found[key]


def stop_on(report: Report, what: str, path: str) -> None:
    """Raises PlanError with every check that failed."""
    if not report.ok:
        lines = [f"  {check.subject}: {check.found}. {check.mend}" for check in report.problems if not check.ok]
        raise PlanError(f"the {what} ({path}) cannot be used:\n" + "\n".join(lines))


def _check_recipe(experiment: Experiment, models: Mapping[str, ModelReport]) -> None:
    about, asked = load_recipe(experiment.recipe).about, experiment.resources.gpus
    if about.does != "train":
        raise PlanError(f"the recipe {experiment.recipe} does not train: name one that does, or leave recipe out")
    if about.max_gpus is not None and asked > about.max_gpus:
        raise PlanError(f"{asked} GPUs are asked for and the recipe {experiment.recipe} uses {about.max_gpus} at most")
    for key, report in models.items():
        if about.model_types and report.model_type not in about.model_types:
            raise PlanError(
                f"the recipe {experiment.recipe} cannot load {key}, whose model_type is {report.model_type}: "
                f"it loads {', '.join(about.model_types)}; take another model or recipe"
            )


def _check_gpu(run: Run, settings: Settings) -> None:
    """Refuses GPUs that chiplog.toml does not name, or, where it names no cluster and no GPU, this machine lacks."""
    gpu, asked = find_gpu(run, settings), run.resources.gpus
    if not asked:
        return
    if len(settings.gpus) > 1 and not gpu:
        raise PlanError(f"{run.name} asks for a GPU: say which with gpu, {', '.join(g.name for g in settings.gpus)}")
    if gpu and gpu.count is not None and asked > gpu.count:
        raise PlanError(f"{run.name} asks for {asked} {gpu.name} and chiplog.toml counts {gpu.count}: ask for fewer")
    if settings.slurm and not gpu:
        raise PlanError(f"{run.name} asks for a GPU and chiplog.toml names none: add its kind under [[gpus]]")
    if not gpu and asked > (there := len(available_gpus())):
        raise PlanError(
            f"{run.name} asks for {asked} GPUs and this machine has {there}: plan with gpus={there}, or describe your "
            "cluster in chiplog.toml under [slurm] and [[gpus]]"
        )


def _check_scorer(run: Run, plan: Plan) -> None:
    """Refuses a scorer that the experiment folder would not carry."""
    scorer = run.config["scorer"]
    if scorer is None:
        return
    carried = {name: file for name, file in code_files(plan).items() if _has_score(file)}
    if scorer not in carried:
        there = ", ".join(carried) or "none yet"
        raise PlanError(
            f"there is no scorer {scorer!r}: it is a Python file under recipes/ or of the study with a function "
            f"score(output, target); there is {there}"
        )


def _has_score(file: Path) -> bool:
    return file.suffix == ".py" and bool(re.search(rb"^def score\(", file.read_bytes(), re.MULTILINE))


def _check_steps(row: PlannedRun, report: DatasetReport) -> None:
    if row.run.kind != "control" and not row.steps:
        raise PlanError(
            f"{row.run.name} would take no step: its batch_size {row.run.config['batch_size']} is more than the "
            f"{report.splits['train'].rows} rows of train; lower it"
        )


def _check_split(run: Run, report: DatasetReport) -> None:
    if report.shape == "text":
        raise PlanError(
            f"the rows of {run.dataset} are text without a prompt, which can be trained on and not scored: "
            "give rows with input and output, or messages"
        )
    needed = [run.config["eval_split"], *([] if run.kind == "control" else ["train"])]
    if missing := [split for split in needed if split not in report.splits]:
        raise PlanError(
            f"the data set {run.dataset} has no split {missing[0]!r}, it has {', '.join(report.splits)}: "
            "add one, or set eval_split in controls to the split to score on"
        )


def _check_own_rows(rows: Sequence[PlannedRun]) -> list[Check]:
    """A run that is scored on what it was trained on."""
    named = [row.run.name for row in rows if row.run.kind != "control" and row.run.config["eval_split"] == "train"]
    if not named:
        return []
    found = f"{', '.join(named)} would be scored on the rows that they train on: that shows what they can recite"
    return [warning("eval_split", found, "Score on a split that no run trains on")]


def _check_warm_up(rows: Sequence[PlannedRun]) -> list[Check]:
    """A warm-up that outlasts the run: the learning rate that the plan names would never be reached."""
    short = {row.run.name: row.steps for row in rows if row.run.config.get("warmup_steps", 0) >= row.steps > 0}
    if not short:
        return []
    found = f"it outlasts the {min(short.values())} steps of {', '.join(short)}, which never reach their lr"
    return [warning("warmup_steps", found, "Lower it, or train for more epochs")]


def plan_run(run: Run, report: DatasetReport, records: Sequence[Record], settings: Settings) -> PlannedRun:
    """A run with its estimate, from the records of the device that it will run on."""
    gpu = find_gpu(run, settings)
    # Of a GPU that no file names, the kind is what this machine has.
    kind = gpu.name.split("-")[0] if gpu else gpu_name() if run.resources.gpus else ""

    def same_device(device: str | None) -> bool:
        if not run.resources.gpus:
            return device == "cpu"
        return bool(device and kind and device != "cpu" and kind.lower() in device.lower())

    trained = None
    if run.kind != "control":
        train = report.splits["train"]
        assert train.tokens, "a report without failed checks has counted the tokens"
        trained = training_steps(run.config, train.tokens.lengths, train.rows, train.tokens.max)
    work = workload(run, trained, report.splits[run.config["eval_split"]].rows)
    usable = [record for record in records if same_device(record.usage.device)]
    return PlannedRun(run=run, steps=work.steps, trained=trained, estimate=estimate_run(run, work, usable))


def _with_time_limits(plan: Plan, rows: Sequence[PlannedRun]) -> Plan:
    """The upper end of each estimate and a half more, in full minutes, for runs whose plan has no limit of its own.

    No evidence: the partition's own limit.
    """
    limits = {
        row.run.name: 60 * math.ceil(row.estimate.elapsed.high * 1.5 / 60)
        for row in rows
        if row.estimate.elapsed and row.run.resources.time_limit_s is None
    }
    kept = [e.model_copy(update={"time_limits_s": {**limits, **e.time_limits_s}}) for e in plan.experiments]
    return plan.model_copy(update={"experiments": kept})


def make_totals(rows: Sequence[PlannedRun]) -> Totals:
    """Sums over the runs. The ends of the interval add up too, which is wider than it need be."""
    times = [(row.run, row.estimate.elapsed) for row in rows]
    known = [time for _, time in times if time]
    complete = len(known) == len(rows)
    jobs = [(time.value, run.resources) for run, time in times if time]
    fits_here = complete and all(asked.cpus <= available_cpus() and not asked.gpus for _, asked in jobs)
    together = None
    names = sorted({name for time in known for name in time.evidence})
    if complete and known:
        together = Estimate(
            value=sum(time.value for time in known),
            low=sum(time.low for time in known),
            high=sum(time.high for time in known),
            coverage=None,
            basis="scaled" if any(time.basis == "scaled" for time in known) else "same-configuration",
            evidence=names[:NAMED],
            n_evidence=len(names),
        )
    return Totals(
        runs=len(rows),
        controls=sum(row.run.kind == "control" for row in rows),
        unknown=len(rows) - len(known),
        in_sequence_s=together,
        in_parallel_s=_parallel([(seconds, asked.cpus) for seconds, asked in jobs]) if fits_here else None,
        gpu_hours=sum(seconds * asked.gpus for seconds, asked in jobs) / 3600 if complete else None,
    )


def _parallel(jobs: Sequence[tuple[float, int]]) -> float:
    """Seconds until the last job ends if each starts, in order, as soon as its CPUs are free."""
    free = [0.0] * available_cpus()
    last = 0.0
    for seconds, cpus in jobs:
        taken = [heapq.heappop(free) for _ in range(cpus)]
        end = max(taken) + seconds
        for _ in taken:
            heapq.heappush(free, end)
        last = max(last, end)
    return last
