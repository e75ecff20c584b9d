"""Tools over what a plan starts from: studies, data sets, models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from chiplog import planning
from chiplog import studies as study_commands
from chiplog.answers import (
    CreatedAnswer,
    DatasetAnswer,
    ModelAnswer,
    StudiesAnswer,
)
from chiplog.bundle import study_folder
from chiplog.checks import Check, Report
from chiplog.checks.dataset import check_dataset as inspect_dataset
from chiplog.checks.lookup import resolve_model
from chiplog.checks.model import check_model as inspect_model
from chiplog.checks.tokens import check_tokens, is_token_folder
from chiplog.plan import Value
from chiplog.schema import Progress
from chiplog.settings import load_settings


def list_studies() -> StudiesAnswer:
    """Lists the studies that come with chiplog or stand in the workspace's tasks/, with their plans."""
    found = study_commands.list_studies()
    lines = [f"{study.name}: {study.about} Plans: {', '.join(study.plans) or 'none'}." for study in found]
    return StudiesAnswer(
        summary="\n".join(lines) or "There is no study: plan with your own model and data.",
        next=["plan_experiment(study=..., plan=...) plans one of them"],
        studies=found,
    )


def check_dataset(
    path: Annotated[str, Field(description="File or folder of the data set, or its name under the data folders.")],
    model: Annotated[str | None, Field(description="Model whose tokenizer counts the tokens.")] = None,
    system_prompt: Annotated[str | None, Field(description="What is put before every sample.")] = None,
    prompt: Annotated[str, Field(description="What the user says; {input} is the sample's input.")] = "{input}",
    progress: Progress | None = None,
) -> DatasetAnswer:
    """Checks a data set: splits, rows, shape, empty and duplicate rows, leaks between splits, token counts.

    Of a folder of token files, which trainings read: that each is whole and within the vocabulary.
    """
    settings = load_settings()
    file = planning.find_dataset(path, settings)
    if is_token_folder(file):
        found = check_tokens(file, progress)
        counts = ", ".join(f"{name} {n:,} tokens" for name, n in found.tokens.items()) or "no split"
        head = f"{file.name} is {'usable for trainings' if found.ok else 'not usable as it is'}: {counts}"
        head += f", of a vocabulary of {found.vocab_size:,}." if found.vocab_size else "."
        return DatasetAnswer(summary=_with_checks(head, found), ok=found.ok, report=found)
    tokenizer = settings.allowed(resolve_model(model, settings.model_roots, settings.workspace)) if model else None
    report = inspect_dataset(file, model=tokenizer, system_prompt=system_prompt, prompt=prompt, progress=progress)
    splits = ", ".join(
        f"{name} {split.rows} rows" + (f" and {split.tokens.in_words} tokens" if split.tokens else "")
        for name, split in report.splits.items()
    )
    head = f"{file.name} is {'usable' if report.ok else 'not usable as it is'}: {splits or 'no split'}."
    return DatasetAnswer(summary=_with_checks(head, report), ok=report.ok, report=report)


def check_model(
    name: Annotated[str, Field(description="Folder of the model, or its name under the model folders.")],
    needs_chat: Annotated[bool, Field(description="Whether its chat template is needed.")] = True,
) -> ModelAnswer:
    """Checks a model folder: configuration, every weight file whole, tokenizer, chat template, parameter count."""
    settings = load_settings()
    folder = settings.allowed(resolve_model(name, settings.model_roots, settings.workspace))
    report = inspect_model(folder, needs_chat=needs_chat)
    params = f"{report.n_params:,} parameters" if report.n_params else "parameters not counted"
    head = f"{folder.name} is {'usable' if report.ok else 'not usable as it is'}: {report.model_type}, {params}."
    return ModelAnswer(summary=_with_checks(head, report), ok=report.ok, report=report)


def create_dataset(
    study: Annotated[str, Field(description="Study whose generator makes the data.")],
    options: Annotated[
        dict[str, Value] | None,
        Field(description="Options of the generator, such as words_len: 5; null: its defaults."),
    ] = None,
) -> CreatedAnswer:
    """Makes a study's data set from a seed: the same options give the same bytes."""
    settings, options = load_settings(), options or {}
    study_commands.check_options(options)
    study_folder(study)  # so that its name is a folder under tasks/ and nothing else
    out = settings.allowed(settings.workspace / "tasks" / study / "input")
    made = study_commands.run_command(study, "data.py", {**options, "out": str(out)})
    rows = ", ".join(f"{name} {count:,}" for name, count in made["rows"].items())
    return CreatedAnswer(
        summary=f"{made['path']}: {rows} {made.get('unit', 'rows')}, sha256 {made['sha256'][:12]}.",
        next=["check_dataset looks at it", "plan_experiment plans with it"],
        path=made["path"],
        rows=made["rows"],
        sha256=made["sha256"],
    )


def _with_checks(head: str, report: Report) -> str:
    return "\n".join([head, *(f"{check.level}: {check_words(check)}" for check in report.problems)])


def check_words(check: Check) -> str:
    """A check in a line: what was found and what to do."""
    return f"{check.subject}: {check.found}. {check.mend}"
