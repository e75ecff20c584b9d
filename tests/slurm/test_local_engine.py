"""What the local engine gives a script, beside what Slurm gives the same script."""

from __future__ import annotations

from pathlib import Path

from chiplog.engines import Batch, LocalEngine
from chiplog.engines.job import read_options
from tests.slurm.cluster import Cluster

# What is another thing on another cluster.
OWN = {
    "CLUSTER_NAME", "JOB_PARTITION", "JOB_ID", "JOBID", "ARRAY_JOB_ID", "JOB_NODELIST", "NODELIST", "D_NODENAME",
    "SUBMIT_DIR",
}  # fmt: skip
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=said
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=1
env | grep ^SLURM > "$SLURM_ARRAY_TASK_ID-$WHERE"
"""


def said(file: Path) -> dict[str, str]:
    lines = [line.partition("=") for line in file.read_text().splitlines()]
    return {name.removeprefix("SLURM").removeprefix("_"): value for name, _, value in lines}


def test_a_local_job_finds_the_variables_of_slurm_with_the_same_values(cluster: Cluster, tmp_path: Path):
    script = tmp_path / "said.sbatch"
    script.write_text(SCRIPT.replace("$WHERE", "local"))
    assert read_options(script).tasks == 2
    engine = LocalEngine(tmp_path / "queue")
    (ids,) = engine.submit([Batch(script=script, folder=tmp_path, indices=(3, 5))], "test")
    engine.release(ids)
    there = tmp_path / "there.sbatch"
    there.write_text(SCRIPT.replace("$WHERE", "slurm"))
    cluster.ended(cluster.submit("-D", tmp_path, "--output=/dev/null", "--array=3,5", there))
    cluster.wait_for(lambda: all(job.state.ended for job in engine.jobs(ids)), 30, "local jobs")
    for index in (3, 5):
        local, slurm = (said(tmp_path / f"{index}-{where}") for where in ("local", "slurm"))
        assert set(local) <= set(slurm)
        assert {n: v for n, v in local.items() if n not in OWN} == {n: slurm[n] for n in local if n not in OWN}
        assert len(local) > 25
