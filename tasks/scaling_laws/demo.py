"""The study in small, from text to verdicts, on two CPU cores.

    python tasks/scaling_laws/demo.py [--folder experiments/scaling-laws-1] [--bootstrap 4000]

Every step is a command that you could type. Prints what the runs show and what they do not. A second call with the
same folder goes on where the first was ended. Fails if a run is lost for another reason than that it diverged, or if
the coordinate check does not tell muP from the standard parametrisation, which is its negative control.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from trainer import job

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "tasks" / "scaling_laws"
PLAN = "reduced"
FLAT = 0.1  # largest slope of the coordinate check under a right parametrisation
CAVEATS = """Whatever it shows, it does not show:
- that the exponents hold beyond these sizes: the largest model has 0.13 million parameters, the text is Python alone;
- that the learning rate of the grid is the best of each of its runs: it is one, carried over by muP;
- what a seed changes in the law: but for the ladder's control, the grid has one."""


def main() -> int:
    """Exit code: 0 if the demo did what it should."""
    parser = argparse.ArgumentParser(description="Runs the scaling-law study in small.", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="of the experiment; none: a new one under experiments/")
    parser.add_argument("--bootstrap", type=int, default=4000, help="fits to draws of the runs")
    arguments = parser.parse_args()
    began, folder = time.monotonic(), arguments.folder or free_folder()
    say("Real text: the sources of Python's standard library, a byte a token.")
    text = command("tasks/scaling_laws/data.py", "--out", str(folder / "data"))
    print(f"{text['rows']['train']:,} tokens to train on, {text['rows']['validation']:,} to validate on.")
    say(f"The plan `{PLAN}`: a grid of sizes and tokens, learning rates, a ladder, LSTMs. All runs train.")
    train_all(folder, Path(text["path"]))
    say("What it shows.")
    answer = command("tasks/scaling_laws/analyze.py", str(folder), "--bootstrap", str(arguments.bootstrap))
    print((folder / "analysis.md").read_text(encoding="utf-8").split("\n![")[0])
    say(CAVEATS)
    problems = check(folder)
    for words in problems:
        print(f"DEMO FAILED: {words}", flush=True)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(
        f"\n{minutes} min {seconds} s. Read {answer['analysis']}, look at {len(answer['figures'])} pictures beside it."
    )
    return 1 if problems else 0


def train_all(folder: Path, text: Path) -> None:
    """All runs of the plan in `folder`/runs, as many at once as there are cores: the longest first."""
    runs = sorted(plan_runs(text), key=lambda run: -run[1]["max_steps"] * run[1]["width"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{len(runs)} runs, {cores} at once.", flush=True)
    with ThreadPoolExecutor(cores) as pool:
        trainings = [pool.submit(train, folder / "runs" / name, config) for name, config in runs]
        for n, training in enumerate(as_completed(trainings), 1):
            print(f"  {n:3} of {len(runs)}: {training.result()}", flush=True)


def plan_runs(text: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and every setting of each run of the plan."""
    defaults = job.default_settings(ROOT / "trainer" / "train.yaml")
    plan = yaml.safe_load((STUDY / "experiments.yaml").read_text(encoding="utf-8"))[PLAN]
    for experiment in plan["experiments"]:
        seeds = experiment.get("seeds", [0])
        for cell, seed in itertools.product(experiment["runs"], seeds):
            shown = {**cell, **({"seed": seed} if len(seeds) > 1 else {})}
            name = "_".join(
                f"{key}-{value}" if isinstance(value, str) else f"{key}{value}" for key, value in shown.items()
            )
            changed = {**experiment.get("controls", {}), **cell, "seed": seed, "dataset": str(text), "device": "cpu"}
            yield name, defaults | changed


def train(folder: Path, config: dict[str, Any]) -> str:
    """One training, with a core of its own; in words how it ended. One that has ended is not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    job.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "trainer.train", "--config", str(folder / "config.yaml"), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "train.log").open("a") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode
    return f"{folder.name}" + (f" ended with exit code {code}, see {log.name}" if code else "")


def check(folder: Path) -> list[str]:
    """What is wrong, in words."""
    found = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    problems = [f"{run}: {why}" for run, why in found["left_out"].items() if "diverged" not in why]
    steepest = {kind: max(map(abs, one["slopes"].values())) for kind, one in found["coordinates"].items()}
    if not steepest.get("mup", 1.0) <= FLAT < steepest.get("standard", 0.0):
        problems.append(f"the coordinate check does not tell muP from the standard parametrisation: {steepest}")
    return problems


def free_folder() -> Path:
    """A folder that is not there yet, so that the demo can run again."""
    return next(f for n in itertools.count(1) if not (f := ROOT / "experiments" / f"scaling-laws-{n}").exists())


def command(*words: str) -> Any:
    """What a command of the study prints, as JSON."""
    print(f"\n$ {shlex.join(('python', *words))}", flush=True)
    done = subprocess.run((sys.executable, *words), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def say(words: str) -> None:
    """A heading between the commands."""
    print(f"\n--- {words}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"DEMO FAILED: {shlex.join(error.cmd[:2])} ended with exit status {error.returncode}")
    except KeyboardInterrupt:
        sys.exit(130)
