"""What every engine speaks of: jobs, and the options that a script asks for in its `#SBATCH` lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import Field

from chiplog.errors import EngineError
from chiplog.record import State
from chiplog.schema import Frozen


class Job(Frozen):
    """One job as its engine sees it."""

    id: str = Field(description="Id that the engine gave it.")
    name: str = Field(description="Name of the job.")
    state: State = Field(description="How it stands.")
    reason: str | None = Field(default=None, description="Why, in words.")
    exit_code: int | None = Field(default=None, description="Exit status, once it has ended.")
    restarts: int = Field(default=0, description="How often it was requeued.")
    submitted: str = Field(description="ISO 8601, UTC.")
    started: str | None = Field(default=None, description="ISO 8601, UTC.")
    ended: str | None = Field(default=None, description="ISO 8601, UTC.")
    log: Path = Field(description="File that its output goes to.")


class Engine(Protocol):
    """Submits scripts, and says how the jobs stand."""

    name: str

    def submit(self, scripts: Sequence[Path]) -> list[Job]:
        """Queues each script, to run in its own folder. All are queued or none."""
        ...

    def jobs(self, ids: Sequence[str]) -> list[Job]:
        """The jobs of these ids, in their order, without those that are unknown."""
        ...

    def cancel(self, ids: Sequence[str]) -> list[Job]:
        """Ends those that have not ended."""
        ...


class Options(Frozen):
    """What a script asks for."""

    job_name: str = Field(description="--job-name.")
    output: str = Field(description="--output, with %j and %x.")
    cpus: int = Field(ge=1, description="--cpus-per-task.")
    gpus: int = Field(ge=0, description="The number in --gres=gpu:[type:]N.")
    time_limit_s: int | None = Field(description="--time in seconds.")


def read_options(script: Path) -> Options:
    """The options in the `#SBATCH` lines at the head of a script. Raises EngineError if one is wrong."""
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EngineError(f"{script} cannot be read: {error.strerror}. Set the experiment up again") from error
    found: dict[str, str] = {}
    for line in lines[1:]:
        if not line.startswith("#SBATCH"):
            if line.startswith("#") or not line.strip():
                continue
            break  # as in Slurm, options after the first command do not count
        for word in shlex.split(line.removeprefix("#SBATCH")):
            key, _, value = word.partition("=")
            found[key] = value
    gres = re.fullmatch(r"gpu(?::[^:]+)?:(\d+)", found.get("--gres", "gpu:0"))
    if not gres:
        raise EngineError(f"{script}: --gres={found['--gres']} is not gpu:N or gpu:TYPE:N")
    return Options(
        job_name=found.get("--job-name", script.stem),
        output=found.get("--output", "slurm-%j.out"),
        cpus=int(found.get("--cpus-per-task", "1")),
        gpus=int(gres.group(1)),
        time_limit_s=seconds(found["--time"]) if "--time" in found else None,
    )


def seconds(clock: str) -> int:
    """Slurm's time formats (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds. Raises EngineError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", clock)
    if not match:
        raise EngineError(f"--time={clock} is no time: write D-HH:MM:SS, HH:MM:SS or minutes")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match.group(1) is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if match.group(4) is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second
