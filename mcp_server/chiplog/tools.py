"""The tools, each a typed function: the MCP server and the command line are two faces of this one list.

A tool that spends takes `confirm` and raises ConfirmationNeeded without it; one that takes long takes `progress`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from chiplog import collect as collecting
from chiplog import planning
from chiplog.answers import (
    Confirm,
    EstimateAnswer,
    Limit,
    Name,
    PlanAnswer,
    PlanRow,
    RecordsAnswer,
    SetupAnswer,
    SummaryAnswer,
    VerifyAnswer,
)
from chiplog.calibration import against_actual
from chiplog.errors import PlanError, StudyError
from chiplog.estimate.case import NEEDED, Case, make_case
from chiplog.estimate.gpus import gpu, gpus
from chiplog.expand import expand
from chiplog.folder import ExperimentFolder, find_experiment
from chiplog.guards import next_steps
from chiplog.inputs import check_dataset, check_model, check_words, create_dataset, list_studies
from chiplog.jobs import cancel_experiment, experiment_status, prune_checkpoints, submit_experiment
from chiplog.ledger import Ledger
from chiplog.past_runs import (
    calibration_report,
    diagnose_run,
    export_runs,
    forget_run,
    import_runs,
    scan_logs,
    search_runs,
    show_run,
)
from chiplog.plan import Control, Value, dump_plan
from chiplog.planning import Request
from chiplog.recipes import manual
from chiplog.render import refuse_credentials, render, write_experiment
from chiplog.report import write_summary
from chiplog.schema import Progress
from chiplog.settings import load_settings
from chiplog.sizing import DatasetReports, PlannedRun, Sizing, estimated, find_shape, own_cards
from chiplog.studies import analysis
from chiplog.summary import summarize
from chiplog.tables import (
    bullets,
    case_words,
    cut_note,
    guard_table,
    note_words,
    plan_table,
    probe_words,
    summary_table,
    totals_words,
)
from chiplog.totals import make_totals

LISTED = 20


def plan_experiment(
    question: Annotated[str | None, Field(description="What should be found out.")] = None,
    models: Annotated[
        dict[str, str] | None,
        Field(description="Short name of each base model and its folder or name; none for the recipe train."),
    ] = None,
    dataset: Annotated[str | None, Field(description="File or folder of the data set, or its name.")] = None,
    variables: Annotated[
        dict[str, list[Value]] | None,
        Field(description="What varies, such as {model: [1B, 3B], lora_rank: [4, 64]}; their product is run."),
    ] = None,
    controls: Annotated[dict[str, Value] | None, Field(description="Settings that stay fixed, such as epochs.")] = None,
    seeds: Annotated[list[int] | None, Field(description="One replicate of every run for each seed.")] = None,
    control: Annotated[
        Control | None,
        Field(
            description="base_model evaluates each base model too, without fine-tuning it: the control condition. "
            "Settings, such as {activation: gelu}, name the runs that are the control of the others."
        ),
    ] = None,
    runs: Annotated[list[dict[str, Value]] | None, Field(description="Runs that are no product.")] = None,
    study: Annotated[str | None, Field(description="Study under tasks/; not needed for your own data.")] = None,
    plan: Annotated[str | None, Field(description="Name of one of the study's plans to start from.")] = None,
    hypothesis: Annotated[str | None, Field(description="What is expected, and why.")] = None,
    metrics: Annotated[list[str] | None, Field(description="Scores to report; the first decides.")] = None,
    name: Annotated[str | None, Field(description="Name of the experiment; null: the date and the question.")] = None,
    recipe: Annotated[
        str | None,
        Field(
            description="Recipe; null: one that fine-tunes, chosen from the GPUs and validation; train: models of your "
            "own, made from token files."
        ),
    ] = None,
    validation: Annotated[bool, Field(description="Whether to validate during training.")] = False,
    nodes: Annotated[int | None, Field(ge=1, description="Nodes of each run; null: one.")] = None,
    gpus: Annotated[
        int | None,
        Field(ge=0, description="GPUs of each run on each of its nodes; null: one if there are any, else the CPU."),
    ] = None,
    gpu: Annotated[str | None, Field(description="Name of the GPU in chiplog.toml.")] = None,
    cpus: Annotated[int | None, Field(ge=1, description="CPU cores of each process.")] = None,
    mem_gib: Annotated[
        int | None,
        Field(
            ge=1,
            description="Host memory of each node in GiB, on Slurm; null: as runs of the same configuration measured "
            "it, else the partition's default.",
        ),
    ] = None,
    time_limit_s: Annotated[int | None, Field(ge=1, description="Seconds after which a run is ended.")] = None,
    allow_oversize: Annotated[bool, Field(description="Plan runs that their GPU is not expected to hold.")] = False,
    limit: Limit = 50,
    confirm: Confirm = False,
    progress: Progress | None = None,
) -> PlanAnswer:
    """Plans an experiment: checks data and models, names the runs, estimates them from past runs, writes plan.yaml."""
    settings = load_settings()
    given = {key: value for key, value in locals().items() if key in Request.model_fields}
    planned = planning.make_plan(planning.make_request(given), settings, Ledger(), progress)
    folder = settings.allowed(settings.experiments / planned.plan.name)
    files = {"plan.yaml": dump_plan(planned.plan).encode()}
    refuse_credentials(files)
    with _planning_in(folder):
        ExperimentFolder(folder).refuse_change(files)
        write_experiment(folder, files, confirm=confirm)
    totals, table = planned.totals, plan_table(planned.rows[:limit])
    lines = [planned.plan.question, "", table, cut_note(len(planned.rows), limit), totals_words(totals)]
    if totals.controls:
        lines.append("A control is the base model, evaluated without fine-tuning; it has no training job.")
    lines += [f"warning: {check_words(check)}" for check in planned.warnings]
    lines += note_words(planned.rows) + probe_words(planned.rows)
    return PlanAnswer(
        summary="\n".join(line for line in lines if line is not None),
        next=[f"show the table to the user, then setup_experiment_dirs(experiment={planned.plan.name!r})"],
        plan_file=str(folder / "plan.yaml"),
        experiment=planned.plan.name,
        rows=[_plan_row(row) for row in planned.rows[:limit]],
        totals=totals,
        warnings=[check_words(check) for check in planned.warnings],
    )


@contextmanager
def _planning_in(folder: Path) -> Iterator[None]:
    """Makes the folder if it is not there and keeps other commands out of it; it goes again if no plan came of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExperimentFolder(folder.parent).locked():  # so that nobody waits for the lock of a folder that goes
        made = not folder.exists()
        try:
            folder.mkdir(exist_ok=True)
            with ExperimentFolder(folder).locked():
                yield
        finally:
            if made and {file.name for file in folder.glob("*")} <= {".lock"}:
                (folder / ".lock").unlink(missing_ok=True)
                folder.rmdir()


def setup_experiment_dirs(experiment: Name, confirm: Confirm = False) -> SetupAnswer:
    """Writes the experiment folder: code, configurations, sbatch files. Overwrites nothing without a yes."""
    settings = load_settings()
    folder = find_experiment(experiment, settings)
    with folder.locked():
        plan = folder.plan
        runs = expand(plan, manual)
        files = render(plan, runs, settings)
        folder.refuse_change(files)
        written = write_experiment(folder.path, files, confirm=confirm)
    what = f"{len(written)} files written" if written else "everything was there already"
    where = "on Slurm" if settings.slurm else "on this machine"
    then = [f"submit_experiment(experiment={folder.path.name!r}) runs it {where}"]
    return SetupAnswer(
        summary=f"{folder.path}: {len(runs)} runs, {what}.",
        next=then,
        folder=str(folder.path),
        written=written[:LISTED],
        n_written=len(written),
    )


def collect_records(experiment: Name, limit: Limit = 50) -> RecordsAnswer:
    """Reads what the jobs left behind into records.jsonl and the ledger; predicted against actual."""
    folder = find_experiment(experiment, load_settings())
    records = collecting.collect(folder, Ledger())
    last = list({record.run: record for record in records}.values())
    lines = [f"{folder.path.name}: {len(records)} records."]
    lines += [f"{record.run}: {against_actual(record)}" for record in last[:limit]]
    return RecordsAnswer(
        summary="\n".join(line for line in [*lines, cut_note(len(last), limit)] if line),
        next=[f"summarize_experiment(experiment={folder.path.name!r})"],
        file=str(folder.path / "records.jsonl"),
        records=last[:limit],
    )


def summarize_experiment(experiment: Name, limit: Limit = 50) -> SummaryAnswer:
    """Writes summary.md and its figure: what was shown and what was not, every run with its interval."""
    folder = find_experiment(experiment, load_settings())
    records = collecting.collect(folder, Ledger())
    plan, summary = folder.plan, summarize(folder, records)
    try:
        with folder.locked():  # two would write the same files
            found = analysis(plan.study, folder.path)
        if found:
            summary = summary.with_analysis(found)
    except StudyError as error:  # the summary is always written
        summary = summary.model_copy(update={"not_shown": [f"What the study asks: {error}", *summary.not_shown]})
    files = write_summary(folder, summary)
    table = summary_table(summary.rows[:limit], plan.metrics)
    shown = bullets(summary.shown, limit) or ["- nothing"]
    not_shown = bullets(summary.not_shown, limit) or ["- nothing is left open by this design"]
    cut = cut_note(len(summary.rows), limit)
    lines = [plan.question, "", table, *([cut] if cut else []), "", "Shown:", *shown, "", "Not shown:", *not_shown]
    lines += ["", "Guards: " + summary.guard_words[0], *bullets(summary.guard_words[1:], limit)]
    if summary.deviations:
        lines += ["", "Otherwise than planned:", *bullets(summary.deviations, limit)]
    return SummaryAnswer(
        summary="\n".join(lines),
        next=[f"read {files[0]}"],
        ok=summary.complete,
        files=[str(file) for file in files],
        rows=summary.rows[:limit],
        comparisons=summary.comparisons[:limit],
        not_shown=summary.not_shown[:limit],
    )


def verify_experiment(experiment: Name, limit: Limit = 50) -> VerifyAnswer:
    """Lists every validity guard with its outcome for each run: whether what came out may be believed."""
    folder = find_experiment(experiment, load_settings())
    summary = summarize(folder, collecting.collect(folder, Ledger()))
    name, failed = folder.path.name, next_steps(summary.guards)
    first, *words = summary.guard_words
    return VerifyAnswer(
        summary="\n".join([f"{name}: {first}", *bullets(words, limit), "", guard_table(summary.guards)]),
        next=failed or [f"summarize_experiment(experiment={name!r})"],
        ok=not failed,
        guards=[one.cut_to(limit) for one in summary.guards],
    )


def estimate_resources(
    experiment: Annotated[str | None, Field(description="Name of a planned experiment, or its folder.")] = None,
    case: Annotated[
        dict[str, Value] | None,
        Field(
            description="One job that need not be planned nor its model be there: model, gpu, batch_size and seq_len; "
            f"and if wanted {', '.join(name for name in Case.model_fields if name not in NEEDED)}."
        ),
    ] = None,
    limit: Limit = 50,
) -> EstimateAnswer:
    """Estimates time and memory from past runs, with intervals and evidence: of a planned experiment, or of one case.

    Of a case it also says why, what would change it, and what would fit: batch, length, rank, model, GPU, budget.
    """
    if (experiment is None) == (case is None):
        raise PlanError(
            "name a planned experiment, or give a case with model, gpu, batch_size and seq_len: one of both"
        )
    return _of_experiment(experiment, limit) if experiment is not None else _of_case(make_case(case or {}))


def _of_experiment(name: str, limit: int) -> EstimateAnswer:
    settings = load_settings()
    folder = find_experiment(name, settings)
    rows = estimated(folder.runs() if folder.is_set_up else expand(folder.plan, manual), settings)
    totals, table = make_totals(rows, settings), plan_table(rows[:limit])
    evidence = sorted({name for row in rows if row.estimate.elapsed for name in row.estimate.elapsed.evidence})
    lines = [table, cut_note(len(rows), limit), totals_words(totals)]
    lines += [f"Evidence: {', '.join(evidence[:LISTED])}."] if evidence else []
    lines += note_words(rows) + probe_words(rows)
    return EstimateAnswer(
        summary="\n".join(line for line in lines if line),
        experiment=folder.path.name,
        rows=[_plan_row(row) for row in rows[:limit]],
        totals=totals,
        case=None,
    )


def _of_case(case: Case) -> EstimateAnswer:
    from chiplog.estimate.questions import estimate_case  # numpy and scipy take a while to import

    settings = load_settings()
    case = case.model_copy(update={"model": find_shape(case.model, settings)})
    place = Sizing(DatasetReports(), Ledger(), settings).place(case.gpu, case.model)
    if place is None:
        gpu(case.gpu)  # says what is wrong with the name
    assert place, "a card of the catalogue has its place"
    found = estimate_case(case, place, own_cards(settings) or [*gpus().values()])
    then = ["plan_experiment plans it; a run of max_steps 20 on that GPU narrows the intervals"]
    return EstimateAnswer(
        summary=case_words(found, place.card.name), next=then, experiment=None, rows=[], totals=None, case=found
    )


def _plan_row(row: PlannedRun) -> PlanRow:
    return PlanRow(
        run=row.run.name,
        kind=row.run.kind,
        varied=row.run.varied,
        batch_size=row.run.config.get("batch_size"),
        n_params=row.n_params,
        tokens=row.tokens,
        flops=row.flops,
        time_limit_s=row.run.resources.time_limit_s,
        mem_gib=row.run.resources.mem_gib,
        estimate=row.estimate,
    )


class Tool(NamedTuple):
    """One tool and what it does to the world."""

    function: Callable[..., Any]
    reads_only: bool = False
    destroys: bool = False
    idempotent: bool = True


TOOLS = [
    Tool(list_studies, reads_only=True),
    Tool(check_dataset, reads_only=True),
    Tool(check_model, reads_only=True),
    Tool(create_dataset),
    Tool(plan_experiment, destroys=True),
    Tool(setup_experiment_dirs, destroys=True),
    Tool(submit_experiment),
    Tool(experiment_status),
    Tool(cancel_experiment, destroys=True),
    Tool(prune_checkpoints, destroys=True),
    Tool(collect_records),
    Tool(summarize_experiment),
    Tool(verify_experiment),
    Tool(estimate_resources, reads_only=True),
    Tool(scan_logs),
    Tool(search_runs, reads_only=True),
    Tool(show_run, reads_only=True),
    Tool(diagnose_run, reads_only=True),
    Tool(calibration_report, reads_only=True),
    Tool(forget_run, destroys=True),
    Tool(export_runs, destroys=True),
    Tool(import_runs),
]
