"""The local engine: Slurm's states and files without Slurm."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from chiplog.engines import After, Batch, Job, LocalEngine, local_queue
from chiplog.engines.job import read_options, seconds
from chiplog.engines.local import VERSION, utc_now
from chiplog.errors import EngineError
from chiplog.machine import available_cpus
from chiplog.record import State


@pytest.fixture
def engine(tmp_path: Path) -> LocalEngine:
    return LocalEngine(tmp_path / "queue")


def script(tmp_path: Path, name: str, body: str, *options: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    head = "".join(f"#SBATCH {option}\n" for option in (f"--job-name={name}", "--output=slurm-%j.out", *options))
    (folder / "run.sbatch").write_text(f"#!/bin/bash\n{head}\n{body}\n")
    return folder / "run.sbatch"


def queued(engine: LocalEngine, *scripts: Path) -> list[Job]:
    """Jobs of these scripts, each in its own folder, which may run."""
    batches = [Batch(script=file, folder=file.parent) for file in scripts]
    ids = [number for batch in engine.submit(batches, "test") for number in batch]
    engine.release(ids)
    return engine.jobs(ids)


def ended(engine: LocalEngine, jobs: list[Job], limit_s: float = 60) -> dict[str, Job]:
    ids = [job.id for job in jobs]
    give_up = time.monotonic() + limit_s
    while time.monotonic() < give_up:
        now = engine.jobs(ids)
        if all(job.state.ended for job in now):
            return {job.name: job for job in now}
        time.sleep(0.1)
    raise AssertionError(engine.jobs(ids))


def test_each_way_to_end_has_its_state(engine: LocalEngine, tmp_path: Path):
    jobs = queued(
        engine,
        *[
            script(tmp_path, "fine", "echo done"),
            script(tmp_path, "bad", "exit 3"),
            script(tmp_path, "killed", "kill -9 $$"),
            script(tmp_path, "slow", "sleep 60", "--time=00:00:01"),
            script(tmp_path, "again", '[ "${SLURM_RESTART_COUNT:-0}" = 2 ] || exit 75'),
            script(tmp_path, "for_ever", "exit 75"),
        ],
    )
    found = ended(engine, jobs)
    assert {name: (job.state, job.exit_code, job.restarts) for name, job in found.items()} == {
        "fine": (State.COMPLETED, 0, 0),
        "bad": (State.FAILED, 3, 0),
        "killed": (State.FAILED, 137, 0),
        "slow": (State.TIMEOUT, 143, 0),
        "again": (State.COMPLETED, 0, 2),
        "for_ever": (State.FAILED, 75, 10),
    }
    assert found["fine"].log.read_text() == "done\n" and found["fine"].log.name == f"slurm-{found['fine'].id}.out"
    assert "DUE TO TIME LIMIT ***" in found["slow"].log.read_text()


def test_a_job_that_is_told_to_end_may_finish_its_checkpoint(engine: LocalEngine, tmp_path: Path):
    (tmp_path / "train.py").write_text(
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(1)\n    open('saved', 'w')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('up', flush=True)\ntime.sleep(60)\n"
    )
    body = "python ../train.py"
    jobs = queued(engine, script(tmp_path, "job", body))
    log = tmp_path / "job" / f"slurm-{jobs[0].id}.out"
    while not (log.is_file() and "up" in log.read_text()):
        time.sleep(0.1)
    engine.cancel([jobs[0].id])
    assert ended(engine, jobs)["job"].state is State.CANCELLED
    assert (tmp_path / "job" / "saved").exists()


def test_a_job_that_waits_never_starts_once_it_is_cancelled(engine: LocalEngine, tmp_path: Path):
    cpus = f"--cpus-per-task={available_cpus()}"
    jobs = queued(engine, script(tmp_path, "first", "sleep 2", cpus), script(tmp_path, "second", "echo no", cpus))
    engine.cancel([jobs[1].id])
    found = ended(engine, jobs)
    assert found["first"].state is State.COMPLETED and found["second"].state is State.CANCELLED
    assert found["second"].started is None and not found["second"].log.exists()


def test_no_more_jobs_run_at_once_than_there_are_cpus(engine: LocalEngine, tmp_path: Path):
    cpus = f"--cpus-per-task={available_cpus()}"
    jobs = queued(engine, *[script(tmp_path, name, "sleep 0.5", cpus) for name in ("a", "b")])
    found = ended(engine, jobs)
    assert found["a"].ended and found["b"].started and found["a"].ended <= found["b"].started


def test_scripts_find_the_variables_that_slurm_sets(engine: LocalEngine, tmp_path: Path):
    body = 'echo "$SLURM_JOB_NAME $SLURM_SUBMIT_DIR $SLURM_CPUS_PER_TASK $SLURM_JOB_ID $(pwd)"'
    jobs = queued(engine, script(tmp_path, "job", body))
    words = ended(engine, jobs)["job"].log.read_text().split()
    assert words == ["job", str(tmp_path / "job"), "1", jobs[0].id, str(tmp_path / "job")]


def test_a_name_that_a_shell_would_read_is_only_a_name(engine: LocalEngine, tmp_path: Path):
    folder = tmp_path / 'odd "name" $(touch pwned) `x` ü'
    folder.mkdir()
    (folder / "run.sbatch").write_text("#!/bin/bash\n#SBATCH --job-name=x\n\npwd\n")
    jobs = queued(engine, folder / "run.sbatch")
    assert ended(engine, jobs)["x"].log.read_text().strip() == str(folder)
    assert not list(tmp_path.rglob("pwned"))


def test_more_than_the_machine_has_is_refused_and_nothing_is_queued(engine: LocalEngine, tmp_path: Path):
    good, greedy = script(tmp_path, "good", "true"), script(tmp_path, "greedy", "true", "--cpus-per-task=9999")
    with pytest.raises(EngineError, match="9999 CPUs"):
        queued(engine, good, greedy)
    with engine.open() as queue:
        assert queue.execute("SELECT count(*) FROM queue").fetchone()[0] == 0


def test_nodes_are_refused_and_each_task_has_its_cpus(engine: LocalEngine, tmp_path: Path):
    with pytest.raises(EngineError, match="asks for 2 nodes, and this machine is one"):
        queued(engine, script(tmp_path, "wide", "true", "--nodes=2"))
    with pytest.raises(EngineError, match="asks for 9000 CPUs"):
        queued(engine, script(tmp_path, "greedy", "true", "--ntasks=3000", "--cpus-per-task=3"))
    two = ("--ntasks=2", f"--cpus-per-task={max(1, available_cpus() // 2)}")
    says = 'echo "$SLURM_NTASKS $SLURM_CPUS_PER_TASK $SLURM_NNODES"'
    found = ended(engine, queued(engine, *[script(tmp_path, name, f"{says}; sleep 0.3", *two) for name in "ab"]))
    assert found["a"].log.read_text().split() == ["2", str(max(1, available_cpus() // 2)), "1"]
    if available_cpus() < 4:  # there is not room for both
        assert found["a"].ended and found["b"].started and found["a"].ended <= found["b"].started


def test_what_is_held_never_runs_and_is_found_by_its_tag(engine: LocalEngine, tmp_path: Path):
    held = engine.submit([Batch(script=script(tmp_path, "held", "touch ran"), folder=tmp_path)], "mine")
    ended(engine, queued(engine, script(tmp_path, "other", "true")))
    assert engine.held("mine") == held[0] and engine.held("others") == []
    assert engine.jobs(held[0])[0].state is State.PENDING and not (tmp_path / "ran").exists()
    engine.cancel(held[0])
    assert engine.jobs(held[0])[0].state is State.CANCELLED and engine.held("mine") == []


def test_an_array_runs_its_script_once_for_each_index(engine: LocalEngine, tmp_path: Path):
    file = script(tmp_path, "array", 'echo "$SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_ID $SLURM_JOB_ID"')
    file.write_text(file.read_text().replace("slurm-%j.out", "%a/slurm-%A_%a.out"))
    for index in (3, 7, 8):
        (tmp_path / f"home{index}").mkdir()
        (tmp_path / "array" / str(index)).symlink_to(tmp_path / f"home{index}")
    (ids,) = engine.submit([Batch(script=file, folder=file.parent, indices=(3, 7, 8))], "test", 1)
    engine.release(ids)
    jobs = engine.jobs(ids)
    give_up = time.monotonic() + 60
    while not all(job.state.ended for job in jobs) and time.monotonic() < give_up:
        jobs = engine.jobs(ids)
    array = ids[0].partition("_")[0]
    assert [job.id for job in jobs] == ids == [f"{array}_{index}" for index in (3, 7, 8)]
    for job, index in zip(jobs, (3, 7, 8), strict=True):
        assert job.log == tmp_path / f"home{index}" / f"slurm-{array}_{index}.out"
        assert job.log.read_text().split()[:2] == [array, str(index)] and job.state is State.COMPLETED
    assert all(first.ended <= then.started for first, then in itertools.pairwise(jobs) if first.ended and then.started)


def test_a_limit_on_jobs_at_once_holds_over_all_of_a_tag_and_no_other(engine: LocalEngine, tmp_path: Path):
    files = [script(tmp_path, name, "sleep 0.5") for name in ("array", "single", "later", "other")]
    batches = [Batch(script=file, folder=tmp_path) for file in files]
    array = batches[0].model_copy(update={"indices": (0, 1)})
    ids = engine.submit([array, batches[1]], "mine", 1) + engine.submit([batches[2]], "mine", 1)
    other = engine.submit([batches[3]], "other", 1)
    engine.release([number for batch in [*ids, *other] for number in batch])
    found = ended(engine, engine.jobs(other[0])) | ended(engine, engine.jobs(ids[2]))
    jobs = engine.jobs([number for batch in ids for number in batch])
    assert all(first.ended <= then.started for first, then in itertools.pairwise(jobs) if first.ended and then.started)
    if available_cpus() > 1:
        assert found["other"].ended and jobs[-1].started and found["other"].ended < jobs[-1].started


def test_jobs_wait_for_what_they_come_after(engine: LocalEngine, tmp_path: Path):
    """Of an array, for the element of the same index; what waits for one that failed never runs."""
    train = script(tmp_path, "train", '[ "$SLURM_ARRAY_TASK_ID" != 1 ]')
    then = [script(tmp_path, name, "true") for name in ("evaluate", "close")]
    batches = [
        Batch(script=train, folder=train.parent, indices=(0, 1)),
        Batch(script=then[0], folder=tmp_path, indices=(0, 1), after=(After(kind="aftercorr", batch=0),)),
        Batch(script=then[1], folder=tmp_path, after=(After(kind="afterany", batch=1),)),
    ]
    ids = engine.submit(batches, "test")
    engine.release([number for batch in ids for number in batch])
    found = ended(engine, engine.jobs(ids[2]))
    states = [job.state for job in engine.jobs([*ids[0], *ids[1]])]
    assert states == [State.COMPLETED, State.FAILED, State.COMPLETED, State.CANCELLED]
    assert "Dependency" in str(engine.jobs(ids[1])[1].reason) and found["close"].state is State.COMPLETED


def test_a_script_is_told_that_its_time_is_nearly_over(engine: LocalEngine, tmp_path: Path):
    body = "trap 'echo told; exit 75' USR1\n[ \"$SLURM_RESTART_COUNT\" = 1 ] && exit\nsleep 60 & wait"
    jobs = queued(engine, script(tmp_path, "job", body, "--time=00:00:03", "--signal=B:USR1@2"))
    found = ended(engine, jobs)["job"]
    assert (found.state, found.restarts, found.log.read_text()) == (State.COMPLETED, 1, "told\n")


def test_a_log_of_the_queue_that_cannot_be_written_is_named(engine: LocalEngine, tmp_path: Path):
    (tmp_path / "queue" / "queue.log").mkdir(parents=True)
    with pytest.raises(OSError, match=r"queue\.log"):
        queued(engine, script(tmp_path, "job", "true"))


@pytest.mark.parametrize(
    ("clock", "expected"),
    [("90", 5400), ("1:30", 90), ("01:30:00", 5400), ("2-0", 172_800), ("1-02:03", 93_780), ("1-02:03:04", 93_784)],
)
def test_slurms_times_are_read(clock: str, expected: int):
    assert seconds(clock) == expected


def test_a_time_that_is_none_is_refused():
    with pytest.raises(EngineError, match="is no time"):
        seconds("soon")


def test_options_after_the_first_command_do_not_count(tmp_path: Path):
    file = tmp_path / "s"
    file.write_text("#!/bin/bash\n#SBATCH --time=5 --cpus-per-task=2\n# words\n\necho hi\n#SBATCH --gres=gpu:4\n")
    options = read_options(file)
    assert (options.time_limit_s, options.cpus, options.gpus) == (300, 2, 0)


def test_a_new_queue_does_not_count_from_the_same_number_again(tmp_path: Path):
    first = queued(LocalEngine(tmp_path / "a"), script(tmp_path, "one", "true"))
    time.sleep(1.1)
    second = queued(LocalEngine(tmp_path / "b"), script(tmp_path, "two", "true"))
    assert first[0].id != second[0].id and int(second[0].id) > 1000


# The queue of the first version, and what its worker does about it, in short.
FIRST_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, script TEXT NOT NULL, log TEXT NOT NULL,
  cpus INTEGER NOT NULL, gpus INTEGER NOT NULL, time_limit_s INTEGER, bin TEXT NOT NULL,
  state TEXT NOT NULL, reason TEXT, exit_code INTEGER, restarts INTEGER NOT NULL DEFAULT 0,
  pid INTEGER, pid_started TEXT, gpu_ids TEXT, cancel INTEGER NOT NULL DEFAULT 0,
  submitted TEXT NOT NULL, started TEXT, ended TEXT
) STRICT
"""
FIRST_WORKER = f"""
import fcntl, sqlite3, time
lock = open("queue.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("up", flush=True)
while True:
    with sqlite3.connect("queue.sqlite", timeout=30) as queue:
        queue.execute("BEGIN IMMEDIATE")
        queue.execute({FIRST_TABLE!r})
        queue.execute("UPDATE jobs SET state = 'FAILED', reason = 'taken by the old worker' WHERE state = 'PENDING'")
        if not queue.execute("SELECT 1 FROM jobs WHERE state IN ('PENDING', 'RUNNING')").fetchone():
            break
    time.sleep(0.2)
"""


def of_the_first_version(engine: LocalEngine, **job: object) -> None:
    """Makes its queue one of the first version, with this job."""
    engine.folder.mkdir()
    said = {"log": "", "cpus": 1, "gpus": 0, "bin": "", "submitted": "2026-11-20T00:00:00+00:00", **job}
    marks = ", ".join("?" * len(said))
    with closing(sqlite3.connect(engine.folder / "queue.sqlite")) as queue, queue:
        queue.execute(FIRST_TABLE)
        queue.execute(f"INSERT INTO jobs ({', '.join(said)}) VALUES ({marks})", [*said.values()])


def test_a_queue_of_an_older_version_goes_on(engine: LocalEngine, tmp_path: Path):
    file, log = script(tmp_path, "old", "pwd"), tmp_path / "old.log"
    of_the_first_version(engine, id=7, name="old", script=str(file), log=str(log), state="PENDING")
    found = ended(engine, engine.jobs(["7"]))["old"]
    assert found.state is State.COMPLETED and found.log.read_text().strip() == str(tmp_path / "old")
    assert int(queued(engine, script(tmp_path, "next", "true"))[0].id) == 8


def test_a_worker_of_an_older_version_takes_no_job_and_leaves_those_that_it_started(
    engine: LocalEngine, tmp_path: Path
):
    exit_file = tmp_path / "queue" / "7.exit"
    started = subprocess.Popen(["bash", "-c", f"sleep 2; echo 0 > {exit_file}"], start_new_session=True)
    of_the_first_version(
        engine, id=7, name="old", script="old", state="RUNNING", pid=started.pid,
        pid_started=local_queue._start_mark(started.pid), started=utc_now(),
    )  # fmt: skip
    old = subprocess.Popen([sys.executable, "-c", FIRST_WORKER], cwd=engine.folder, stdout=subprocess.PIPE, text=True)
    assert old.stdout and old.stdout.readline() == "up\n"
    held, free = (Batch(script=script(tmp_path, name, "true"), folder=tmp_path) for name in ("held", "free"))
    ids = [number for batch in engine.submit([held, free], "test") for number in batch]
    engine.release([ids[1]])
    assert old.communicate(timeout=30) == ("", None) and (old.returncode, started.wait(30)) == (0, 0)
    assert {name: job.state for name, job in ended(engine, engine.jobs(["7", ids[1]])).items()} == {
        "old": State.COMPLETED,
        "free": State.COMPLETED,
    }
    assert engine.jobs([ids[0]])[0].state is State.PENDING


def test_a_queue_of_a_later_version_is_left_alone_with_words(engine: LocalEngine, tmp_path: Path):
    queued(engine, script(tmp_path, "job", "sleep 2"))
    with closing(sqlite3.connect(engine.folder / "queue.sqlite", timeout=30)) as queue, queue:
        queue.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(EngineError, match="that of a later chiplog"):
        engine.jobs(["1"])
    give_up = time.monotonic() + 30
    while not (said := (engine.folder / "queue.log").read_text()) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert "this worker leaves: the local queue" in said
