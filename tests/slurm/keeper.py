"""Runs one command and takes with it whatever it leaves: `python keeper.py COMMAND ...`

The keeper ends with its standard input, so also when whoever started it is killed, or with the command. Then it kills
all that descends from the command, however detached: an orphan below it becomes its own child.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has just ended
            continue
        if parent == str(os.getpid()):
            found.append(int(stat.parent.name))
    return found


def kill_all() -> None:
    """From the top, so that slurmd and slurmstepd are gone before they could report that a job ended."""
    while below := children():
        for process in below:
            os.kill(process, signal.SIGKILL)
        for process in below:
            os.waitpid(process, 0)


def main(command: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    kept = os.fork()
    if kept == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvp(command[0], command)

    def reap(*_: object) -> None:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)) is not None:
            if ended.si_pid == kept:
                raise SystemExit(1)

    def leave(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGCHLD, reap)
    try:
        reap()  # the command may have ended before the line above
        sys.stdin.buffer.read()
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        kill_all()


if __name__ == "__main__":
    main(sys.argv[1:])
