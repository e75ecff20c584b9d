"""An experiment folder as it stands on disk: its plan, its runs, and which jobs were submitted for them."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from chiplog.errors import NotFoundError, RecordError, RenderError
from chiplog.files import write_atomic
from chiplog.plan import Plan, Run, expand, read_plan
from chiplog.recipes import defaults
from chiplog.record import Prediction
from chiplog.schema import Frozen
from chiplog.settings import Settings


class Submission(Frozen):
    """One job that was submitted for a run."""

    run: str = Field(description="Name of the run.")
    engine: str = Field(description="Engine that has the job.")
    job_id: str = Field(description="Id that the engine gave it.")
    attempt: int = Field(ge=1, description="Which attempt at the run, from 1.")
    predicted: Prediction | None = Field(default=None, description="What was foretold at submission.")

    @property
    def key(self) -> str:
        return f"{self.engine}:{self.job_id}"


class ExperimentFolder:
    """One plan's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def plan(self) -> Plan:
        """The plan. Raises NotFoundError if the folder holds none."""
        if not (self.path / "plan.yaml").is_file():
            raise NotFoundError(f"{self.path} holds no plan.yaml: plan an experiment there, or name another folder")
        return read_plan(self.path / "plan.yaml")

    @property
    def is_set_up(self) -> bool:
        """Whether the folder carries the code of its runs."""
        return (self.path / "code" / "recipes").is_dir()

    def runs(self) -> list[Run]:
        """The runs, as the copy of the recipes in `code/` expands them: a later change of the repo changes nothing.

        Raises RenderError if the folder was not set up, or not to the end.
        """
        plan = self.plan
        if not self.is_set_up:
            raise RenderError(f"{self.path} is not set up: call setup_experiment_dirs on it first")
        runs = expand(plan, lambda name: defaults(name, self.path / "code" / "recipes"))
        if missing := [run.name for run in runs if not (self.path / "runs" / run.name / "run.sbatch").is_file()]:
            raise RenderError(f"{self.path} has no job for {', '.join(missing)}: set it up again, it was interrupted")
        return runs

    def submissions(self) -> list[Submission]:
        """Every job that was submitted, oldest first. Raises RecordError for a line that cannot be read."""
        file = self.path / "jobs.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        try:
            return [Submission.model_validate_json(line) for line in lines]
        except ValidationError as error:
            raise RecordError(f"{file} has a line that is no submission: remove that line. {error}") from error

    def add(self, submissions: Sequence[Submission]) -> None:
        """Notes jobs that the engine has taken: all of them or none."""
        lines = [submission.model_dump_json() + "\n" for submission in (*self.submissions(), *submissions)]
        write_atomic(self.path / "jobs.jsonl", "".join(lines).encode())

    def refuse_change(self, files: Mapping[str, bytes]) -> None:
        """Raises RenderError if jobs were submitted and what they read would change under them."""
        if not self.submissions():
            return
        changed = [name for name, content in files.items() if _content(self.path / name) not in (None, content)]
        if changed:
            raise RenderError(
                f"{self.path} has jobs, and {', '.join(changed[:3])} would change under them and their results: "
                "plan it under another name"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps two commands from submitting the same runs at once."""
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def find_experiment(name: str, settings: Settings) -> ExperimentFolder:
    """The experiment of that name or path; the name may leave its date out if that is unique.

    Raises NotFoundError with what is there.
    """
    by_path = settings.resolve(name)
    if (by_path / "plan.yaml").is_file():
        return ExperimentFolder(settings.allowed(by_path))
    there = sorted(file.parent.name for file in settings.experiments.glob("*/plan.yaml"))
    found = [folder for folder in there if name in (folder, re.sub(r"^\d{4}-\d\d-\d\d-", "", folder))]
    if len(found) == 1:
        return ExperimentFolder(settings.allowed(settings.experiments / found[0]))
    words = f"more than one experiment is called {name!r}: {', '.join(found)}" if found else f"no experiment {name!r}"
    listed = f"there are: {', '.join(there[-20:])}" if there else "there is none yet: plan one with plan_experiment"
    raise NotFoundError(f"{words} under {settings.experiments}; {listed}")
