"""An experiment folder as it stands on disk: its plan, its runs, and which jobs were submitted for them."""

from __future__ import annotations

import errno
import fcntl
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from chiplog.errors import NotFoundError, RecordError, RenderError
from chiplog.expand import expand
from chiplog.files import write_atomic
from chiplog.plan import NAME, Plan, Run, read_plan
from chiplog.recipes import manual
from chiplog.record import Prediction, read_lines, write_lines
from chiplog.schema import Frozen
from chiplog.settings import Settings

CLOSING = "closing.json"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # as of Lustre without -o flock, or NFS without its daemon
JOB_ID = r"^[0-9]{1,18}(_[0-9]{1,9})?$"


class Closing(Frozen):
    """How the last submission ends: its last job submits the runs that found no room, and summarises."""

    engine: str = Field(description="Engine that has the job.")
    job_id: str = Field(pattern=JOB_ID, description="Its id.")
    runs: list[str] = Field(description="Runs that wait for room in the queue.")
    folder: str | None = Field(default=None, description="The experiment's folder; null: of before this was noted.")


class Submission(Frozen):
    """What was submitted for a run: its training and its evaluation, or one of both."""

    run: str = Field(pattern=f"^{NAME.pattern}$", description="Name of the run.")
    engine: str = Field(description="Engine that has the job.")
    job_id: str = Field(pattern=JOB_ID, description="Id that the engine gave it.")
    eval_job_id: str | None = Field(
        default=None,
        pattern=JOB_ID,
        description="Id of the job that evaluates what it trained; null: there is none beside it.",
    )
    folder: str | None = Field(default=None, description="The experiment's folder; null: of before this was noted.")
    attempt: int = Field(ge=1, description="Which attempt at the run, from 1.")
    predicted: Prediction | None = Field(default=None, description="What was foretold at submission.")
    cancelled: bool = Field(default=False, description="Whether its jobs were asked to end.")

    @property
    def key(self) -> str:
        return f"{self.engine}:{self.job_id}"

    @property
    def job_ids(self) -> list[str]:
        """Its jobs, in the order in which they run."""
        return [self.job_id, *([self.eval_job_id] if self.eval_job_id else [])]


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
        """Whether the folder carries the code of its runs: the manual of a recipe at least."""
        return any((self.path / "code").glob("*/*.yaml"))

    def place_of(self, recipe: str) -> str:
        """The folder under `code/` that carries a recipe, or should."""
        own, trainer = (self.path / "code" / place / f"{recipe}.py" for place in ("recipes", "trainer"))
        return "trainer" if trainer.is_file() and not own.is_file() else "recipes"

    def runs(self) -> list[Run]:
        """The runs, as the copy of the recipes in `code/` expands them: a later change of the repo changes nothing.

        Where that copy is gone though jobs were submitted, a setting that the plan does not name is null, since its
        default is not known any more. Raises RenderError if the folder was not set up.
        """
        plan = self.plan
        if self.is_set_up:
            return expand(plan, lambda name: manual(name, self.path / "code" / "recipes"))
        if not self.submissions():
            raise RenderError(f"{self.path} is not set up: call setup_experiment_dirs on it first")
        return [_with_what_is_named(run, plan) for run in expand(plan, manual)]

    def submissions(self) -> list[Submission]:
        """Every job that was submitted, oldest first, as `read_lines` reads them; in a copy, none of the original."""
        there = read_lines(self.path / "jobs.jsonl", Submission)
        others = {name for name in {one.folder for one in there} if name and self._is_copy_of(Path(name))}
        return [one for one in there if one.folder not in others]

    def cancelled(self, keys: Collection[str]) -> None:
        """Notes that what was submitted under these keys was asked to end."""
        lines = [one.model_copy(update={"cancelled": True}) if one.key in keys else one for one in self.submissions()]
        write_lines(self.path / "jobs.jsonl", lines)

    def add(self, submissions: Sequence[Submission]) -> None:
        """Notes jobs that the engine has taken: all of them or none."""
        write_lines(self.path / "jobs.jsonl", [*self.submissions(), *submissions])

    def closing(self) -> Closing | None:
        """How the last submission ends; null for one that has no last job."""
        try:
            closing = Closing.model_validate_json((self.path / CLOSING).read_bytes())
            return None if closing.folder and self._is_copy_of(Path(closing.folder)) else closing
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise RecordError(f"{self.path / CLOSING} cannot be read ({error}): remove it and submit again") from error

    def close(self, closing: Closing | None) -> None:
        """Notes how the last submission ends."""
        if closing:
            write_atomic(self.path / CLOSING, closing.model_dump_json().encode() + b"\n")
        else:
            (self.path / CLOSING).unlink(missing_ok=True)

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

    def _is_copy_of(self, other: Path) -> bool:
        """Whether the folder that submitted is another one, which still stands: the jobs are its own."""
        return (other / "jobs.jsonl").is_file() and not other.samefile(self.path)

    @contextmanager
    def locked(self, *, needed: bool = True) -> Iterator[None]:
        """Keeps two commands from submitting the same runs at once, but on a file system that has no locks.

        If it is not `needed`, a full disk does no harm.
        """
        with ExitStack() as held:
            try:
                fcntl.flock(held.enter_context((self.path / ".lock").open("a")), fcntl.LOCK_EX)
            except OSError as error:
                if needed and error.errno not in NO_LOCKS:
                    raise
            yield


def _with_what_is_named(run: Run, plan: Plan) -> Run:
    """The run without the settings that are a recipe's defaults: they are null."""
    named = {
        key for one in plan.experiments for settings in (one.controls, one.variables, *one.runs) for key in settings
    }
    named |= {"model", "dataset", "seed"}
    return run.model_copy(update={"config": {k: v if k in named else None for k, v in run.config.items()}})


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def find_experiment(name: str, settings: Settings) -> ExperimentFolder:
    """The experiment of that name or path; the name may leave its date out if that is unique.

    Raises NotFoundError with what is there.
    """
    try:
        by_path = settings.resolve(name)
        if (by_path / "plan.yaml").is_file():
            return ExperimentFolder(settings.allowed(by_path))
    except OSError as error:
        raise NotFoundError(
            f"{name!r:.80} cannot be looked for: {error.strerror}. Give the experiment's name"
        ) from error
    there = sorted(file.parent.name for file in settings.experiments.glob("*/plan.yaml"))
    found = [folder for folder in there if name in (folder, re.sub(r"^\d{4}-\d\d-\d\d-", "", folder))]
    if len(found) == 1:
        return ExperimentFolder(settings.allowed(settings.experiments / found[0]))
    words = f"more than one experiment is called {name!r}: {', '.join(found)}" if found else f"no experiment {name!r}"
    listed = f"there are: {', '.join(there[-20:])}" if there else "there is none yet: plan one with plan_experiment"
    raise NotFoundError(f"{words} under {settings.experiments}; {listed}")
