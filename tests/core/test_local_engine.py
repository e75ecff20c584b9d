"""The local engine: Slurm's states and files without Slurm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NoReturn

import pytest

from chiplog.engines import Job, LocalEngine
from chiplog.engines.job import read_options, seconds
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
    jobs = engine.submit(
        [
            script(tmp_path, "fine", "echo done"),
            script(tmp_path, "bad", "exit 3"),
            script(tmp_path, "killed", "kill -9 $$"),
            script(tmp_path, "slow", "sleep 60", "--time=00:00:01"),
            script(tmp_path, "again", '[ "$SLURM_RESTART_COUNT" = 2 ] || exit 75'),
            script(tmp_path, "for_ever", "exit 75"),
        ]
    )
    found = ended(engine, jobs)
    assert {name: (job.state, job.exit_code, job.restarts) for name, job in found.items()} == {
        "fine": (State.COMPLETED, 0, 0),
        "bad": (State.FAILED, 3, 0),
        "killed": (State.FAILED, 137, 0),
        "slow": (State.TIMEOUT, 143, 0),
        "again": (State.COMPLETED, 0, 2),
        "for_ever": (State.FAILED, 75, 5),
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
    jobs = engine.submit([script(tmp_path, "job", body)])
    log = tmp_path / "job" / f"slurm-{jobs[0].id}.out"
    while not (log.is_file() and "up" in log.read_text()):
        time.sleep(0.1)
    engine.cancel([jobs[0].id])
    assert ended(engine, jobs)["job"].state is State.CANCELLED
    assert (tmp_path / "job" / "saved").exists()


def test_a_job_that_waits_never_starts_once_it_is_cancelled(engine: LocalEngine, tmp_path: Path):
    cpus = f"--cpus-per-task={available_cpus()}"
    jobs = engine.submit([script(tmp_path, "first", "sleep 2", cpus), script(tmp_path, "second", "echo no", cpus)])
    engine.cancel([jobs[1].id])
    found = ended(engine, jobs)
    assert found["first"].state is State.COMPLETED and found["second"].state is State.CANCELLED
    assert found["second"].started is None and not found["second"].log.exists()


def test_no_more_jobs_run_at_once_than_there_are_cpus(engine: LocalEngine, tmp_path: Path):
    cpus = f"--cpus-per-task={available_cpus()}"
    jobs = engine.submit([script(tmp_path, name, "sleep 0.5", cpus) for name in ("a", "b")])
    found = ended(engine, jobs)
    assert found["a"].ended and found["b"].started and found["a"].ended <= found["b"].started


def test_scripts_find_the_variables_that_slurm_sets(engine: LocalEngine, tmp_path: Path):
    body = 'echo "$SLURM_JOB_NAME $SLURM_SUBMIT_DIR $SLURM_CPUS_PER_TASK $SLURM_JOB_ID $(pwd)"'
    jobs = engine.submit([script(tmp_path, "job", body)])
    words = ended(engine, jobs)["job"].log.read_text().split()
    assert words == ["job", str(tmp_path / "job"), "1", jobs[0].id, str(tmp_path / "job")]


def test_a_name_that_a_shell_would_read_is_only_a_name(engine: LocalEngine, tmp_path: Path):
    folder = tmp_path / 'odd "name" $(touch pwned) `x` ü'
    folder.mkdir()
    (folder / "run.sbatch").write_text("#!/bin/bash\n#SBATCH --job-name=x\n\npwd\n")
    jobs = engine.submit([folder / "run.sbatch"])
    assert ended(engine, jobs)["x"].log.read_text().strip() == str(folder)
    assert not list(tmp_path.rglob("pwned"))


def test_more_than_the_machine_has_is_refused_and_nothing_is_queued(engine: LocalEngine, tmp_path: Path):
    good, greedy = script(tmp_path, "good", "true"), script(tmp_path, "greedy", "true", "--cpus-per-task=9999")
    with pytest.raises(EngineError, match="9999 CPUs"):
        engine.submit([good, greedy])
    with engine.open() as queue:
        assert queue.execute("SELECT count(*) FROM jobs").fetchone()[0] == 0


@pytest.mark.parametrize("step", ["_start_worker", "jobs"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError])
def test_what_was_queued_by_a_submission_that_failed_never_runs(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
):
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(LocalEngine, "_start_worker", lambda self: None)
    live = engine.submit([script(tmp_path, "earlier", "true")])
    monkeypatch.setattr(LocalEngine, step, fail)
    with pytest.raises(error):
        engine.submit([script(tmp_path, "new", "true"), tmp_path / "earlier" / "run.sbatch"])
    with engine.open() as queue:
        states = {row["name"]: row["state"] for row in queue.execute("SELECT name, state FROM jobs")}
    assert states == {"earlier": State.PENDING, "new": State.CANCELLED} and len(live) == 1


def test_a_log_of_the_queue_that_cannot_be_written_leaves_no_job(engine: LocalEngine, tmp_path: Path):
    (tmp_path / "queue" / "queue.log").mkdir(parents=True)
    with pytest.raises(OSError, match=r"queue\.log"):
        engine.submit([script(tmp_path, "job", "true")])
    with engine.open() as queue:
        assert [row["state"] for row in queue.execute("SELECT state FROM jobs")] == [State.CANCELLED]


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
    first = LocalEngine(tmp_path / "a").submit([script(tmp_path, "one", "true")])
    time.sleep(1.1)
    second = LocalEngine(tmp_path / "b").submit([script(tmp_path, "two", "true")])
    assert first[0].id != second[0].id and int(second[0].id) > 1000


def test_a_script_that_waits_or_runs_is_not_queued_again(engine: LocalEngine, tmp_path: Path):
    file = script(tmp_path, "one", "sleep 1")
    jobs = engine.submit([file])
    assert [job.id for job in engine.submit([file])] == [jobs[0].id]
    ended(engine, jobs)
    again = engine.submit([file])
    assert again[0].id != jobs[0].id
    ended(engine, again)
