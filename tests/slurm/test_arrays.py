"""Arrays whose list of indices Slurm's commands do not show in full, or not one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from chiplog.engines import Batch, SlurmEngine
from chiplog.record import State
from tests.slurm.cluster import Cluster

SQUARES = tuple(n * n for n in range(31))  # in more than the 64 bytes that are shown of a list
EVEN = tuple(range(0, 60, 2))  # shown as 0-58:2


def test_an_array_with_a_long_list_of_indices_is_followed_by_its_elements(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While it waits by squeue; and once it was cancelled and Slurm has forgotten it, by accounting."""
    script = workspace / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --output=slurm-%A_%a.out\ntrue\n")
    with Cluster(tmp_path / "forgets", nodes=1, min_job_age=2) as cluster:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        engine = SlurmEngine()
        batches = [Batch(script=script, folder=workspace, indices=indices) for indices in (SQUARES, EVEN)]
        squares, even = engine.submit(batches, "long", 1)
        first, second = (ids[0].partition("_")[0] for ids in (squares, even))
        assert squares == [f"{first}_{index}" for index in SQUARES]
        assert "900" not in cluster.squeue(first, fields="%i")[0]
        assert cluster.squeue(second, fields="%i") == [f"{second}_[0-58:2%1]"]
        assert sorted(engine.held("long")) == sorted([*squares, *even])
        assert Counter(job.state for job in engine.jobs([*squares, *even])) == {State.PENDING: 61}
        cluster.run("scancel", first, second)

        def forgotten() -> bool:
            return not cluster.run("squeue", "-h", "-t", "all", "-j", f"{first},{second}", check=False).stdout

        cluster.wait_for(forgotten, 60)
        (row,) = cluster.wait_for(lambda: cluster.sacct(first, "-X"), 30)
        assert row["JobID"].startswith(f"{first}_[0-1,4,9,") and "900" not in row["JobID"]
        cancelled = [(name, State.CANCELLED) for name in [*squares, *even]]
        cluster.wait_for(lambda: [(job.id, job.state) for job in engine.jobs([*squares, *even])] == cancelled, 30)
