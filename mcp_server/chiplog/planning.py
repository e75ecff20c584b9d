"""From a question to a checked plan with its estimates: what `plan_experiment` does, step by step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from chiplog.bundle import study_folder, study_names
from chiplog.checks import Check, Report, warning
from chiplog.checks.dataset import DatasetReport
from chiplog.checks.lookup import resolve_dataset, resolve_model
from chiplog.checks.model import ModelReport, check_model
from chiplog.engines.local import available_gpus
from chiplog.errors import NotFoundError, PlanError
from chiplog.expand import expand
from chiplog.host_memory import check_host_memory, with_host_memory
from chiplog.ledger import Ledger
from chiplog.plan import Control, Experiment, Plan, Resources, Run, Value, parse_plan
from chiplog.recipes import choose_recipe, load_recipe, manual
from chiplog.render import code_files, find_gpu
from chiplog.schema import Frozen, plain_errors
from chiplog.settings import Settings
from chiplog.sizing import DatasetReports, PlannedRun, Sizing, devices, stop_on
from chiplog.studies import study_plan
from chiplog.totals import Totals, check_room, make_totals, refuse_over_budget
from chiplog.trainings import check_epochs, check_training


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
    control: Control | None = Field(default=None, description="base_model, none, or settings of one of the runs.")
    recipe: str | None = Field(default=None, description="Recipe; null: chosen from the GPUs and validation.")
    validation: bool = Field(default=False, description="Whether to validate during training.")
    nodes: int | None = Field(default=None, description="Nodes of each run.")
    gpus: int | None = Field(default=None, description="GPUs of each run on each of its nodes.")
    gpu: str | None = Field(default=None, description="Name of the GPU in chiplog.toml.")
    cpus: int | None = Field(default=None, description="CPU cores of each process.")
    mem_gib: int | None = Field(default=None, description="Host memory of each node in GiB, on Slurm.")
    time_limit_s: int | None = Field(default=None, description="Seconds after which a run is ended.")
    allow_oversize: bool = Field(default=False, description="Plan runs that their GPU is not expected to hold.")


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
        _check_share(run)
        _check_gpu(run, settings)
        if run.kind == "train":
            check_training(run, datasets.tokens_of(run))
            continue
        _check_scorer(run, plan)
        _check_split(run, datasets.of(run))
    hashes = {run.dataset: datasets.sha256_of(run) for run in runs}
    plan = plan.model_copy(update={"dataset_sha256": {key: hashes[key] for key in plan.datasets if key in hashes}})
    sizing = Sizing(datasets, ledger, settings)
    rows = [sizing.row(run) for run in runs]
    for row in rows:
        if row.run.kind == "finetune":
            _check_steps(row, datasets.of(row.run))
        if not request.allow_oversize:
            sizing.refuse_too_large(row)
    refuse_over_budget(plan, rows, settings)
    if settings.slurm:
        plan = with_host_memory(_with_time_limits(plan, rows), rows)
        limited = {run.name: run for run in expand(plan, manual)}
        rows = [row.model_copy(update={"run": limited[row.run.name]}) for row in rows]
    totals = make_totals(rows, settings)
    reports: list[Report] = [*models.values(), *datasets.all]
    found = [check for report in reports for check in report.problems]
    found += _check_warm_up(rows) + _check_own_rows(rows) + check_room(rows, totals, settings)
    found += check_epochs([run for run in runs if run.kind == "train"], datasets.token_files)
    found += check_host_memory(rows, settings)
    found += [check for name in devices(runs, settings) if (check := sizing.card_warning(name))]
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
    values["experiments"] = [_experiment(request, dict(e), settings) for e in values.get("experiments") or [{}]]
    tunes = any(experiment["framework"] != "trainer" for experiment in values["experiments"])
    missing = [key for key in ("question", "models", "datasets") if not values.get(key) and (tunes or key != "models")]
    if missing:
        words = ", ".join("dataset" if key == "datasets" else key for key in missing)
        raise PlanError(f"the plan lacks {words}: give them, or name a plan of a study (list_studies shows them)")
    slug = request.plan or "-".join(re.findall(r"[a-z0-9]+", values["question"].lower())[:6]) or "plan"
    values["name"] = request.name or f"{date.today()}-{slug.replace('_', '-')}"
    values["study"] = request.study
    values["models"] = {
        key: str(settings.allowed(resolve_model(path, settings.model_roots, settings.workspace)))
        for key, path in (values.get("models") or {}).items()
    }
    values["datasets"] = {
        key: str(find_dataset(path, settings, request.study)) for key, path in values["datasets"].items()
    }
    return parse_plan(values, "the request")


def _experiment(request: Request, values: dict[str, Any], settings: Settings) -> dict[str, Any]:
    for key in ("variables", "runs", "seeds", "control", "recipe"):
        if (given := getattr(request, key)) is not None:
            values[key] = given
    controls = {**values.get("controls", {}), **(request.controls or {})}
    resources = dict(values.get("resources", {}))
    for key in ("nodes", "gpus", "gpu", "cpus", "mem_gib", "time_limit_s"):
        if (given := getattr(request, key)) is not None:
            resources[key] = given
    has_gpus = bool(settings.gpus) or (settings.slurm is None and bool(available_gpus()))
    resources.setdefault("gpus", 1 if has_gpus else 0)
    if not values.get("recipe") and values.get("framework") == "trainer":
        values["recipe"] = "train"
    if not values.get("recipe"):
        recipe = choose_recipe(_processes(resources), request.validation)
        values["recipe"] = recipe.name
        if request.validation and "val_split" in recipe.settings:
            controls.setdefault("val_split", recipe.settings["val_split"] or "validation")
    about = load_recipe(values["recipe"]).about
    values.setdefault("framework", "trainer" if about.framework == "trainer" else "torchtune")
    scores = request.study and (study_folder(request.study) / "evaluate.py").is_file()
    if scores and values["framework"] != "trainer":
        controls.setdefault("scorer", f"tasks/{request.study}/evaluate.py")
    return {**values, "controls": controls, "resources": resources}


def _processes(resources: Mapping[str, Any]) -> int:
    try:
        return Resources.model_validate(resources).processes
    except ValidationError as error:
        raise PlanError(f"the resources of a run are wrong:\n{plain_errors(error)}\nMend these.") from error


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


def _check_recipe(experiment: Experiment, models: Mapping[str, ModelReport]) -> None:
    about, asked = load_recipe(experiment.recipe).about, experiment.resources.processes
    if about.does != "train":
        raise PlanError(f"the recipe {experiment.recipe} does not train: name one that does, or leave recipe out")
    if about.max_processes is not None and asked > about.max_processes:
        raise PlanError(
            f"{asked} {'GPUs' if experiment.resources.gpus else 'nodes'} are asked for and the recipe "
            f"{experiment.recipe} uses {about.max_processes} at most: ask for fewer, or leave recipe out"
        )
    for key, report in models.items():
        if about.model_types and report.model_type not in about.model_types:
            raise PlanError(
                f"the recipe {experiment.recipe} cannot load {key}, whose model_type is {report.model_type}: "
                f"it loads {', '.join(about.model_types)}; take another model or recipe"
            )


def _check_share(run: Run) -> None:
    """Refuses a batch that the processes of a run cannot share evenly."""
    n, batch, micro = run.resources.processes, run.config.get("batch_size"), run.config.get("micro_batch_size") or 1
    if n > 1 and isinstance(batch, int) and batch % (n * micro):
        raise PlanError(
            f"{run.name} shares batch_size {batch} over {n} {'GPUs' if run.resources.gpus else 'nodes'} in passes of "
            f"{micro}, which leaves a rest: make batch_size a multiple of {n * micro}, or micro_batch_size smaller"
        )


def _check_gpu(run: Run, settings: Settings) -> None:
    """Refuses nodes and GPUs that chiplog.toml does not name, or, where it names none, this machine lacks."""
    gpu, asked = find_gpu(run.resources, settings), run.resources.all_gpus
    if run.resources.nodes > 1 and not settings.slurm:
        raise PlanError(
            f"{run.name} asks for {run.resources.nodes} nodes and this machine is one: leave nodes out, or describe "
            "your cluster in chiplog.toml under [slurm]"
        )
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
    if not row.steps:
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
    val_split = run.config.get("val_split")
    trains = ["train", *([val_split] if val_split else [])]
    needed = [run.config["eval_split"], *([] if run.kind == "control" else trains)]
    if missing := [split for split in needed if split not in report.splits]:
        raise PlanError(
            f"the data set {run.dataset} has no split {missing[0]!r}, it has {', '.join(report.splits)}: "
            f"add one, or set {'val_split' if missing[0] == val_split else 'eval_split'} in controls to one of these"
        )


def _check_own_rows(rows: Sequence[PlannedRun]) -> list[Check]:
    """A run that is scored on what it was trained on."""
    named = [row.run.name for row in rows if row.run.kind == "finetune" and row.run.config["eval_split"] == "train"]
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
    return [warning("warmup_steps", found, "Lower it, or train for longer")]


def _with_time_limits(plan: Plan, rows: Sequence[PlannedRun]) -> Plan:
    """The estimated limits, for runs whose plan has none of its own. No evidence: the partition's own limit."""
    free = [row for row in rows if row.run.resources.time_limit_s is None]
    limits = {row.run.name: row.estimate.time_limit_s for row in free if row.estimate.time_limit_s}
    evaluating = {row.run.name: row.estimate.eval_time_limit_s for row in free if row.estimate.eval_time_limit_s}
    kept = [
        e.model_copy(
            update={
                "time_limits_s": {**limits, **e.time_limits_s},
                "eval_time_limits_s": {**evaluating, **e.eval_time_limits_s},
            }
        )
        for e in plan.experiments
    ]
    return plan.model_copy(update={"experiments": kept})
