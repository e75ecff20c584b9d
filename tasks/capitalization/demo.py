"""The main job on this machine, from a question to a summary: `make demo`, or `python tasks/capitalization/demo.py`.

Every step is a command that you could type; each is printed before it runs. Fails if fine-tuning does not beat the
base models far outside the interval.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHIPLOG = str(Path(sys.executable).with_name("chiplog"))
WORDS = {"words_len": 5, "train_percent": 80, "n": 1000, "seed": 0, "chat": "false"}
WAIT_S = 600
FAR = 0.2  # the interval of fine-tuned minus base must lie wholly above this share


def main() -> int:
    """Exit code: 0 if the demo showed what it should."""
    began = time.monotonic()
    say("Two tiny Llama base models, made on the spot to be fine-tunable: they copy words, and do not capitalise.")
    run(sys.executable, "tasks/capitalization/make_base_models.py", "--out", "models")
    say("A data set whose truth is known, from a seed.")
    chiplog("create-dataset", "capitalization", *(f"--options={key}={value}" for key, value in WORDS.items()))
    chiplog("check-dataset", "words_5L_80P_1000.json", "--model", "tiny-llama-s")
    chiplog("check-model", "tiny-llama-m")

    first, second = free_names()
    say("Plan 1: which LoRA rank, for two model sizes? Two base models as controls.")
    experiment("demo", first)
    chiplog("summarize-experiment", first)
    say("Plan 2: does twice the training help? Its time and memory come from plan 1's ledger.")
    experiment("demo_longer", second)
    chiplog("summarize-experiment", second)
    say("Predicted against actual:")
    chiplog("collect-records", second)

    problems = [words for name in (first, second) for words in check(name)]
    for words in problems:
        print(f"DEMO FAILED: {words}", flush=True)
    if not problems:
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        say(f"Every fine-tuned arm beats its base model far outside the interval. {minutes} min {seconds} s.")
        print(f"Read experiments/{first}/summary.md and look at experiments/{first}/figures/scores.png")
    return 1 if problems else 0


def experiment(plan: str, name: str) -> None:
    """Plan, set up, submit, wait."""
    chiplog("plan-experiment", "--study", "capitalization", "--plan", plan, "--name", name)
    chiplog("setup-experiment-dirs", name)
    chiplog("submit-experiment", name, "--confirm")
    try:
        chiplog("experiment-status", name, "--wait-s", str(WAIT_S), check=False)
    except KeyboardInterrupt:
        print(f"\nThe jobs go on. To end them: chiplog cancel-experiment {name}", flush=True)
        raise


def check(name: str) -> list[str]:
    """What is wrong with an experiment's result, in words."""
    done = subprocess.run(
        [CHIPLOG, "summarize-experiment", name, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    answer = json.loads(done.stdout)
    problems = [
        f"{row['run']} is {row['state']}: {row['reason']}" for row in answer["rows"] if row["state"] != "COMPLETED"
    ]
    against = [c for c in answer["comparisons"] if c["against_control"]]
    if not against:
        problems.append(f"{name} compares nothing with a control")
    for c in against:
        if not c["shown"] or c["difference"]["interval"]["low"] < FAR:
            problems.append(c["words"])
    return problems


def free_names() -> tuple[str, str]:
    """Names that no experiment has yet, so that the demo can run again."""
    number = 1
    while any((ROOT / "experiments" / f"{name}-{number}").exists() for name in ("demo-rank", "demo-longer")):
        number += 1
    return f"demo-rank-{number}", f"demo-longer-{number}"


def chiplog(*arguments: str, check: bool = True) -> None:
    """Runs a chiplog command in the checkout."""
    print(f"\n$ chiplog {shlex.join(arguments)}", flush=True)
    subprocess.run([CHIPLOG, *arguments], cwd=ROOT, check=check)


def run(*command: str) -> None:
    """Runs another command in the checkout."""
    print(f"\n$ {shlex.join(('python', *command[1:]))}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


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
