"""What following a large experiment on Slurm costs: 1,000 runs submitted, polled and cancelled on a real cluster.

    python -m benchmarks.slurm

It starts a throw-away Slurm (its packages must be there) whose nodes never start these jobs: they ask for more than is
free. The time of a call is told as a ratio to `squeue --version`, which asks nobody.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from chiplog import engines, tools
from chiplog.engines import SlurmEngine
from tests.conftest import FAKE_RECIPES, make_model, make_words
from tests.slurm.cluster import Cluster

RUNS = 1000


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description="What following 1,000 runs on Slurm costs.").parse_args()
    with tempfile.TemporaryDirectory() as root, Cluster(Path(root) / "cluster", cpus=1) as cluster:
        os.environ |= {**cluster.env, "CHIPLOG_HOME": f"{root}/home", "CHIPLOG_WORKSPACE": f"{root}/lab"}
        set_up(Path(root) / "lab")
        begun = time.perf_counter()
        subprocess.run(["squeue", "--version"], capture_output=True, check=True)
        unit = time.perf_counter() - begun
        print("| what | calls | seconds | times squeue --version |\n|---|---|---|---|")
        steps = {
            f"submit {RUNS} runs: {2 * RUNS} jobs and one that closes": lambda: tools.submit_experiment(
                "many", confirm=True
            ),
            "how they stand": lambda: tools.experiment_status("many", limit=1),
            "how they stand, again": lambda: tools.experiment_status("many", limit=1),
            "submit again: nothing is": lambda: tools.submit_experiment("many", confirm=True),
            "cancel them": lambda: tools.cancel_experiment("many", confirm=True),
        }
        for what, step in steps.items():
            calls.clear()
            begun = time.perf_counter()
            step()
            seconds = time.perf_counter() - begun
            made = ", ".join(f"{name} {n}" for name, n in Counter(calls).items())
            print(f"| {what} | {made} | {seconds:.1f} | {seconds / unit:.0f} |")


calls: list[str] = []


def set_up(lab: Path) -> None:
    """A workspace with an experiment of that many runs, whose jobs will not start."""
    ask = SlurmEngine._ask

    def counted(self: SlurmEngine, *command: str, **given: object) -> subprocess.CompletedProcess[str]:
        calls.append(command[0])
        return ask(self, *command, **given)  # pyright: ignore[reportArgumentType]

    engines.SlurmEngine._ask = counted  # pyright: ignore[reportAttributeAccessIssue]
    lab.mkdir()
    os.chdir(lab)
    (lab / "chiplog.toml").write_text('[slurm]\npartition = "gpu"\n')
    make_model(lab / "models" / "small")
    make_words(lab / "data" / "words.json")
    (lab / "recipes").symlink_to(FAKE_RECIPES)
    subprocess.run(["sbatch", "--wrap", "sleep 3600", "--exclusive", "--nodes=2", "--chdir=/"], check=True)
    tools.plan_experiment(
        question="What does it cost?", models={"S": "small"}, dataset="data/words.json", name="many", gpus=0, limit=1,
        variables={"lora_rank": list(range(1, RUNS + 1))}, control="none", time_limit_s=600,
    )  # fmt: skip
    tools.setup_experiment_dirs("many")


if __name__ == "__main__":
    main()
