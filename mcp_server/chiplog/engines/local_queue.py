"""The worker of the local engine: `python -m chiplog.engines.local_queue FOLDER`.

One worker at a time holds the lock of a queue. It starts jobs while CPUs and GPUs are free, ends those over their
time limit or cancelled, notes how each ended, and leaves when nothing waits or runs. A job writes its own exit
status to a file, so that a worker which was killed can be followed by another that takes its jobs over.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from chiplog.engines.local import LocalEngine, available_gpus, group_alive, kill_group, utc_now
from chiplog.engines.local_variables import variables
from chiplog.errors import EngineError
from chiplog.machine import available_cpus
from chiplog.record import State

POLL_S = 0.2
GRACE_S = 10.0  # between asking a job to end and ending it
REQUEUE_EXIT = 75  # a job that ends so has saved its state and wants to go on
MAX_RESTARTS = 10
LOCK_WAIT_S = 3.0
# Runs the script, hands SIGUSR1 on to it, and writes its exit status down. As of Slurm's `--signal=B:USR1`, the script
# alone gets the signal.
WRAPPER = """
bash "$1" & script=$!
trap 'kill -USR1 "$script"' USR1
while wait "$script"; kill -0 "$script" 2>/dev/null; do :; done  # a signal ends `wait`, not the script
wait "$script"; code=$?
echo "$code" > "$2.tmp" && mv "$2.tmp" "$2"
exit "$code"
"""


def main(folder: Path) -> None:
    """Works until the queue is empty."""
    with (folder / "queue.lock").open("w") as lock:
        if not _take(lock.fileno()):
            return
        worker = Worker(LocalEngine(folder))
        try:
            while worker.turn():
                time.sleep(POLL_S)
        except EngineError as error:  # a later version has the queue now, or its file is broken
            sys.exit(f"{utc_now()}: this worker leaves: {error}")


def _take(descriptor: int) -> bool:
    """Whether this process holds the lock now; waits a little for a worker that is just leaving."""
    give_up = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL_S)


class Worker:
    """What one worker knows beside the queue: the processes it started itself, and when it asked which to end."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self.cpus, self.gpus = available_cpus(), available_gpus()
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.asked: dict[int, float] = {}

    def turn(self) -> bool:
        """Looks at every job once. False when none is left."""
        with self.engine.open() as queue:
            running = queue.execute("SELECT * FROM queue WHERE state = 'RUNNING' ORDER BY id").fetchall()
            for row in running:
                self._look(queue, row)
            running = queue.execute("SELECT * FROM queue WHERE state = 'RUNNING'").fetchall()
            free_cpus = self.cpus - sum(row["cpus"] for row in running)
            taken = {gpu for row in running for gpu in (row["gpu_ids"] or "").split(",")}
            free_gpus = [gpu for gpu in self.gpus if gpu not in taken]
            later = 0  # jobs that only another worker can start
            pending = queue.execute("SELECT * FROM queue WHERE state = 'PENDING' AND NOT held ORDER BY id").fetchall()
            tags = Counter(row["tag"] for row in running)
            for row in pending:
                if not self._may_start(queue, row) or (row["at_once"] and tags[row["tag"]] >= row["at_once"]):
                    continue
                if row["cpus"] > self.cpus or row["gpus"] > len(self.gpus):
                    self._leave_to_another(queue, row)
                    later += 1
                    continue
                if row["cpus"] > free_cpus or row["gpus"] > len(free_gpus):
                    break  # first come, first served
                self._start(queue, row, free_gpus[: row["gpus"]])
                free_cpus -= row["cpus"]
                free_gpus = free_gpus[row["gpus"] :]
                tags[row["tag"]] += 1
            return bool(running or len(pending) > later)

    def _leave_to_another(self, queue: sqlite3.Connection, row: sqlite3.Row) -> None:
        """Says why a job waits: the command that started this worker might use less of the machine."""
        words = (
            f"it asks for {row['cpus']} CPUs and {row['gpus']} GPUs, and the command that began to work on the queue "
            f"may use {self.cpus} and {len(self.gpus)}: once the other jobs have ended, look again from where more may "
            "be used"
        )
        queue.execute("UPDATE queue SET reason = ? WHERE id = ? AND reason IS NOT ?", (words, row["id"], words))

    def _may_start(self, queue: sqlite3.Connection, row: sqlite3.Row) -> bool:
        """Whether all that it waits for has ended as it should; one of which that cannot be any more is cancelled."""
        waits = json.loads(row["after"])
        for kind, number in waits:
            found = queue.execute("SELECT state FROM queue WHERE id = ?", (number,)).fetchone()
            state = State(found["state"]) if found else State.CANCELLED
            if state.ended and kind == "afterok" and state is not State.COMPLETED:
                self._end(queue, row, State.CANCELLED, f"Dependency: the job that it waits for ended {state}", None)
                return False
            if not state.ended:
                return False
        return True

    def _start(self, queue: sqlite3.Connection, row: sqlite3.Row, gpus: list[str]) -> None:
        exit_file = self._exit_file(row["id"])
        exit_file.unlink(missing_ok=True)
        script = Path(row["script"])
        folder = Path(row["folder"] or script.parent)
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SLURMD_"))},
            "PATH": os.pathsep.join([row["bin"], os.environ.get("PATH", os.defpath)]),
            "CHIPLOG_ENGINE": "local",
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            **variables(queue, row, str(folder)),
        }
        # Noted before it starts: a worker that dies here leaves a job that vanished, never one that starts twice.
        noted = queue.execute(
            "UPDATE queue SET state = 'RUNNING', reason = NULL, started = ?, pid = NULL, gpu_ids = ?, signalled = 0 "
            "WHERE id = ? AND state = 'PENDING' AND NOT held",
            (utc_now(), ",".join(gpus), row["id"]),
        )
        queue.commit()
        if not noted.rowcount:  # cancelled since it was looked at
            return
        try:
            with Path(row["log"]).open("ab") as log:
                child = subprocess.Popen(
                    ["bash", "-c", WRAPPER, "job", str(script), str(exit_file)],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._end(queue, row, State.FAILED, f"it could not be started: {error}", None)
            return
        self.children[row["id"]] = child
        mark = (child.pid, _start_mark(child.pid), row["id"])
        queue.execute("UPDATE queue SET pid = ?, pid_started = ? WHERE id = ?", mark)
        queue.commit()

    def _look(self, queue: sqlite3.Connection, row: sqlite3.Row) -> None:
        """One running job: has it ended, must it end?"""
        number = row["id"]
        child = self.children.get(number)
        # A number is not given to another process while one is left of the group that it leads.
        mark = _start_mark(row["pid"]) if row["pid"] is not None else None
        ours = child is not None or (row["pid"] is not None and mark in (None, row["pid_started"]))
        alive = child.poll() is None if child else mark and ours and not self._exit_file(number).is_file()
        why = self._must_end(row)
        if number in self.asked or (why is State.CANCELLED and not alive):
            # The script dies of the signal at once; what it started may still be writing a checkpoint.
            alive = ours and group_alive(row["pid"])
        if alive:
            if why and number not in self.asked and row["pid"] is not None:
                self.asked[number] = time.monotonic()
                kill_group(row["pid"], signal.SIGTERM)
            elif why and time.monotonic() - self.asked[number] > GRACE_S:
                kill_group(row["pid"], signal.SIGKILL)
            elif self._nears_its_limit(row):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(row["pid"], signal.SIGUSR1)
                queue.execute("UPDATE queue SET signalled = 1 WHERE id = ?", (number,))
            return
        self.children.pop(number, None)
        code = self._exit_code(number, child)
        if ours:
            kill_group(row["pid"], signal.SIGKILL)  # what the script left running in its background
        if why is State.CANCELLED:
            self._say(row, f"CANCELLED AT {_clock()} ***")
            self._end(queue, row, State.CANCELLED, "cancelled by the user", code)
        elif why is State.TIMEOUT and (number in self.asked or code is None):
            self._say(row, f"CANCELLED AT {_clock()} DUE TO TIME LIMIT ***")
            self._end(queue, row, State.TIMEOUT, f"over its time limit of {row['time_limit_s']} s", code)
        elif code is None:
            self._end(queue, row, State.NODE_FAIL, "its process vanished without an exit status", None)
        elif code == 0:
            self._end(queue, row, State.COMPLETED, None, 0)
        elif code == REQUEUE_EXIT and row["restarts"] < MAX_RESTARTS:
            queue.execute(
                "UPDATE queue SET state = 'PENDING', restarts = restarts + 1, ran_s = ran_s + ?, started = NULL "
                "WHERE id = ?",
                (_ran_s(row), number),
            )
        else:
            self._end(queue, row, State.FAILED, f"exit status {code}", code)

    def _must_end(self, row: sqlite3.Row) -> State | None:
        if row["cancel"]:
            return State.CANCELLED
        over = row["time_limit_s"] is not None and _ran_s(row) > row["time_limit_s"]
        return State.TIMEOUT if over else None

    def _nears_its_limit(self, row: sqlite3.Row) -> bool:
        """Whether it is time for the signal that it asked for, which it has not had yet."""
        if row["signalled"] or not (row["pid"] and row["time_limit_s"] and row["signal_s"]):
            return False
        return _ran_s(row) > row["time_limit_s"] - row["signal_s"]

    def _end(
        self, queue: sqlite3.Connection, row: sqlite3.Row, state: State, reason: str | None, code: int | None
    ) -> None:
        self.asked.pop(row["id"], None)
        exit_file = self._exit_file(row["id"])
        # When the job itself said so: nobody may have looked for a while.
        at = datetime.fromtimestamp(exit_file.stat().st_mtime, UTC) if exit_file.is_file() else datetime.now(UTC)
        ended = at.isoformat(timespec="milliseconds")
        exit_file.unlink(missing_ok=True)
        values = (state, reason, code, ended, row["id"])
        queue.execute("UPDATE queue SET state = ?, reason = ?, exit_code = ?, ended = ? WHERE id = ?", values)

    def _say(self, row: sqlite3.Row, words: str) -> None:
        """Writes into the job's log what Slurm would have written."""
        with suppress(OSError), Path(row["log"]).open("a") as log:
            log.write(f"slurmstepd: error: *** JOB {row['id']} ON {socket.gethostname()} {words}\n")

    def _exit_file(self, number: int) -> Path:
        return self.engine.folder / f"{number}.exit"

    def _exit_code(self, number: int, child: subprocess.Popen[bytes] | None) -> int | None:
        with suppress(OSError, ValueError):
            return int(self._exit_file(number).read_text())
        # Killed before the wrapper could write: our own child's status still tells, as a shell would number it.
        return 128 - child.returncode if child and child.returncode < 0 else child and child.returncode


def _ran_s(row: sqlite3.Row) -> float:
    """Seconds since a job started."""
    return (datetime.now(UTC) - datetime.fromisoformat(row["started"])).total_seconds()


def _start_mark(pid: int) -> str | None:
    """When the process began, in clock ticks since boot, so that a reused pid is not taken for the job.

    Null for a process that is gone, or dead and not yet reaped.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _clock() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%dT%H:%M:%S")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
