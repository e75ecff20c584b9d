"""What ends the processes of a run together when they cannot talk: a thread in each that looks at their common store.

A process that has left a pass through a divided model, because its memory ran out or because it died, leaves the others
waiting in a gather, where no word reaches them: in NCCL's kernels for ten minutes and more. The thread needs none of
that. It counts in the store, looks whether the next process does so too, and ends its own process where one says so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

EVERY_S = 0.5  # between looks
# Without a count: a process is gone. A busy one counts on, since reading and computing let threads run. Time is counted
# in looks, so that a job which Slurm suspends and resumes has missed nothing.
SILENT_S = 40.0
LEAVING_S = 5.0  # how long those that end wait for each other, and for word of their own process that it is done


class Watch:
    """The thread of process `rank`, on a connection of its own: the other may be waiting for hours."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=30))
        # torchrun's own process keeps the store over its restarts.
        self.store = PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        self.store.add(f"count/{rank}", 1)  # from here on it can be missed
        self.ending, self._done = False, threading.Event()
        self._silent_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._clock = threading.Thread(target=self._keep_time, daemon=True)
        self._thread.start()
        self._clock.start()

    def claim(self) -> None:
        """Comes back in the first process that asks; others end here, with that one."""
        if self.store.add("claims", 1) > 1:
            self._thread.join()

    def end_all(self, code: int) -> NoReturn:
        """Ends every process with this exit code."""
        self.store.set("code", str(code))
        self._thread.join()
        raise AssertionError("the thread ends the process")

    def heed(self) -> None:
        """Where all were told to end: ends as they do, whatever went wrong as others left."""
        if self.ending:
            self._thread.join()

    def stop(self) -> None:
        """Looks no longer. The clock runs on: what is left to do ends soon, or is ended."""
        self._done.set()
        self._thread.join(LEAVING_S)  # it may wait for a store that is gone
        self._leave("stopped")

    def _run(self) -> None:
        try:
            self._look()
        except RuntimeError:  # process 0 has gone, with the store
            if not self._done.wait(LEAVING_S):
                self._end_alone()

    def _look(self) -> None:
        after, count = (self.rank + 1) % self.world_size, 0
        while not self._done.wait(EVERY_S):
            if self.store.check(["code"]):
                self._end(int(self.store.get("code")))
            self.store.add(f"count/{self.rank}", 1)
            before, count = count, self.store.add(f"count/{after}", 0)
            if count != before or not count:
                self._silent_s = 0.0
            elif self._silent_s > SILENT_S:
                print(f"\nerror: process {after} is gone: start again", file=sys.stderr)
                self.store.set("code", "1")

    def _keep_time(self) -> NoReturn:
        """Ends the process also where the store does not answer: torch sets no limit to that."""
        while True:
            time.sleep(EVERY_S)
            self._silent_s += EVERY_S
            if self._silent_s > SILENT_S + 4 * LEAVING_S:
                self._end_alone()

    def _end(self, code: int) -> NoReturn:
        """Once all know, so that none takes the other's end for a fault."""
        self.ending = True
        try:
            self._meet("ending", everyone=True)
            sys.stdout.flush()
            sys.stderr.flush()
            self._leave("ended")
        finally:
            os._exit(code)  # no other way ends a process whose main thread waits in a kernel

    def _leave(self, name: str) -> None:
        """Process 0 has the store, so it waits for the others to leave."""
        with suppress(RuntimeError):  # one that is gone has taken the store with it
            self._meet(name, everyone=self.rank == 0)

    def _meet(self, name: str, *, everyone: bool) -> None:
        """Says that this process is there, and waits a while for the others where everyone is needed."""
        until = time.monotonic() + LEAVING_S
        there = self.store.add(name, 1)
        while everyone and there < self.world_size and time.monotonic() < until:
            time.sleep(0.05)
            there = self.store.add(name, 0)

    def _end_alone(self) -> NoReturn:
        print("\nerror: the other processes do not answer: start again", file=sys.stderr, flush=True)
        os._exit(1)
