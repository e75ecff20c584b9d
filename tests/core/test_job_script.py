"""`code/job.sh`, which every job reads: processes, the signals they are sent, and how the job ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chiplog.bundle import bundle

JOB = bundle() / "templates" / "job.sh"
# Listens only after a while, then writes down each signal that comes in the next two seconds, and asks to go on.
SLOW_TO_LISTEN = """
import os, signal, sys, time
name = os.environ["SLURM_PROCID"]
time.sleep(0.7)
def heard(number, _):
    open(f"heard{name}", "a").write(f"{number} ")
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, heard)
open(f"listens{name}", "w")
time.sleep(2)
sys.exit(int(os.environ.get("CODE", "75")))
"""


def job(folder: Path, body: str, tasks: int = 1, **environment: str) -> subprocess.Popen[str]:
    """A job of this machine whose script reads job.sh."""
    (folder / "run.sbatch").write_text(f"trap told=yes USR1\nsource {JOB}\n{body}\n")
    (folder / "slow.py").write_text(SLOW_TO_LISTEN)
    slurm = {"CHIPLOG_ENGINE": "local", "SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks), "SLURM_PROCID": "0"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "run.sbatch"], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PATH": path, **slurm, **environment},
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status, and what was printed after the line that says where the job runs."""
    out, _ = process.communicate(timeout=60)
    first, *lines = out.splitlines()
    assert first.startswith("job 7 on ")
    return process.returncode, lines


def test_a_process_for_each_task_knows_its_place_and_where_all_meet(tmp_path: Path):
    says = "echo $SLURM_PROCID $SLURM_LOCALID $SLURM_NTASKS $MASTER_ADDR ${MASTER_PORT:-0}"
    code, lines = ended(job(tmp_path, f"work_together bash -c '{says}'", tasks=3))
    *places, ports = zip(*(line.rsplit(" ", 1) for line in sorted(lines)), strict=True)
    assert (code, places) == (0, [("0 0 3 127.0.0.1", "1 1 3 127.0.0.1", "2 2 3 127.0.0.1")])
    assert len(set(ports)) == 1 and int(ports[0]) > 1023


@pytest.mark.parametrize(("codes", "expected"), [("0 0", 0), ("0 3", 3), ("75 75", 75), ("75 1", 75), ("137 75", 137)])
def test_a_job_ends_with_the_highest_status_of_its_processes(codes: str, expected: int, tmp_path: Path):
    body = f"work_together bash -c 'each=({codes}); exit \"${{each[SLURM_PROCID]}}\"'\necho on it goes"
    code, lines = ended(job(tmp_path, body, tasks=2))
    assert (code, lines) == (expected, ["on it goes"] if expected == 0 else [])


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("when", ["before it listens", "later"])
def test_each_process_is_told_once_as_soon_as_it_listens(tasks: int, when: str, tmp_path: Path):
    process = job(tmp_path, f"work{'_together' * (tasks > 1)} python slow.py", tasks)
    if when == "later":
        wait_for(tmp_path / "listens0")
    time.sleep(0.3)
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert ended(process) == (75, [])
    assert [file.read_text() for file in sorted(tmp_path.glob("heard*"))] == tasks * [f"{signal.SIGUSR1.value} "]


def test_a_signal_that_came_before_the_work_began_is_handed_on(tmp_path: Path):
    process = job(tmp_path, "kill -USR1 $$\nwork python slow.py")
    assert ended(process) == (75, []) and (tmp_path / "heard0").read_text() == f"{signal.SIGUSR1.value} "


def test_a_process_that_srun_starts_is_told_what_came_before(tmp_path: Path):
    (tmp_path / "slow.py").write_text(SLOW_TO_LISTEN)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = {"PATH": path, "told": "yes", "SLURM_PROCID": "5", "CODE": "3"}
    done = subprocess.run(["bash", JOB, "python", "slow.py"], cwd=tmp_path, env=started, check=False)
    assert done.returncode == 3 and (tmp_path / "heard5").read_text() == f"{signal.SIGUSR1.value} "


def test_what_is_only_forked_does_not_listen_though_it_has_the_traps_of_its_parent(tmp_path: Path):
    (tmp_path / "listens.py").write_text(
        "import signal, time; signal.signal(10, print); print(flush=True); time.sleep(9)"
    )
    body = (
        "trap : USR1; if listens $$; then echo the script does; fi\n"
        "exec {up}< <(exec python listens.py); read -ru $up; if listens $!; then echo the command does; kill $!; fi"
    )
    assert ended(job(tmp_path, body)) == (0, ["the command does"])


def test_a_job_that_is_ended_from_outside_ends_its_processes_and_is_not_put_back(tmp_path: Path):
    process = job(tmp_path, "requeue() { echo put back; }\nwork_together python slow.py", tasks=2)
    wait_for(tmp_path / "listens0")
    wait_for(tmp_path / "listens1")
    process.terminate()
    assert ended(process) == (75, [])
    assert [file.read_text() for file in sorted(tmp_path.glob("heard*"))] == 2 * [f"{signal.SIGTERM.value} "]


def test_a_job_is_put_back_into_the_queue_ten_times_at_most(tmp_path: Path):
    code, lines = ended(job(tmp_path, "work bash -c 'exit 75'", SLURM_RESTART_COUNT="10"))
    assert code == 76
    assert lines == ["error: it was put back into the queue 10 times and is not done: submit it again to go on"]


def test_no_second_job_works_in_the_folder_while_anything_of_the_first_does(tmp_path: Path):
    first = job(tmp_path, "work bash -c 'touch works; sleep 8 & exit 3'")  # which leaves a process behind
    wait_for(tmp_path / "works")
    code, lines = ended(job(tmp_path, "work touch twice"))
    assert code == 1 and lines == [f"error: another job works in {tmp_path}: let it end or end it, then submit again"]
    assert not (tmp_path / "twice").exists()
    assert ended(first)[0] == 3
    assert ended(job(tmp_path, "work touch twice"))[0] == 0 and (tmp_path / "twice").exists()


def test_a_job_that_leaves_no_result_has_failed(tmp_path: Path):
    code, lines = ended(job(tmp_path, "work true\nleft DONE"))
    assert (code, lines) == (1, ["error: it ended with exit status 0 and left no DONE"])
    assert ended(job(tmp_path, "work touch DONE\nleft DONE")) == (0, [])


def wait_for(file: Path) -> None:
    give_up = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < give_up, file
        time.sleep(0.02)
