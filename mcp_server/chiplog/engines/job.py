"""What every engine speaks of: jobs, and the options that a script asks for in its `#SBATCH` lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

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
    gpus: int = Field(ge=0, description="The number in --gres=gpu:[type:]N or --gpus=[type:]N.")
    time_limit_s: int | None = Field(description="--time in seconds.")


def read_options(script: Path) -> Options:
    """The options in the `#SBATCH` lines at the head of a script. Raises EngineError that names a wrong line."""
    try:
        lines = script.read_bytes().splitlines()
    except OSError as error:
        raise EngineError(f"{script} cannot be read: {error.strerror}. Set the experiment up again") from error
    if not lines or not lines[0].startswith(b"#!"):
        raise EngineError(f"{script} does not begin with #!, so it is no script: set the experiment up again")
    found: dict[str, Any] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.startswith(b"#SBATCH"):
            if line.startswith(b"#") or not line.strip():
                continue
            break  # as in Slurm, options after the first command do not count
        try:
            words = iter(shlex.split(line.decode().removeprefix("#SBATCH")))
            for word in words:
                key, equals, value = word.partition("=")
                if key in READ:
                    found[key] = READ[key](value if equals else next(words, ""))
        except (ValueError, EngineError) as error:
            raise EngineError(f"{script}, line {number}: {error}. Mend that line") from error
    return Options(
        job_name=found.get("--job-name", script.stem),
        output=found.get("--output", "slurm-%j.out"),
        cpus=found.get("--cpus-per-task", 1),
        gpus=found.get("--gres", found.get("--gpus", 0)),
        time_limit_s=found.get("--time") or None,  # as in Slurm, 0 is no limit
    )


def _text(value: str) -> str:
    if not value or "\0" in value:
        raise EngineError(f"{value!r} is no name of a job or of a file")
    return value


def _cpus(value: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", value):
        raise EngineError(f"--cpus-per-task={value} is no number of CPUs: write 1 or more")
    return int(value)


def _gpus(value: str) -> int:
    match = re.fullmatch(r"gpu(?::[^:]+)?:(\d{1,6})", value)
    if not match:
        raise EngineError(f"{value} is no number of GPUs: write --gres=gpu:N or --gres=gpu:TYPE:N")
    return int(match.group(1))


def seconds(clock: str) -> int:
    """Slurm's time formats (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds. Raises EngineError."""
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", clock)
    if not match:
        raise EngineError(f"--time={clock} is no time: write D-HH:MM:SS, HH:MM:SS or minutes")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match.group(1) is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if match.group(4) is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


# What is read here; a cluster's other options mean nothing on this machine.
READ: dict[str, Callable[[str], Any]] = {
    "--job-name": _text,
    "--output": _text,
    "--cpus-per-task": _cpus,
    "--gres": _gpus,
    "--gpus": lambda value: _gpus(f"gpu:{value}"),
    "--time": seconds,
}
