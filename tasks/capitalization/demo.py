"""The main job on this machine, from a question to a summary: `make demo`, or `python tasks/capitalization/demo.py`.

Every step is a command that you could type; each is printed before it runs. Fails if fine-tuning does not beat the
base models far outside the interval.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks.demo import answer, chiplog, experiment, free_names, main, python, say

WORDS = {"words_len": 5, "train_percent": 80, "n": 1000, "seed": 0, "chat": "false"}
FAR = 0.2  # the interval of fine-tuned minus base must lie wholly above this share


def demo() -> list[str]:
    """What is wrong with the results, in words."""
    say("Two tiny Llama base models, made on the spot to be fine-tunable: they copy words, and do not capitalise.")
    python("tasks/capitalization/make_base_models.py", "--out", "models")
    say("A data set whose truth is known, from a seed.")
    chiplog("create-dataset", "capitalization", *(f"--options={key}={value}" for key, value in WORDS.items()))
    chiplog("check-dataset", "words_5L_80P_1000.json", "--model", "tiny-llama-s")
    chiplog("check-model", "tiny-llama-m")

    first, second = free_names("demo-rank", "demo-longer")
    say("Plan 1: which LoRA rank, for two model sizes? Two base models as controls.")
    experiment("capitalization", "demo", first)
    chiplog("summarize-experiment", first)
    say("Plan 2: does twice the training help? Its time and memory come from plan 1's ledger.")
    experiment("capitalization", "demo_longer", second)
    chiplog("summarize-experiment", second)
    say("Predicted against actual:")
    chiplog("collect-records", second)

    problems = [words for name in (first, second) for words in check(name)]
    if not problems:
        say("Every fine-tuned arm beats its base model far outside the interval.")
        print(f"Read experiments/{first}/summary.md and look at experiments/{first}/figures/scores.png")
    return problems


def check(name: str) -> list[str]:
    """What is wrong with an experiment's result, in words."""
    found = answer("summarize-experiment", name)
    problems = [
        f"{row['run']} is {row['state']}: {row['reason']}" for row in found["rows"] if row["state"] != "COMPLETED"
    ]
    against = [c for c in found["comparisons"] if c["against_control"]]
    if not against:
        problems.append(f"{name} compares nothing with a control")
    for c in against:
        if not c["shown"] or c["difference"]["interval"]["low"] < FAR:
            problems.append(c["words"])
    return problems


if __name__ == "__main__":
    main(demo, str(__doc__))
