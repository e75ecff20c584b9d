"""Experiments on a real cluster: from the plan to the summary."""

from __future__ import annotations

import itertools
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chiplog import tools
from chiplog.answers import StatusAnswer
from chiplog.engines import SlurmEngine
from chiplog.errors import ConfirmationNeeded, EngineError
from chiplog.folder import ExperimentFolder
from chiplog.record import State
from tests.killed import killed_at
from tests.slurm.cluster import Cluster


@pytest.fixture
def on_slurm(lab: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose jobs run on the cluster."""
    return use(lab, cluster, monkeypatch)


def use(lab: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    (lab / "chiplog.toml").write_text('[slurm]\npartition = "gpu"\n')
    return lab


def set_up(lab: Path, name: str, **given: Any) -> Path:
    """The folder of a new experiment whose recipes only pretend."""
    asked = {"models": {"S": "small"}, "variables": {"lora_rank": [4, 8]}, "gpus": 0, "time_limit_s": 600, **given}
    tools.plan_experiment(question="Which is best?", dataset="data/words.json", name=name, **asked)
    tools.setup_experiment_dirs(name)
    return lab / "experiments" / name


def ended(name: str, seconds: float = 240) -> StatusAnswer:
    """How its runs stand once all have ended."""
    give_up = time.monotonic() + seconds
    while True:
        answer = tools.experiment_status(name, limit=1000)
        if all(row.state and row.state.ended for row in answer.runs):
            return answer
        assert time.monotonic() < give_up, answer.summary
        time.sleep(0.3)


def summary(folder: Path, seconds: float = 60) -> str:
    """What the last job wrote of it."""
    give_up = time.monotonic() + seconds
    while not (folder / "summary.md").is_file():
        assert time.monotonic() < give_up, [file.read_text() for file in folder.glob("slurm-*-close.out")]
        time.sleep(0.3)
    return (folder / "summary.md").read_text()


def test_six_runs_and_two_controls_go_from_the_plan_to_the_summary(on_slurm: Path, cluster: Cluster):
    """As one array of trainings, one of their evaluations and one of controls; nobody asks for the summary."""
    folder = set_up(
        on_slurm, "six", models={"S": "small", "L": "large"}, variables={"model": ["S", "L"], "lora_rank": [4, 8, 16]}
    )
    said = tools.submit_experiment("six", confirm=True)
    assert "8 runs to Slurm" in said.summary
    assert len({job.partition("_")[0] for job in said.jobs.values()}) == 2  # arrays: of six, and of two
    again = tools.submit_experiment("six", confirm=True)
    assert again.jobs == {}
    answer = ended("six")
    assert Counter(row.state for row in answer.runs) == {State.COMPLETED: 8} and answer.ok
    text = summary(folder)
    assert "Which is best?" in text and text.count("finetune") == 6 and text.count("control |") == 2
    train, evaluation, base = sorted(folder.glob("arrays/*.sbatch"))
    assert [file.stem for file in (train, evaluation, base)] == ["001-train", "002-eval", "003-base"]
    array = said.jobs["S_rank4"].partition("_")[0]
    elements = {f"{array}_{i}" for i in range(6)}
    cluster.wait_for(lambda: {row["JobID"] for row in cluster.sacct(array, "-X")} == elements, 30)  # accounting lags


def test_a_run_that_fails_takes_its_evaluation_with_it_and_the_others_finish(on_slurm: Path):
    folder = set_up(on_slurm, "fails", runs=[{"lora_rank": 4}, {"lora_rank": 8, "fail_at_step": 2}], variables=None)
    tools.submit_experiment("fails", confirm=True)
    rows = {row.run: row for row in ended("fails").runs}
    assert {name: row.state for name, row in rows.items() if row.state is not State.COMPLETED} == {
        "rank8_fail_at_step2": State.FAILED
    }
    records = {record.run: record for record in tools.collect_records("fails").records}
    assert records["rank8_fail_at_step2"].steps == {"train": State.FAILED, "eval": State.CANCELLED}
    assert "RuntimeError: the loss is no number" in str(records["rank8_fail_at_step2"].reason)
    assert "rank8" in summary(folder).partition("Not shown")[2]
    again = tools.submit_experiment("fails", confirm=True)
    assert list(again.jobs) == ["rank8_fail_at_step2"]  # what failed, and only that
    assert {row.attempt for row in ended("fails").runs} == {1, 2}


def test_an_experiment_is_cancelled_in_the_middle(on_slurm: Path, cluster: Cluster):
    set_up(on_slurm, "stops", controls={"seconds_a_step": 5.0}, variables={"lora_rank": [4, 8, 16]}, control="none")
    jobs = tools.submit_experiment("stops", confirm=True).jobs
    cluster.wait_for(lambda: tools.experiment_status("stops").runs[0].state is State.RUNNING, 30)
    tools.cancel_experiment("stops", runs=["rank8"], confirm=True)
    cluster.wait_for(lambda: tools.experiment_status("stops").runs[1].state is State.CANCELLED, 30)
    assert tools.experiment_status("stops").runs[0].state is State.RUNNING
    tools.cancel_experiment("stops", confirm=True)
    assert {row.state for row in ended("stops").runs} == {State.CANCELLED}
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1
    mine = cluster.run("squeue", "--me", "-h", "-o", "%k").stdout
    assert f"chiplog:{on_slurm}" not in mine  # nor its evaluations, nor the job that closes it


def test_what_is_cancelled_while_it_waits_is_known_as_cancelled(on_slurm: Path, cluster: Cluster):
    """Slurm itself forgets elements of an array that never started."""
    (on_slurm / "chiplog.toml").write_text('[slurm]\npartition = "gpu"\n[budget]\njobs_at_once = 1\n')
    set_up(on_slurm, "waits", controls={"seconds_a_step": 5.0}, variables={"lora_rank": [4, 8, 16]}, control="none")
    tools.submit_experiment("waits", confirm=True)
    cluster.wait_for(lambda: tools.experiment_status("waits").runs[0].state is State.RUNNING, 30)
    cluster.wait_for(lambda: "JobArrayTaskLimit" in str(tools.experiment_status("waits").runs[2].reason), 30)
    tools.cancel_experiment("waits", runs=["rank16"], confirm=True)
    rows = tools.experiment_status("waits").runs
    assert [row.state for row in rows] == [State.RUNNING, State.PENDING, State.CANCELLED]
    tools.cancel_experiment("waits", confirm=True)
    assert {row.state for row in ended("waits").runs} == {State.CANCELLED}


def most_at_once(folder: Path) -> int:
    """The most jobs of an experiment that ran at the same time, by Slurm's own times, in whole seconds."""
    ids = [number for submission in ExperimentFolder(folder).submissions() for number in submission.job_ids]
    jobs = SlurmEngine().jobs(ids)
    assert len(jobs) == len(ids)
    changes = [(job.ended, -1) for job in jobs if job.started] + [(job.started, 1) for job in jobs if job.started]
    return max(itertools.accumulate(change for _, change in sorted(changes, key=lambda one: (str(one[0]), one[1]))))


def test_no_more_jobs_run_at_once_than_the_budget_says_however_many_arrays_they_are(on_slurm: Path):
    """Four trainings and two controls, which are two arrays, two trainings that ask for more time, and evaluations."""
    (on_slurm / "chiplog.toml").write_text('[slurm]\npartition = "gpu"\n[budget]\njobs_at_once = 2\n')
    folder = set_up(
        on_slurm, "capped", models={"S": "small", "L": "large"}, controls={"seconds_a_step": 0.4},
        variables={"model": ["S", "L"], "lora_rank": [4, 8, 16]},
    )  # fmt: skip
    for file in folder.glob("runs/*_rank16/run.sbatch"):
        file.write_text(file.read_text().replace("--time=00:10:00", "--time=02:00:00"))
    said = tools.submit_experiment("capped", confirm=True)
    assert len({job.partition("_")[0] for job in said.jobs.values()}) == 3
    assert Counter(row.state for row in ended("capped").runs) == {State.COMPLETED: 8}
    assert most_at_once(folder) == 2


def test_the_question_says_when_the_first_may_start(on_slurm: Path):
    (on_slurm / "chiplog.toml").write_text('[slurm]\npartition = "gpu"\ncpu_partition = "short"\n')
    set_up(on_slurm, "asks")
    with pytest.raises(ConfirmationNeeded, match=r"3 runs to Slurm .* may start at: gpu: 20\d\d-.*; short: 20\d\d-"):
        tools.submit_experiment("asks")
    assert not (on_slurm / "experiments" / "asks" / "jobs.jsonl").exists()


def test_a_submission_that_was_killed_leaves_nothing_that_runs(on_slurm: Path):
    """Its jobs are held; the next submission ends them and submits its own."""
    folder = set_up(on_slurm, "killed")
    with killed_at("add", ExperimentFolder, SlurmEngine):
        tools.submit_experiment("killed", confirm=True)
    left = SlurmEngine().held(str(folder))
    assert len(left) == 6 and not (folder / "jobs.jsonl").exists()  # two of each kind, a control, the one that closes
    jobs = tools.submit_experiment("killed", confirm=True).jobs
    assert not set(jobs.values()) & set(left)
    assert Counter(row.state for row in ended("killed").runs) == {State.COMPLETED: 3}
    assert {job.state for job in SlurmEngine().jobs(left)} <= {State.CANCELLED, State.UNKNOWN}


def test_what_was_cancelled_while_it_was_held_blocks_no_submission(on_slurm: Path):
    folder = set_up(on_slurm, "held")
    with killed_at("release", SlurmEngine, SlurmEngine):
        tools.submit_experiment("held", confirm=True)
    assert str(tools.experiment_status("held").runs[0].reason).startswith("held: ")
    tools.cancel_experiment("held", confirm=True)
    assert SlurmEngine().held(str(folder)) == []
    assert len(tools.submit_experiment("held", confirm=True).jobs) == 3
    assert Counter(row.state for row in ended("held").runs) == {State.COMPLETED: 3}


def test_a_refusal_is_in_slurms_words_and_nothing_is_left(on_slurm: Path):
    (on_slurm / "chiplog.toml").write_text('[slurm]\npartition = "nowhere"\n')
    folder = set_up(on_slurm, "refused")
    with pytest.raises(EngineError, match="invalid partition specified: nowhere"):
        tools.submit_experiment("refused", confirm=True)
    assert SlurmEngine().held(str(folder)) == []
    assert not [*folder.glob("arrays/*"), *folder.glob("*.jsonl"), *folder.glob("runs/*/estimate.json")]


def test_submit_sh_cancels_a_training_whose_evaluation_is_refused_and_goes_on_the_next_time(on_slurm: Path):
    """Run once more, it submits nothing twice."""
    folder = set_up(on_slurm, "by_hand")
    script = folder / "runs" / "rank8" / "eval.sbatch"
    sound = script.read_text()
    script.write_text(sound.replace("--partition=gpu", "--partition=nowhere"))
    refused = subprocess.run(["bash", folder / "submit.sh"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "invalid partition specified: nowhere" in refused.stderr
    cancelled = re.search(r"the evaluation of rank8 was refused, so its training, job (\d+), is c", refused.stderr)
    assert cancelled and [one.run for one in ExperimentFolder(folder).submissions()] == ["rank4"]
    assert SlurmEngine().jobs([cancelled[1]])[0].state is State.CANCELLED
    script.write_text(sound)
    again = [
        subprocess.run(["bash", folder / "submit.sh"], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    assert again[0].stderr.startswith("rank4 was submitted before") and len(again[1].stderr.splitlines()) == 3
    assert [one.run for one in ExperimentFolder(folder).submissions()] == ["rank4", "rank8", "S_base"]
    assert Counter(row.state for row in ended("by_hand").runs) == {State.COMPLETED: 3}


def test_a_folder_whose_name_shell_and_slurm_would_read_is_only_a_name(
    lab: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    odd = lab.rename(lab.with_name('o\'d d "x" $(touch PWN) `touch PWN` & ; ü'))
    monkeypatch.chdir(odd)
    use(odd, cluster, monkeypatch)
    folder = set_up(odd, "odd")
    tools.submit_experiment("odd", confirm=True)
    assert Counter(row.state for row in ended("odd").runs) == {State.COMPLETED: 3}
    assert "Which is best?" in summary(folder)
    assert not list(odd.parent.rglob("PWN"))
    assert all(len(list((folder / "runs" / name).glob("slurm-*.out"))) == 2 for name in ("rank4", "rank8"))


@pytest.mark.parametrize("name", ["50%j", "back\\slash", "new\nline"])
def test_a_folder_whose_name_slurm_would_read_is_refused(
    lab: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, name: str
):
    odd = lab.rename(lab.with_name(name))
    monkeypatch.chdir(odd)
    use(odd, cluster, monkeypatch)
    folder = set_up(odd, "odd")
    with pytest.raises(EngineError, match="which Slurm reads in the names of logs"):
        tools.submit_experiment("odd", confirm=True)
    assert not (folder / "jobs.jsonl").exists()


# The job that closes a submission pauses 30 s and more between its tries: here until the test says so.
SLEEP = """#!/bin/sh
[ "$1" = 0 ] && exit
echo "$1" >> {folder}/pauses
until [ -e {folder}/go_on ]; do /bin/sleep 0.1; done
"""


def test_runs_that_wait_for_room_are_submitted_once_others_leave_the_queue(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The job that is to submit them finds the queue full of other jobs at first."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sleep").write_text(SLEEP.format(folder=tmp_path))
    (programs / "sleep").chmod(0o755)
    with Cluster(tmp_path / "full", nodes=1) as cluster:
        use(lab, cluster, monkeypatch)
        monkeypatch.setenv("PATH", f"{programs}:{cluster.env['PATH']}")
        (lab / "chiplog.toml").write_text('[slurm]\npartition = "gpu"\nmax_submit = 5\n')
        folder = set_up(lab, "waits", variables={"lora_rank": [4, 8, 16]}, control="none")
        said = tools.submit_experiment("waits", confirm=True)
        assert list(said.jobs) == ["rank4", "rank8"] and "1 more wait for room" in said.summary
        others = [cluster.submit("--hold", "--output=/dev/null", "--wrap=true") for _ in range(4)]
        cluster.wait_for((tmp_path / "pauses").is_file, 60, "second try")
        (log,) = folder.glob("slurm-*-close.out")
        assert "the queue takes 0 more of your jobs (of 5 at once), and the next run needs 3" in log.read_text()
        assert [row.state for row in tools.experiment_status("waits").runs] == [
            State.COMPLETED, State.COMPLETED, State.PENDING
        ]  # fmt: skip
        cluster.run("scancel", *others)
        (tmp_path / "go_on").touch()
        assert Counter(row.state for row in ended("waits").runs) == {State.COMPLETED: 3}
        assert (tmp_path / "pauses").read_text() == "30\n" and "Submitted 1 runs to Slurm" in log.read_text()


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "limited", nodes=2, cpus=32, max_submit=50) as cluster:
        yield cluster


@pytest.mark.timeout(1500)
def test_300_runs_under_a_limit_of_50_are_fed_in_chunks(lab: Path, limited: Cluster, monkeypatch: pytest.MonkeyPatch):
    use(lab, limited, monkeypatch)
    folder = set_up(
        lab, "many", variables={"lora_rank": list(range(1, 301))}, control="none", controls={"seconds_a_step": 0.0}
    )
    said = tools.submit_experiment("many", confirm=True)
    assert len(said.jobs) == 24 and "276 more wait for room" in said.summary
    assert tools.submit_experiment("many", confirm=True).jobs == {}  # those that wait are not submitted twice
    answer = ended("many", 900)
    assert Counter(row.state for row in answer.runs) == {State.COMPLETED: 300}
    assert {row.attempt for row in answer.runs} == {1}
    assert len(list(folder.glob("slurm-*-close.out"))) >= 12
