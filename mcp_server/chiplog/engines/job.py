"""What every engine speaks of: jobs, and the options that a script asks for in its `#SBATCH` lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from chiplog.errors import EngineError
from chiplog.record import State
from chiplog.schema import Frozen

HELD = "held: a submission goes on, or was interrupted; then submit the experiment again"


class Job(Frozen):
    """One job as its engine sees it."""

    id: str = Field(description="Id that the engine gave it.")
    name: str = Field(description="Name of the job.")
    state: State = Field(description="How it stands.")
    reason: str | None = Field(default=None, description="Why, in words.")
    exit_code: int | None = Field(default=None, description="Exit status, once it has ended.")
    restarts: int = Field(default=0, description="How often it was requeued.")
    submitted: str | None = Field(description="ISO 8601, UTC; null where the engine does not say.")
    started: str | None = Field(default=None, description="ISO 8601, UTC.")
    ended: str | None = Field(default=None, description="ISO 8601, UTC.")
    log: Path = Field(description="File that its output goes to.")
    part: Literal["run", "evaluation"] = Field(default="run", description="What of a run it speaks of.")
    ran_s: float | None = Field(default=None, description="Seconds that it ran so far, all turns; null: not started.")
    attempt_s: float | None = Field(default=None, description="Seconds of its last turn in the queue.")


def followed(first: Job, then: Job | None) -> Job:
    """A run whose training is one job and whose evaluation is the next, as one: it stands as the part that it is at."""
    if then is None or first.state is not State.COMPLETED:
        return first
    return then.model_copy(
        update={
            "id": first.id,
            "name": first.name,
            "part": "evaluation",
            "submitted": first.submitted,
            "started": first.started,
            "restarts": first.restarts + then.restarts,
            "ran_s": (first.ran_s or 0.0) + (then.ran_s or 0.0),
            "log": first.log if then.state is State.COMPLETED else then.log,
        }
    )


def withdrawn(number: str, name: str) -> Job:
    """A job that was cancelled while it waited, and that its engine has forgotten."""
    reason = "cancelled before it started"
    return Job(
        id=number, name=name, state=State.CANCELLED, reason=reason, submitted=None, log=Path(f"slurm-{number}.out")
    )


class After(Frozen):
    """What a batch waits for, in Slurm's words."""

    kind: Literal["afterok", "afterany", "aftercorr"] = Field(
        description="afterok: all of it ended well; aftercorr: of an array, the element of the same index did; "
        "afterany: all of it ended."
    )
    batch: int = Field(ge=0, description="Which batch of the same submission, from 0.")


class Batch(Frozen):
    """Jobs that are submitted together: a script that runs once, or once for each index of an array."""

    script: Path = Field(description="The script.")
    folder: Path = Field(description="Where it is submitted and runs; paths in its options start there.")
    indices: tuple[int, ...] = Field(default=(), description="Elements of the array; none: a single job.")
    after: tuple[After, ...] = Field(default=(), description="What it waits for; if that cannot come, it never runs.")

    def __len__(self) -> int:
        return len(self.indices) or 1


class Queue(Frozen):
    """What an engine's queue takes."""

    room: int | None = Field(description="Jobs that may be submitted now; null: no limit is known.")
    most: int | None = Field(default=None, description="Jobs that may stand in it at once; null: no limit is known.")
    longest_array: int | None = Field(default=None, description="Jobs that an array may have; null: no limit.")


class Engine(Protocol):
    """Submits scripts, and says how the jobs stand.

    A submission is held: none of its jobs runs before they are on record and released. Whoever dies between leaves
    jobs that never run, which the next submission finds by their tag and ends.
    """

    name: str
    poll_s: float  # seconds between two looks at its jobs
    closes: bool  # whether a submission ends in a job that submits what waits for room, and summarises

    def held(self, tag: str) -> list[str]:
        """The jobs of that tag that are still held."""
        ...

    def queue(self) -> Queue:
        """What the queue takes."""
        ...

    def submit(self, batches: Sequence[Batch], tag: str, at_once: int | None = None) -> list[list[str]]:
        """Queues each batch, held; the ids of its jobs, in the order of its indices. All are queued or none.

        No more than `at_once` jobs of all the batches run at the same time; null: as many as there is room for.
        """
        ...

    def soonest(self, script: Path, partitions: Sequence[str]) -> dict[str, str]:
        """When a job of this script might start in each partition, where the engine can say."""
        ...

    def release(self, ids: Sequence[str]) -> None:
        """Lets held jobs run."""
        ...

    def jobs(self, ids: Sequence[str]) -> list[Job]:
        """The jobs of these ids, in their order, without those that are unknown."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """Ends those that have not ended."""
        ...


class Options(Frozen):
    """What a script asks for."""

    job_name: str = Field(description="--job-name.")
    output: str = Field(description="--output, with %j, %x and, of an array, %A and %a.")
    nodes: int = Field(default=1, ge=1, description="--nodes.")
    tasks: int = Field(default=1, ge=1, description="--ntasks.")
    cpus: int = Field(ge=1, description="--cpus-per-task.")
    gpus: int = Field(ge=0, description="The number in --gres=gpu:[type:]N or --gpus=[type:]N.")
    time_limit_s: int | None = Field(description="--time in seconds.")
    signal_s: int | None = Field(description="Seconds before the time limit at which the script gets SIGUSR1.")


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
        nodes=found.get("--nodes", 1),
        tasks=found.get("--ntasks", 1),
        cpus=found.get("--cpus-per-task", 1),
        gpus=found.get("--gres", found.get("--gpus", 0)),
        time_limit_s=found.get("--time") or None,  # as in Slurm, 0 is no limit
        signal_s=found.get("--signal"),
    )


def _text(value: str) -> str:
    if not value or "\0" in value:
        raise EngineError(f"{value!r} is no name of a job or of a file")
    return value


def _count(option: str, of: str) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not re.fullmatch(r"[1-9]\d{0,5}", value):
            raise EngineError(f"{option}={value} is no number of {of}: write 1 or more")
        return int(value)

    return read


def _gpus(value: str) -> int:
    match = re.fullmatch(r"gpu(?::[^:]+)?:(\d{1,6})", value)
    if not match:
        raise EngineError(f"{value} is no number of GPUs: write --gres=gpu:N or --gres=gpu:TYPE:N")
    return int(match.group(1))


def _signal(value: str) -> int:
    match = re.fullmatch(r"B:(?:SIG)?USR1@(\d{1,5})", value)
    if not match:
        raise EngineError(f"--signal={value} is none that this machine can send: write --signal=B:USR1@SECONDS")
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
    "--nodes": _count("--nodes", "nodes"),
    "--ntasks": _count("--ntasks", "tasks"),
    "--cpus-per-task": _count("--cpus-per-task", "CPUs"),
    "--gres": _gpus,
    "--gpus": lambda value: _gpus(f"gpu:{value}"),
    "--time": seconds,
    "--signal": _signal,
}
