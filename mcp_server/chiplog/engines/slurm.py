"""Slurm, by its own commands: few of them, however many jobs there are.

Submitting asks what the queue holds and takes (four calls), calls sbatch once a batch, and releases all at once;
following calls squeue and sacct once each. What is read here is shown on a real Slurm 22.05 in tests/slurm.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from chiplog.engines.job import HELD, Batch, Job, Queue
from chiplog.engines.slots import turns
from chiplog.errors import EngineError
from chiplog.record import State
from chiplog.settings import load_settings

PATIENCE_S = 120  # commands hang for minutes where the controller is down
STATES = {  # Slurm's words that are not ours
    "CONFIGURING": State.PENDING, "REQUEUED": State.PENDING, "REQUEUE_HOLD": State.PENDING,
    "REQUEUE_FED": State.PENDING, "SPECIAL_EXIT": State.PENDING, "RESV_DEL_HOLD": State.PENDING,
    "COMPLETING": State.RUNNING, "SUSPENDED": State.RUNNING, "STOPPED": State.RUNNING, "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING, "RESIZING": State.RUNNING,
    "BOOT_FAIL": State.NODE_FAIL, "DEADLINE": State.TIMEOUT, "REVOKED": State.CANCELLED,
}  # fmt: skip
QUEUED = (
    "JobArrayID",
    "State",
    "RestartCnt",
    "exit_code",
    "SubmitTime",
    "StartTime",
    "EndTime",
    "Reason",
    "Name",
    "Comment",
)
ENDED = ("JobID", "JobName", "State", "ExitCode", "Submit", "Start", "End", "ElapsedRaw", "Reason")
# What a job that submits others must not hand on, and what changes the words of Slurm's commands.
NOT_HANDED_ON = re.compile(r"(?:SLURM_(?!CONF$)|SQUEUE_|SACCT_|SINFO_)|CHIPLOG_(?:RUN|ENGINE)$")
PLAIN = {"SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard"}  # lists of tasks are not cut off
READ_IN_PATHS = re.compile(r"[%\\\n\r]")
FULL = re.compile(r"SubmitJob|submit job|job submit limit|MaxJobCount|Slurm temporarily unable", re.IGNORECASE)


class Attempt(NamedTuple):
    """One go of a job, as accounting has it."""

    name: str
    state: State
    words: str  # Slurm's own for the state, with who cancelled it
    exit_code: int | None
    submitted: str | None
    started: str | None
    ended: str | None
    elapsed_s: int
    reason: str


class SlurmEngine:
    """The cluster whose commands are at hand."""

    name = "slurm"
    poll_s = 15.0
    closes = True

    def held(self, tag: str) -> list[str]:
        """The jobs of that tag that are still held, by the user and nobody else."""
        own = [row for row in self._squeue("--me") if row["Comment"] == _comment(tag)]
        # One that was cancelled keeps its reason.
        return [row["JobArrayID"] for row in own if row["Reason"] == "JobHeldUser" and not _state(row["State"]).ended]

    def queue(self) -> Queue:
        """Counts all jobs of the user, whatever submitted them, against the limits of Slurm and of chiplog.toml."""
        n_there = sum(not _state(row["State"]).ended for row in self._squeue("--me"))
        most = min(self._limits(), default=None)
        room = None if most is None else most - n_there
        return Queue(room=room, most=most, longest_array=self._longest_array())

    def submit(self, batches: Sequence[Batch], tag: str, at_once: int | None = None) -> list[list[str]]:
        """Queues the batches, held. Raises EngineError with sbatch's words if it refuses one.

        `at_once` holds over these batches, by a limit on each array and by batches that wait for one another (`turns`);
        jobs of other submissions are not counted.
        """
        for batch in batches:
            if read := READ_IN_PATHS.search(str(batch.folder)):
                raise EngineError(
                    f"the path {batch.folder} holds {read[0]!r}, which Slurm reads in the names of logs: move or "
                    "rename the folder"
                )
        settings = load_settings()
        environment = {"CHIPLOG_PYTHON": sys.executable, "CHIPLOG_WORKSPACE": str(settings.workspace)}
        done: list[str] = []
        try:
            for batch, turn in zip(batches, turns(batches, at_once), strict=True):
                awaited = [(one.kind, one.batch) for one in batch.after] + [
                    ("afterany", number) for number in turn.after
                ]
                after = ",".join(f"{kind}:{done[number]}" for kind, number in dict.fromkeys(awaited))
                options = ["--parsable", "--hold", "--export=ALL", f"--comment={_comment(tag)}"]
                options += [f"--array={_array(batch, turn.at_once)}"] if batch.indices else []
                options += [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
                said = self._call("sbatch", *options, str(batch.script), folder=batch.folder, environment=environment)
                done.append(said.strip().partition(";")[0])  # ID;CLUSTER
        except BaseException:
            if done:
                self.cancel(done)
            raise
        return [
            [f"{number}_{index}" for index in batch.indices] or [number]
            for number, batch in zip(done, batches, strict=True)
        ]

    def release(self, ids: Sequence[str]) -> None:
        """Lets held jobs run: one call."""
        if ids:
            self._call("scontrol", "release", ",".join(_bases(ids)))

    def jobs(self, ids: Sequence[str]) -> list[Job]:
        """How these jobs stand: squeue knows those that wait, run, or have just ended, accounting those that ended."""
        if not ids:
            return []
        bases = ",".join(_bases(ids))
        attempts = self._sacct(bases)
        queued = {row["JobArrayID"]: row for row in self._squeue(f"--jobs={bases}")}
        return [job for name in ids if (job := _job(name, queued.get(name), attempts.get(name, [])))]

    def cancel(self, ids: Sequence[str]) -> None:
        """Ends those that have not ended: one call."""
        arrays: dict[str, list[str]] = defaultdict(list)
        for name in ids:
            base, _, index = name.partition("_")
            arrays[base] += [index] if index else []
        named = [f"{base}_[{','.join(indices)}]" if indices else base for base, indices in arrays.items()]
        self._call("scancel", *named)

    def soonest(self, script: Path, partitions: Sequence[str]) -> dict[str, str]:
        """When a job of this script might start in each partition, as Slurm now expects: ISO 8601, or why it cannot.

        Slurm says nothing of limits on time: a job over that of its partition is taken, and waits for ever.
        """
        found = {}
        for partition in partitions:
            options = ("--test-only", "--parsable", f"--partition={partition}", str(script))
            done = self._ask("sbatch", *options, folder=script.parent)
            starts = re.search(r"to start at (\S+)", done.stderr)
            found[partition] = starts[1] if starts else " ".join(done.stderr.split())[:200]
        return found

    def _squeue(self, which: str) -> list[dict[str, str]]:
        """What the controller knows, each element of an array apart.

        Not by --array, which leaves out the last of 0-58:2, that is 58.
        """
        fields = ",".join(f"{name}:|" for name in QUEUED)  # what ends each; the last, a comment, may hold it too
        try:
            lines = self._call("squeue", "--noheader", "--states=all", which, f"--Format={fields}").splitlines()
        except EngineError as error:
            if "Invalid job id" in str(error):  # Slurm has forgotten the only one that was asked for
                return []
            raise
        cells = [line.removesuffix("|").split("|", len(QUEUED) - 1) for line in lines]
        rows = [dict(zip(QUEUED, row, strict=True)) for row in cells if len(row) == len(QUEUED)]
        return [{**row, "JobArrayID": name} for row in rows for name in _elements(row["JobArrayID"])]

    def _sacct(self, bases: str) -> dict[str, list[Attempt]]:
        """All goes of these jobs by their ids, the oldest first; none where there is no accounting."""
        if not shutil.which("sacct"):
            return {}
        options = ("--noheader", "--parsable2", "--allocations", "--duplicates", f"--format={','.join(ENDED)}")
        found: dict[str, list[Attempt]] = defaultdict(list)
        try:
            lines = self._call("sacct", *options, f"--jobs={bases}").splitlines()
        except EngineError as error:
            if "disabled" in str(error):  # a cluster without accounting
                return {}
            raise
        for line in lines:
            row: dict[str, str] = dict(zip(ENDED, line.split("|"), strict=False))
            for name in _elements(row["JobID"]):
                found[name].append(_attempt(row))
        return found

    def _limits(self) -> Iterator[int]:
        """How many jobs the user may have in the queue, by each rule that says so."""
        slurm = load_settings().slurm
        if slurm and slurm.max_submit:
            yield slurm.max_submit
        if not shutil.which("sacctmgr"):
            return
        user = getpass.getuser()
        rows = self._accounts("assoc", f"user={user}", "format=Account,MaxSubmitJobs,GrpSubmitJobs,DefaultQOS")
        ours = [row for row in rows if slurm and slurm.account == row[0]] or rows
        yield from (int(cell) for row in ours for cell in row[1:3] if cell.isdecimal())
        names = {row[3] for row in ours if row[3]} | ({slurm.qos} if slurm and slurm.qos else set())
        if names:
            for row in self._accounts("qos", "format=Name,MaxSubmitJobsPerUser"):
                if row[0] in names and row[1].isdecimal():
                    yield int(row[1])

    def _accounts(self, *asked: str) -> list[list[str]]:
        """A table of sacctmgr; empty where accounting is off."""
        try:
            lines = self._call("sacctmgr", "--noheader", "--parsable2", "show", *asked).splitlines()
        except EngineError:
            return []
        return [line.split("|") for line in lines]

    def _longest_array(self) -> int | None:
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", self._call("scontrol", "show", "config"), re.MULTILINE)
        return int(found[1]) or None if found else None  # indices are below it

    def _call(self, *command: str, folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """What a command printed. Raises EngineError if it is not there, fails or does not answer."""
        done = self._ask(*command, folder=folder, environment=environment)
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            what = "The queue is full: wait until some jobs have ended" if FULL.search(words) else "Mend that"
            raise EngineError(f"{command[0]} refused: {words[:600]}. {what}, and call again")
        return done.stdout

    def _ask(
        self, *command: str, folder: Path | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not NOT_HANDED_ON.match(name)}
        clean |= PLAIN | (environment or {})
        try:
            return subprocess.run(
                command, cwd=folder, env=clean, capture_output=True, text=True, errors="replace",
                timeout=PATIENCE_S, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise EngineError(
                f"{command[0]} is not here: submit from a login node of the cluster, or with engine='local'"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{command[0]} did not answer in {PATIENCE_S} s: try again when Slurm is up") from error


def _comment(tag: str) -> str:
    return f"chiplog:{tag}"


def _array(batch: Batch, at_once: int | None) -> str:
    """As sbatch takes it: `0-3%2`."""
    indices = ",".join(map(str, batch.indices))
    if batch.indices == tuple(range(batch.indices[0], batch.indices[-1] + 1)):
        indices = f"{batch.indices[0]}-{batch.indices[-1]}"
    return f"{indices}%{at_once}" if at_once else indices


def _bases(ids: Sequence[str]) -> list[str]:
    """The ids of the jobs and arrays that these belong to, each once."""
    return list(dict.fromkeys(name.partition("_")[0] for name in ids))


def _elements(job_id: str) -> list[str]:
    """The ids of what stands in one line, `12_3`, or `12_[0,2-4%2]` and `12_[0-8:2]` of elements that never started."""
    base, bracket, rest = job_id.partition("_[")
    if not bracket:
        return [job_id]
    found: list[str] = []
    for part in rest.rstrip("]").partition("%")[0].split(","):
        if not part[:1].isdecimal() or part.endswith("."):  # cut off
            continue
        first, _, last = part.partition("-")
        last, _, stride = (last or first).partition(":")
        found += [f"{base}_{index}" for index in range(int(first), int(last) + 1, int(stride or 1))]
    return found


def _attempt(row: dict[str, str]) -> Attempt:
    words = row["State"]
    code, _, signal = row["ExitCode"].partition(":")
    return Attempt(
        name=row["JobName"],
        state=_state(words),
        words=words,
        exit_code=128 + int(signal) if signal.isdecimal() and int(signal) else int(code) if code.isdecimal() else None,
        submitted=_utc(row["Submit"]),
        started=_utc(row["Start"]),
        ended=_utc(row["End"]),
        elapsed_s=int(row["ElapsedRaw"] or 0),
        reason=row["Reason"],
    )


def _state(words: str) -> State:
    word = words.partition(" ")[0].rstrip("+")
    return STATES.get(word) or next((state for state in State if state.value == word), State.UNKNOWN)


def _utc(text: str) -> str | None:
    """A time of Slurm's, which is the cluster's own, in UTC; null for `Unknown` and `None`."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).isoformat()
    except ValueError:
        return None


def _seen(row: dict[str, str]) -> Attempt:
    """The go of a job that the controller knows."""
    started, ended, status = _utc(row["StartTime"]), _utc(row["EndTime"]), int(row["exit_code"] or 0)
    state = _state(row["State"])
    until = datetime.fromisoformat(ended) if ended and state.ended else datetime.now(UTC)
    ran = started is not None and state is not State.PENDING  # of one that waits, it is when it may start
    return Attempt(
        name=row["Name"],
        state=state,
        words=row["State"],
        exit_code=128 + status % 128 if status % 128 else status // 256,
        submitted=_utc(row["SubmitTime"]),
        started=started if ran else None,
        ended=ended,
        elapsed_s=max(0, round((until - datetime.fromisoformat(started)).total_seconds())) if ran and started else 0,
        reason="Dependency" if row["Reason"] == "DependencyNeverSatisfied" else row["Reason"],
    )


def _job(name: str, queued: dict[str, str] | None, attempts: Sequence[Attempt]) -> Job | None:
    """A job from both answers, since accounting lags; null if neither knows it."""
    if queued is None:
        goes = list(attempts)
    else:
        before = int(queued["RestartCnt"])
        now, listed = _seen(queued), attempts[before:]
        goes = [*attempts[:before], listed[-1] if now.state.ended and listed and listed[-1].state.ended else now]
    if not goes:
        return None
    if queued is None and not goes[-1].state.ended:  # cancelled while it waited; or accounting has not heard of its end
        goes[-1] = goes[-1]._replace(state=State.UNKNOWN, reason="neither in the queue nor known to have ended")
    last, started = goes[-1], [go for go in goes if go.started]
    return Job(
        id=name,
        name=last.name,
        state=last.state,
        reason=_reason(last),
        exit_code=last.exit_code if last.state.ended else None,
        restarts=max(len(goes) - 1, int(queued["RestartCnt"]) if queued else 0),
        submitted=goes[0].submitted,
        started=started[0].started if started else None,
        ended=last.ended if last.state.ended else None,
        ran_s=sum(go.elapsed_s for go in started) if started else None,
        attempt_s=started[-1].elapsed_s if started else None,
        log=Path(f"slurm-{name}.out"),
    )


def _reason(go: Attempt) -> str | None:
    """Why a job waits or ended so, in words."""
    if go.state in (State.COMPLETED, State.RUNNING):
        return None
    if go.state is State.UNKNOWN:
        return go.reason
    if not go.state.ended and go.reason == "JobHeldUser":
        return HELD
    if not go.state.ended:
        return f"waits: {go.reason}" if go.reason not in ("", "None") else None
    # Accounting keeps the reason for which a job waited, whatever came of it. This one never ran, and nobody ended it.
    if go.reason == "Dependency" and not go.elapsed_s and go.words == "CANCELLED":
        return "Dependency: the job that it waits for did not end well"
    return f"exit status {go.exit_code}" if go.state is State.FAILED else f"Slurm says {go.words}"
