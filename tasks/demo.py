"""What the demos of the studies share: each step is a command that you could type, printed before it runs."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHIPLOG = str(Path(sys.executable).with_name("chiplog"))
WAIT_S = 600  # the most that one command waits


def main(demo: Callable[[], list[str]], about: str) -> None:
    """Runs a demo, which returns what is wrong, and ends the process: with 0 where nothing is."""
    argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.monotonic()
    try:
        problems = demo()
    except subprocess.CalledProcessError as error:
        sys.exit(f"DEMO FAILED: {shlex.join(error.cmd[:2])} ended with exit status {error.returncode}")
    except KeyboardInterrupt:
        sys.exit(130)
    for words in problems:
        print(f"DEMO FAILED: {words}", flush=True)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"\n{minutes} min {seconds} s.")
    sys.exit(1 if problems else 0)


def experiment(study: str, plan: str, name: str) -> None:
    """Plans, sets up and submits an experiment, and waits until its jobs have ended."""
    chiplog("plan-experiment", "--study", study, "--plan", plan, "--name", name)
    chiplog("setup-experiment-dirs", name)
    chiplog("submit-experiment", name, "--confirm")
    try:
        while not ended(name):
            chiplog("experiment-status", name, "--wait-s", str(WAIT_S), "--limit", "20", check=False)
    except KeyboardInterrupt:
        print(f"\nThe jobs go on. To end them: chiplog cancel-experiment {name}", flush=True)
        raise


def ended(name: str) -> bool:
    """Whether no job of an experiment waits or runs."""
    return not any(run["state"] in ("PENDING", "RUNNING") for run in answer("experiment-status", name)["runs"])


def answer(*arguments: str) -> dict[str, Any]:
    """What a chiplog command answers, with all its rows."""
    command = [CHIPLOG, *arguments, "--limit", "1000", "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout)


def free_names(*names: str) -> list[str]:
    """The names with a number that no experiment has yet, so that the demo can run again."""
    number = 1
    while any((ROOT / "experiments" / f"{name}-{number}").exists() for name in names):
        number += 1
    return [f"{name}-{number}" for name in names]


def chiplog(*arguments: str, check: bool = True) -> None:
    """Runs a chiplog command in the checkout."""
    print(f"\n$ chiplog {shlex.join(arguments)}", flush=True)
    subprocess.run([CHIPLOG, *arguments], cwd=ROOT, check=check)


def python(*command: str) -> None:
    """Runs a script in the checkout."""
    print(f"\n$ {shlex.join(('python', *command))}", flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def say(words: str) -> None:
    """A heading between the commands."""
    print(f"\n--- {words}", flush=True)
