"""Tools over the ledger of past runs: reading logs into it, searching it, and saying why a run ended."""

from __future__ import annotations

import glob
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from chiplog.answers import (
    CalibrationAnswer,
    DiagnosisAnswer,
    ExportAnswer,
    ForgetAnswer,
    RunAnswer,
    RunsAnswer,
    ScanAnswer,
)
from chiplog.calibration import against_actual, calibration, in_words
from chiplog.diagnosis import diagnose
from chiplog.errors import ConfirmationNeeded, NotFoundError, RecordError
from chiplog.ledger import Ledger
from chiplog.ledger.parse import parse_job
from chiplog.ledger.redact import redacted
from chiplog.ledger.scan import scan
from chiplog.record import Record, State, read_records, write_records
from chiplog.schema import Progress
from chiplog.settings import Settings, load_settings
from chiplog.sizing import fitting_batch
from chiplog.tables import markdown
from chiplog.text import duration, size

SORTS = Literal[
    "-started", "started", "-train_s", "train_s", "-peak_mem_bytes", "peak_mem_bytes", "loss_last", "-loss_last"
]
Key = Annotated[str, Field(description="Key of a run, as search_runs shows it, or the path of a log.")]
SHOWN = 12  # evidence lines in the text


def scan_logs(
    paths: Annotated[
        list[str] | None,
        Field(description="Files, folders or globs; null: [paths] logs of chiplog.toml and the experiments."),
    ] = None,
    progress: Progress | None = None,
) -> ScanAnswer:
    """Reads logs of past runs into the ledger: any framework, new and changed files only."""
    settings = load_settings()
    roots = [root for text in paths or settings.paths.logs for root in _expanded(text, settings)]
    if not paths:
        roots.append(settings.experiments)
    found = scan([root for root in roots if root.exists()], Ledger(), progress)
    words = f"{found.files} logs, {found.read} of them new or changed with {found.runs} runs; {found.gone} are gone."
    errors = [f"- {line}" for line in found.errors[:SHOWN]]
    return ScanAnswer(
        summary="\n".join([words, *(["Not read:", *errors] if errors else [])]),
        next=["search_runs searches them"],
        ok=not found.errors,
        scanned=found,
    )


def search_runs(
    model: Annotated[str | None, Field(description="Part of the model's name.")] = None,
    gpu: Annotated[str | None, Field(description="Part of the GPU's name, or cpu.")] = None,
    recipe: Annotated[str | None, Field(description="Recipe.")] = None,
    framework: Annotated[str | None, Field(description="What wrote the log, such as torchtune.")] = None,
    state: Annotated[State | None, Field(description="How it ended.")] = None,
    experiment: Annotated[str | None, Field(description="Experiment.")] = None,
    batch_size: Annotated[int | None, Field(ge=1, description="Samples per optimiser step.")] = None,
    lora_rank: Annotated[int | None, Field(ge=1, description="LoRA rank.")] = None,
    since: Annotated[str | None, Field(description="Started at this date (ISO 8601) or later.")] = None,
    until: Annotated[str | None, Field(description="Started before this date.")] = None,
    sort: Annotated[SORTS, Field(description="Column; - is descending.")] = "-started",
    limit: Annotated[int, Field(ge=1, le=1000, description="Rows of a page.")] = 20,
    page: Annotated[int, Field(ge=1, description="Which page.")] = 1,
) -> RunsAnswer:
    """Searches the ledger of past runs."""
    equal = {"recipe": recipe, "framework": framework, "state": state, "experiment": experiment,
             "batch_size": batch_size, "lora_rank": lora_rank}  # fmt: skip
    like = {"model": model, "device": gpu}
    records, total = Ledger().search(
        {key: value for key, value in equal.items() if value is not None},
        like={key: value for key, value in like.items() if value},
        since=_date(since), until=_date(until), sort=sort, limit=limit, offset=(page - 1) * limit,
    )  # fmt: skip
    headings = ["key", "run", "model", "device", "state", "steps", "batch", "train", "peak memory", "loss"]
    table = markdown(headings, [_cells(record) for record in records])
    return RunsAnswer(
        summary=f"{table}\n\n{total} runs match; page {page} of {max(1, -(-total // limit))}."
        if records
        else "No run matches.",
        next=["show_run(key=...) shows one with its evidence", "diagnose_run(key=...) says why it ended"],
        total=total,
        runs=records,
    )


def show_run(key: Key) -> RunAnswer:
    """Shows one run with the lines of its log that its figures come from."""
    record = _find(key)
    lines = [f"{key}: {record.state}" + (f" ({record.reason})" if record.reason else "")]
    lines += [against_actual(record)] if record.predicted else []
    lines += [
        f"- {entry.of}: {Path(entry.file).name}, byte {entry.offset}: {entry.line[:160]}"
        for entry in record.evidence[:SHOWN]
    ]
    return RunAnswer(summary="\n".join(lines), run=record)


def diagnose_run(key: Key) -> DiagnosisAnswer:
    """Says why a run ended and what to change, with the evidence."""
    record = _find(key)
    advice = diagnose(record, fitting_batch(record, Ledger(), load_settings()))
    evidence = [entry for entry in record.evidence if entry.of in ("state", "oom", "steps", "loss_last")]
    lines = [f"{record.state}: {advice.cause}." if advice else "It completed, and nothing is to be mended."]
    if advice:
        lines.append(f"To change: {advice.change}.")
    lines += [f"- {Path(entry.file).name}, byte {entry.offset}: {entry.line[:200]}" for entry in evidence]
    return DiagnosisAnswer(
        summary="\n".join(lines),
        state=record.state,
        cause=advice.cause if advice else None,
        change=advice.change if advice else None,
        evidence=evidence,
    )


def calibration_report(
    limit: Annotated[int, Field(ge=1, le=1000, description="Rows of a table.")] = 50,
) -> CalibrationAnswer:
    """Says how good past predictions were: error, coverage and drift, and hours asked for against hours used."""
    report = calibration(Ledger().records())
    known = bool(report.time or report.memory)
    return CalibrationAnswer(
        summary=in_words(report, limit),
        next=[] if known else ["plan_experiment, then submit_experiment"],
        report=report.model_copy(update={"time": report.time[:limit], "memory": report.memory[:limit]}),
    )


def forget_run(
    key: Key, confirm: Annotated[bool, Field(description="Set once the user has agreed.")] = False
) -> ForgetAnswer:
    """Removes a run from the ledger; its log stays."""
    record = _find(key)
    if not confirm:
        raise ConfirmationNeeded(f"Forget {key} ({record.model or 'no model'}, {record.state})? Its log stays.")
    Ledger().forget(record.key)
    return ForgetAnswer(summary=f"{record.key} is forgotten.", key=record.key)


def export_runs(
    file: Annotated[str, Field(description="File to write, one record a line.")],
    names: Annotated[bool, Field(description="Whether to keep users, hosts and folders.")] = False,
) -> ExportAnswer:
    """Writes the ledger as JSON lines that a lab can share: without users, hosts and folders."""
    settings = load_settings()
    target = settings.allowed(file)
    records = Ledger().records()
    write_records(target, records if names else redacted(records))
    return ExportAnswer(summary=f"{len(records)} runs are in {target}.", file=str(target), runs=len(records))


def import_runs(file: Annotated[str, Field(description="File that export_runs wrote.")]) -> ExportAnswer:
    """Adds the records of such a file to the ledger; those of the same key are replaced."""
    settings = load_settings()
    source = settings.allowed(file)
    if not source.is_file():
        raise NotFoundError(f"there is no file {source}: name one that export_runs wrote")
    records = read_records(source)
    Ledger().put(records)
    return ExportAnswer(summary=f"{len(records)} runs were added from {source}.", file=str(source), runs=len(records))


def _date(text: str | None) -> str | None:
    """A date as records write it."""
    try:
        return None if text is None else datetime.fromisoformat(text).isoformat()
    except ValueError:
        raise RecordError(f"{text!r} is no date: write one as 2026-01-31 or 2026-01-31T12:00") from None


def _find(key: str) -> Record:
    if record := Ledger().get(key):
        return record
    settings = load_settings()
    path = settings.resolve(key)
    if path.is_file():
        return parse_job([settings.allowed(path)])[-1]
    raise NotFoundError(f"there is no run {key!r} and no such log: search_runs lists the runs, scan_logs reads logs")


def _expanded(text: str, settings: Settings) -> list[Path]:
    """The files and folders that a glob names; each must lie in an allowed folder or be named in chiplog.toml."""
    whole = str(settings.workspace / Path(text).expanduser())
    paths = [Path(path) for path in glob.glob(whole, recursive=True)]  # noqa: PTH207
    if text in settings.paths.logs:
        return paths
    if not paths:
        raise NotFoundError(f"nothing is called {text}: name files, folders or globs that are there")
    return [settings.allowed(path) for path in paths]


def _cells(record: Record) -> list[str]:
    usage = record.usage
    name = f"{record.experiment}/{record.run}" if record.run else Path(record.logs[0]).name if record.logs else "–"
    memory = f"{size(usage.peak_mem_bytes)} {usage.mem_kind}" if usage.peak_mem_bytes else "–"
    steps = "–" if usage.steps is None else f"{usage.steps}/{usage.steps_planned or '?'}"
    loss = "–" if usage.loss_last is None else f"{usage.loss_last:.4g}"
    model = Path(record.model).name if record.model else "–"
    batch = str(record.config.get("batch_size") or "–")
    return [
        record.key,
        name,
        model,
        usage.device or "–",
        record.state,
        steps,
        batch,
        duration(usage.train_s),
        memory,
        loss,
    ]
