"""The studies: what each asks, its plans, and its own commands, which run as child processes that print JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from chiplog.bundle import study_folder, study_names
from chiplog.errors import NotFoundError, StudyError
from chiplog.schema import Frozen, plain_errors
from chiplog.summary import Analysis

COMMAND_LIMIT_S = 3600


class Study(Frozen):
    """One folder under tasks/."""

    name: str = Field(description="Name of the folder.")
    about: str = Field(description="First paragraph of its README.")
    plans: dict[str, str] = Field(description="Names of its plans and the question of each.")
    makes_data: bool = Field(description="Whether create_dataset can make its data.")


def list_studies() -> list[Study]:
    """All studies, by the folders that are there."""
    return [_study(name) for name in study_names()]


def study_plan(study: str, plan: str) -> dict[str, Any]:
    """The named plan of a study, as plain values. Raises NotFoundError with the plans that are there."""
    plans = _plans(study_folder(study))
    if plan not in plans:
        raise NotFoundError(f"the study {study} has no plan {plan!r}: it has {', '.join(plans) or 'none'}")
    return plans[plan]


def check_options(options: Mapping[str, Any]) -> None:
    """Raises StudyError for an option that is no plain name, or that chiplog gives itself."""
    for key in options:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key) or "out".startswith(key):
            raise StudyError(f"{key!r} is no option of a generator: use lower-case words such as words_len")


def run_command(study: str, file: str, options: Mapping[str, Any], *positional: str) -> Any:
    """What the study's own command prints, as JSON.

    Raises StudyError with the command's last words, NotFoundError if the study has no such command.
    """
    script = study_folder(study) / file
    if not script.is_file():
        raise NotFoundError(f"the study {study} has no {file}: it cannot do that")
    command = [sys.executable, str(script), *positional]
    for key, value in options.items():
        flag = key.replace("_", "-")
        command += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise StudyError(f"{script.name} of {study} took over {COMMAND_LIMIT_S} s and was ended") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:] or [f"exit status {done.returncode}"]
        raise StudyError(f"{script.name} of {study} failed: " + "\n".join(last))
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise StudyError(f"{script.name} of {study} did not print JSON but {done.stdout[:200]!r}") from error


def analysis(study: str | None, experiment: Path) -> Analysis | None:
    """What the study's analyze.py says of an experiment's folder; null without a study, or for one that has none.

    Raises StudyError where it fails.
    """
    if study is None or study not in study_names() or not (study_folder(study) / "analyze.py").is_file():
        return None
    said = run_command(study, "analyze.py", {}, str(experiment))
    try:
        return Analysis.model_validate(said)
    except ValidationError as error:
        raise StudyError(f"analyze.py of {study} printed what is no analysis: {plain_errors(error)}") from error


def _study(name: str) -> Study:
    folder = study_folder(name)
    paragraphs = (folder / "README.md").read_text(encoding="utf-8").split("\n\n")
    about = next((p for p in paragraphs if p.strip() and not p.startswith("#")), "")
    plans = {key: plan.get("question", "") for key, plan in _plans(folder).items()}
    return Study(name=name, about=" ".join(about.split()), plans=plans, makes_data=(folder / "data.py").is_file())


def _plans(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "experiments.yaml"
    if not file.is_file():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise StudyError(f"{file} is not YAML: {error}. Mend that line.") from error
