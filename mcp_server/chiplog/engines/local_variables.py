"""The variables that a job of this machine finds, with the names and meanings that Slurm gives them."""

from __future__ import annotations

import getpass
import os
import socket
import sqlite3


def variables(queue: sqlite3.Connection, row: sqlite3.Row, folder: str) -> dict[str, str]:
    """Of one job: a batch script's on the only node of a cluster called local."""
    node, number = socket.gethostname(), str(row["id"])
    cpus, tasks = str(row["cpus"]), str(row["tasks"])
    found = {
        "SLURM_CLUSTER_NAME": "local",
        "SLURM_JOB_PARTITION": "local",
        "SLURM_JOB_ID": number,
        "SLURM_JOBID": number,
        "SLURM_JOB_NAME": row["name"],
        "SLURM_JOB_USER": getpass.getuser(),
        "SLURM_JOB_UID": str(os.getuid()),
        "SLURM_JOB_GID": str(os.getgid()),
        "SLURM_SUBMIT_DIR": folder,
        "SLURM_SUBMIT_HOST": node,
        "SLURMD_NODENAME": node,
        **dict.fromkeys(("SLURM_JOB_NODELIST", "SLURM_NODELIST"), node),
        **dict.fromkeys(("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), "1"),
        **dict.fromkeys(("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"), "0"),
        **dict.fromkeys(("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE"), tasks),
        **dict.fromkeys(("SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE"), cpus),
        "SLURM_CPUS_PER_TASK": str(row["cpus"] // row["tasks"]),
    }
    if row["restarts"]:
        found["SLURM_RESTART_COUNT"] = str(row["restarts"])
    return found | (_of_array(queue, row) if row["array"] is not None else {})


def _of_array(queue: sqlite3.Connection, row: sqlite3.Row) -> dict[str, str]:
    asked = "SELECT count(*), min(task), max(task) FROM queue WHERE array = ?"
    count, least, most = queue.execute(asked, (row["array"],)).fetchone()
    return {
        "SLURM_ARRAY_JOB_ID": str(row["array"]),
        "SLURM_ARRAY_TASK_ID": str(row["task"]),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": str(least),
        "SLURM_ARRAY_TASK_MAX": str(most),
    }
