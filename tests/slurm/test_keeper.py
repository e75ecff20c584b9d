"""The cluster itself: it comes up beside others, and nothing of it stays, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.slurm.cluster import Cluster

# A child that starts a cluster with a job in it, says so, and then does not end by itself.
STARTS_A_CLUSTER = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(Path(sys.argv[1]), nodes=1) as cluster:
    two = cluster.folder / "two"
    cluster.submit("-o", "/dev/null", "--wrap", f"sleep 1000 & setsid sleep 1000 & sleep 0.5; touch {two}; wait")
    cluster.wait_for(two.exists, 30)
    print("up", flush=True)
    time.sleep(1000)
"""


def processes(folder: Path) -> list[str]:
    """The commands of all processes that belong to the cluster in a folder: it stands in the environment of each."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_CONF={folder}/slurm.conf".encode() in environ.read_bytes().split(b"\0"):
                found.append(environ.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:  # another user's, or it has just ended
            continue
    return found


def wait_until_gone(folder: Path) -> None:
    give_up = time.monotonic() + 30
    while (left := processes(folder)) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not left


def test_two_clusters_run_side_by_side_and_know_only_their_own_jobs(cluster: Cluster, tmp_path: Path):
    with Cluster(tmp_path / "other", nodes=3, cpus=4) as other:
        job = other.submit("--job-name=mine", "-o", "/dev/null", "--gres=gpu:2", "-c", "4", "--wrap", "sleep 1")
        assert other.ended(job) == {job: "COMPLETED"}
        assert other.run("squeue", "-h", "-t", "all", "-o", "%j").stdout == "mine\n"
        assert "mine" not in cluster.run("squeue", "-h", "-t", "all", "-o", "%j").stdout
        assert list(other.node_states()) == ["n1", "n2", "n3"]


def test_stop_leaves_no_process_though_jobs_run(tmp_path: Path):
    with Cluster(tmp_path / "c", nodes=1) as cluster:
        job = cluster.submit("-o", "/dev/null", "--wrap", "trap '' TERM INT; sleep 1000 & setsid sleep 1000")
        cluster.wait_for(lambda: cluster.squeue(job, fields="%T") == ["RUNNING"], 30)
        cluster.wait_for(lambda: sum("sleep" in command for command in processes(cluster.folder)) >= 2, 30)
    assert processes(cluster.folder) == []


def test_nothing_stays_of_a_cluster_whose_owner_is_interrupted_or_killed(tmp_path: Path):
    for number in (signal.SIGINT, signal.SIGKILL):
        folder = tmp_path / number.name
        child = subprocess.Popen(
            [sys.executable, "-c", STARTS_A_CLUSTER, str(folder)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert child.stdout
        with child.stdout:
            assert child.stdout.readline() == "up\n"
            found = processes(folder)
            child.send_signal(number)
            child.wait(30)
        assert len([command for command in found if command.startswith("sleep")]) == 2
        wait_until_gone(folder)
