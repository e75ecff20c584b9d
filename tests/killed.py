"""What tests kill: a submission midway, and who works on the local queue."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from chiplog import submitting
from chiplog.engines import Engine


@contextmanager
def killed_at(step: str, owner: type, engine: type[Engine]) -> Iterator[None]:
    """A submission within ends at that method, as by kill -9: nothing is cancelled, restored or removed."""

    def dies(*_: object) -> NoReturn:
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(owner, step, dies)
        patch.setattr(engine, "cancel", lambda *_: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        write = submitting.write_atomic
        written: set[Path] = set()

        def once(file: Path, content: bytes) -> None:
            """Of a file's two writes the second is what was there before."""
            if file not in written:
                written.add(file)
                write(file, content)

        patch.setattr(submitting, "write_atomic", once)
        yield


def kill_workers(queue: Path) -> None:
    """Kills every process that works, or waits to work, on the local queue of this folder."""
    there = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _works(entry, queue)]
    assert there, "nobody works on the queue"
    for pid in there:
        os.kill(pid, signal.SIGKILL)


def _works(process: Path, queue: Path) -> bool:
    try:
        words = (process / "cmdline").read_text().split("\0")
    except OSError:
        return False
    return "chiplog.engines.local_queue" in words and str(queue) in words
