"""The local queue where things die: workers, wrappers, the disk; and jobs that no worker at hand can start."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from chiplog.engines import Batch, Job, LocalEngine
from chiplog.engines.local import group_alive
from chiplog.engines.local_queue import Worker
from chiplog.record import State
from tests.core.test_local_engine import ended, engine, queued, script
from tests.killed import kill_workers

__all__ = ["engine"]


def wait_for(file: Path) -> None:
    """Until a job has made it."""
    give_up = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def deaf_job(engine: LocalEngine, tmp_path: Path) -> tuple[list[Job], int]:
    """A job that runs and does not end when it is asked to, and the process that leads its group."""
    jobs = queued(engine, script(tmp_path, "job", "trap '' TERM; touch deaf; while :; do sleep 0.2; done"))
    wait_for(tmp_path / "job" / "deaf")
    with engine.open() as queue:
        (wrapper,) = queue.execute("SELECT pid FROM queue").fetchone()
    return jobs, wrapper


def test_what_a_job_started_ends_with_it_though_worker_and_wrapper_were_killed(engine: LocalEngine, tmp_path: Path):
    jobs, wrapper = deaf_job(engine, tmp_path)
    kill_workers(engine.folder)
    os.kill(wrapper, signal.SIGKILL)
    assert ended(engine, jobs)["job"].state is State.NODE_FAIL
    assert not group_alive(wrapper)


def test_a_job_that_does_not_listen_is_cancelled_though_the_worker_was_killed(engine: LocalEngine, tmp_path: Path):
    jobs, wrapper = deaf_job(engine, tmp_path)
    engine.cancel([jobs[0].id])
    time.sleep(1)  # by now it was asked to end
    kill_workers(engine.folder)
    assert ended(engine, jobs)["job"].state is State.CANCELLED
    assert not group_alive(wrapper)


def test_a_cancelled_job_has_its_time_to_save_though_the_worker_was_killed(engine: LocalEngine, tmp_path: Path):
    saves = "trap 'sleep 4; touch saved; exit' TERM; touch ready; while :; do sleep 0.2; done"
    jobs = queued(engine, script(tmp_path, "job", saves))
    wait_for(tmp_path / "job" / "ready")
    engine.cancel([jobs[0].id])
    time.sleep(1)  # by now it was asked to end
    kill_workers(engine.folder)
    assert ended(engine, jobs)["job"].state is State.CANCELLED
    assert (tmp_path / "job" / "saved").exists()


def test_a_queue_on_a_full_disk_is_named_and_its_jobs_are_not_said_to_run(engine: LocalEngine, tmp_path: Path):
    file = script(tmp_path, "job", "true")
    ((number,),) = engine.submit([Batch(script=file, folder=file.parent)], "test")
    with engine.open() as queue:
        queue.execute("UPDATE queue SET held = 0, state = 'RUNNING'")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    code = (
        "import sys; from pathlib import Path; from chiplog.engines import LocalEngine\n"
        "print(LocalEngine(Path(sys.argv[1])).jobs([sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(engine.folder), number]
    asked = subprocess.run(command, capture_output=True, text=True, preexec_fn=full, check=False)
    assert asked.returncode == 1 and "cannot be used" in asked.stderr and "free disk space" in asked.stderr


def test_what_is_dead_and_was_not_reaped_holds_no_job_up():
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert group_alive(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not group_alive(child.pid)
    child.wait()


def test_a_job_that_this_worker_cannot_start_holds_no_other_up_and_says_why(engine: LocalEngine, tmp_path: Path):
    batches = [
        Batch(script=file, folder=file.parent) for file in (script(tmp_path, n, "true") for n in ("big", "small"))
    ]
    (big,), (small,) = engine.submit(batches, "test")
    with engine.open() as queue:
        queue.execute("UPDATE queue SET held = 0")
        queue.execute("UPDATE queue SET cpus = 1000000 WHERE id = ?", (big,))
    worker = Worker(engine)
    while worker.turn():
        time.sleep(0.1)
    with engine.open() as queue:
        found = {str(row["id"]): row for row in queue.execute("SELECT * FROM queue")}
    assert found[small]["state"] == "COMPLETED" and found[big]["state"] == "PENDING"
    assert "it asks for 1000000 CPUs and 0 GPUs, and the command that began" in found[big]["reason"]
