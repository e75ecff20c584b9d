"""The workspace and its `chiplog.toml`: which folders may be touched, and what the cluster offers.

The workspace is `$CHIPLOG_WORKSPACE`, else the nearest folder upwards that holds a `chiplog.toml` or is a checkout
of this project, else the current folder. Its settings beat the user's, key by key.
"""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from chiplog.errors import NotFoundError, OutsideRootsError, SettingsError
from chiplog.schema import Frozen, plain_errors

FILE_NAME = "chiplog.toml"

# Both end up in shell scripts: an option is one plain word, a set-up line is one line.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:,=+@/&|()\[\]*-]+$")]
Line = Annotated[str, Field(pattern=r"^[^\r\n\x00]*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _followed(path: str | Path, start: Path = Path()) -> Path:
    """`path` made absolute, from `start`, with `~` and links followed. Raises ValueError if it cannot be."""
    try:
        return (start / Path(path).expanduser()).resolve()
    except (RuntimeError, OSError) as error:  # no such user; links that lead in a circle
        raise ValueError(str(error)) from error


def _is_path(text: str) -> str:
    _followed(text)
    return text


Location = Annotated[str, AfterValidator(_is_path)]


class Paths(Frozen):
    """Where things are; relative paths start at the workspace."""

    models: list[Location] = Field(default=["models"], description="Folders that hold model folders.")
    datasets: list[Location] = Field(default=["data", "tasks"], description="Folders that hold data sets.")
    experiments: Location = Field(default="experiments", description="Folder that experiment folders are written to.")
    logs: list[Location] = Field(default=[], description="Globs of past logs to scan.")


class Slurm(Frozen):
    """How to ask this cluster for a job."""

    account: Word | None = Field(default=None, description="Account to charge.")
    partition: Word | None = Field(default=None, description="Partition for jobs whose GPU names none.")
    cpu_partition: Word | None = Field(default=None, description="Partition for jobs without a GPU; null: partition.")
    qos: Word | None = Field(default=None, description="Quality of service.")
    reservation: Word | None = Field(default=None, description="Reservation.")
    modules: list[Word] = Field(default=[], description="Modules to load, before the set-up lines.")
    setup: list[Line] = Field(default=[], description="Shell lines that make the environment, run on the cluster only.")
    stagger_s: int = Field(
        default=0, ge=0, description="Seconds between the starts of an array's jobs, where they share a cache."
    )
    environment: dict[Name, Line] = Field(
        default={}, description="Variables of every job, such as NCCL_SOCKET_IFNAME; set after the set-up lines."
    )
    max_submit: int | None = Field(
        default=None, ge=1, description="Jobs that may stand in the queue at once; null: as many as Slurm allows."
    )

    def partitions(self, gpus: Sequence[Gpu]) -> list[str]:
        """Every partition that is named, each once."""
        named = [*(gpu.partition for gpu in gpus), self.partition, self.cpu_partition]
        return list(dict.fromkeys(name for name in named if name))

    @property
    def setup_lines(self) -> list[str]:
        """What makes the environment: the modules, then the set-up lines, then the variables."""
        variables = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [*(f"module load {name}" for name in self.modules), *self.setup, *variables]


class Gpu(Frozen):
    """One kind of GPU that can be asked for."""

    name: Word = Field(description="Name, such as a100-80gb.")
    partition: Word | None = Field(default=None, description="Slurm partition that has it.")
    gres: Annotated[str, Field(pattern=r"^gpu(:[A-Za-z0-9_.-]+)?(:\d+)?$")] | None = Field(
        default=None, description="Slurm generic resource, such as gpu:a100:1."
    )
    constraint: Word | None = Field(default=None, description="Slurm feature to ask for.")
    card: Word | None = Field(default=None, description="Card in the catalogue, where `name` is none of its names.")
    count: int | None = Field(default=None, ge=1, description="How many there are; null: not said.")
    price_per_hour: float | None = Field(default=None, ge=0, description="Price of an hour of one, in your currency.")


class Budget(Frozen):
    """What a plan may use."""

    gpu_hours: float | None = Field(default=None, gt=0, description="GPU hours in one plan.")
    cost: float | None = Field(default=None, gt=0, description="Price of one plan, as price_per_hour counts it.")
    jobs_at_once: int | None = Field(
        default=None, ge=1, description="Jobs of an experiment that run at once; null: any."
    )


class Settings(Frozen):
    """Everything in `chiplog.toml`, and the workspace it belongs to."""

    workspace: Path = Field(description="The folder that relative paths start at.")
    paths: Paths = Field(default=Paths(), description="Where things are.")
    slurm: Slurm | None = Field(default=None, description="The cluster; null: jobs run on this machine.")
    gpus: list[Gpu] = Field(default=[], description="The kinds of GPU that can be asked for.")
    budget: Budget = Field(default=Budget(), description="What a plan may use.")

    @property
    def experiments(self) -> Path:
        return self.resolve(self.paths.experiments)

    @property
    def model_roots(self) -> list[Path]:
        return [self.resolve(p) for p in self.paths.models]

    @property
    def dataset_roots(self) -> list[Path]:
        return [self.resolve(p) for p in self.paths.datasets]

    def resolve(self, path: str | Path) -> Path:
        """The absolute path, from the workspace, with `~` and links followed.

        Raises NotFoundError for a text that no path can be.
        """
        try:
            return _followed(path, self.workspace)
        except ValueError as error:
            raise NotFoundError(f"{str(path)!r:.80} is no path ({error}): give the path or the name") from error

    def allowed(self, path: str | Path) -> Path:
        """`path` made absolute, if it lies in the workspace or in a folder of `[paths]`.

        Raises OutsideRootsError otherwise; links are followed first, so that none leads out.
        """
        resolved = self.resolve(path)
        roots = [self.workspace.resolve(), self.experiments, *self.model_roots, *self.dataset_roots]
        if any(resolved.is_relative_to(root) for root in roots):
            return resolved
        listed = "\n".join(f"  {root}" for root in dict.fromkeys(roots))
        raise OutsideRootsError(
            f"{resolved} is outside the folders that chiplog may touch:\n{listed}\n"
            f"Move it under one of them, or add its folder to [paths] in {self.workspace / FILE_NAME}."
        )


def find_workspace(start: Path | None = None) -> Path:
    """The workspace that `start` (by default the current folder) belongs to."""
    if start is None and (named := os.environ.get("CHIPLOG_WORKSPACE")):
        return _folder_of("CHIPLOG_WORKSPACE", named)
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / FILE_NAME).is_file() or (folder / "mcp_server" / "chiplog").is_dir():
            return folder
    return start


def load_settings(start: Path | None = None) -> Settings:
    """Reads the user's and the workspace's `chiplog.toml`; both may be absent.

    Raises SettingsError that names the file and the key.
    """
    workspace = find_workspace(start)
    if not workspace.is_dir():
        raise SettingsError(
            f"the workspace {workspace} is not a folder: make it, or set CHIPLOG_WORKSPACE to one that is"
        )
    user_config = _folder_of("XDG_CONFIG_HOME", os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    merged: dict[str, Any] = {}
    for file in (user_config / "chiplog" / "config.toml", workspace / FILE_NAME):
        if not file.exists():
            continue
        read = _read(file)
        _validate(read, workspace, file)
        merged = _merge(merged, read)
    return _validate(merged, workspace, workspace / FILE_NAME)


def _folder_of(variable: str, value: str) -> Path:
    try:
        return _followed(value)
    except ValueError as error:
        raise SettingsError(f"{value} is no folder ({error}): set {variable} to one that is there") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not TOML: {error}. Mend that line.") from error
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}. Mend its permissions.") from error


def _validate(values: dict[str, Any], workspace: Path, file: Path) -> Settings:
    if "workspace" in values:
        raise SettingsError(f"{file}: there is no setting workspace, it is the folder of that file: remove the line")
    try:
        settings = Settings.model_validate({**values, "workspace": workspace})
    except ValidationError as error:
        raise SettingsError(
            f"{file} is wrong:\n{plain_errors(error)}\nMend it there; `chiplog init` checks it."
        ) from error
    if settings.experiments.exists() and not settings.experiments.is_dir():
        raise SettingsError(f"{file}: experiments is {settings.experiments}, which is no folder: name one")
    names = [gpu.name for gpu in settings.gpus]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"{file} has two [[gpus]] called {twice[0]!r}: give each its own name")
    return settings


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_tables else value
    return merged
