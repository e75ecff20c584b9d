"""Real trainings of a tiny model on the real cluster, through what ends jobs there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from chiplog import tools
from chiplog.record import State
from tests.recipes.helpers import events, make_llama
from tests.slurm.cluster import Cluster
from tests.slurm.test_experiments import ended


@pytest.fixture
def trains(workspace: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a tiny Llama and words, whose jobs run on the cluster with the packages of these tests."""
    return use(workspace, cluster, monkeypatch)


def use(workspace: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    bin_folder = json.dumps(f"export PATH={Path(sys.executable).parent}:$PATH")
    (workspace / "chiplog.toml").write_text(
        f'[slurm]\npartition = "gpu"\nsetup = [{bin_folder}]\nenvironment = {{ GLOO_SOCKET_IFNAME = "lo" }}\n'
    )
    make_llama(workspace / "models" / "tiny")
    made = [("abcdefgh" * 2)[i % 8 : i % 8 + 2 + i % 5] + "xyz"[i % 3] for i in range(48)]
    rows = [{"input": word, "output": word.capitalize()} for word in made]
    (workspace / "data").mkdir()
    (workspace / "data" / "words.json").write_text(json.dumps({"train": rows[:40], "test": rows[40:]}))
    return workspace


def plan(name: str, **given: Any) -> None:
    settings = {"lora_rank": 4, "batch_size": 4, "lr": 0.01, "warmup_steps": 2, "epochs": 1000, "dtype": "fp32"}
    tools.plan_experiment(
        question="How low does the loss get?", models={"tiny": "tiny"}, dataset="data/words.json", gpus=0,
        controls={**settings, "max_seq_len": 64, "device": "cpu", **given.pop("controls", {})},
        variables={"lora_alpha": [8]}, control="none", name=name, **given,
    )  # fmt: skip
    tools.setup_experiment_dirs(name)


def started(run: Path) -> list[dict[str, Any]]:
    """Its starts, none before its first."""
    return events(run, "start") if (run / "metrics.jsonl").exists() else []


@pytest.mark.timeout(900)
def test_a_run_that_its_time_limit_ends_resumes_to_the_same_loss(trains: Path, cluster: Cluster):
    """Once it has gone on, its limit is lifted: on a slow machine it would be ended every few steps."""
    plan("limited", controls={"max_steps": 4000}, time_limit_s=60)
    plan("free", controls={"max_steps": 4000})
    folders = [trains / "experiments" / name / "runs" / "lora_alpha8" for name in ("limited", "free")]
    (job,) = tools.submit_experiment("limited", confirm=True).jobs.values()
    tools.submit_experiment("free", confirm=True)
    cluster.wait_for(lambda: len(started(folders[0])) > 1, 300, "second start")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    (limited,), (free,) = (ended(name, 400).runs for name in ("limited", "free"))
    assert limited.state is free.state is State.COMPLETED
    starts = [started(folder) for folder in folders]
    assert len(starts[0]) > 1 and len(starts[1]) == 1
    last = [events(folder, "step")[-1] for folder in folders]
    assert last[0]["step"] == last[1]["step"] == 4000 and last[0]["loss"] == last[1]["loss"]


@pytest.mark.timeout(900)
def test_two_nodes_told_of_their_limit_go_on_to_the_losses_of_one_process(trains: Path, cluster: Cluster):
    """The signal goes to the script alone, on the first node, as `--signal=B:USR1` sends it."""
    plan("one", controls={"max_steps": 200})
    plan("two", controls={"max_steps": 200}, nodes=2)
    one, two = (trains / "experiments" / name / "runs" / "lora_alpha8" for name in ("one", "two"))
    tools.submit_experiment("one", confirm=True)
    (job,) = tools.submit_experiment("two", confirm=True).jobs.values()
    cluster.wait_for(lambda: (two / "metrics.jsonl").exists() and events(two, "step"), 240, "first step")
    assert cluster.squeue(job, fields="%D") == ["2"]
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    for name in ("one", "two"):
        (row,) = ended(name, 400).runs
        assert (row.state, row.restarts) == (State.COMPLETED, 1 if name == "two" else 0)
    starts = events(two, "start")
    assert [start["world_size"] for start in starts] == [2, 2] and 0 < starts[1]["step"] < 200
    losses = [{step["step"]: step["loss"] for step in events(run, "step")} for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[1]) == 200
    record = tools.collect_records("two").records[0]
    assert (record.usage.nodes, record.usage.cpus) == (2, 2)


@pytest.mark.timeout(900)
def test_a_run_whose_node_goes_down_goes_on_elsewhere(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Cluster(tmp_path / "dies") as cluster:
        trains = use(workspace, cluster, monkeypatch)
        plan("down", controls={"max_steps": 1500})
        (job,) = tools.submit_experiment("down", confirm=True).jobs.values()
        run = trains / "experiments" / "down" / "runs" / "lora_alpha8"
        cluster.wait_for(lambda: list(run.glob("checkpoints/step_*")), 240, "checkpoint")
        cluster.kill_node(cluster.squeue(job, fields="%N")[0])
        (row,) = ended("down", 400).runs
        assert row.state is State.COMPLETED and [record["step"] for record in events(run, "step")][-1] == 1500
        _, again = events(run, "start")
        assert 0 < again["step"] < 1500
        assert row.restarts == 1
