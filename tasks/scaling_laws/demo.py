"""The study in small, from text to verdicts, on two CPU cores: `python tasks/scaling_laws/demo.py`.

Every step is a command that you could type; each is printed before it runs. Fails if a run is lost for another reason
than that it diverged, or if the coordinate check does not tell muP from the standard parametrisation, which is its
negative control.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks.demo import ROOT, chiplog, experiment, free_names, main, say

FLAT = 0.1  # largest slope of the coordinate check under a right parametrisation


def demo() -> list[str]:
    """What is wrong with the results, in words."""
    say("Real text: the sources of Python's standard library, a byte a token.")
    chiplog("create-dataset", "scaling_laws")
    (name,) = free_names("scaling-laws")
    say("A grid of sizes and tokens, sweeps of learning rates, a ladder of changes, LSTMs.")
    experiment("scaling_laws", "reduced", name)
    say("What the runs show, and what they do not.")
    chiplog("summarize-experiment", name, "--limit", "20", check=False)  # it says no where a run did not end well
    print(f"\nRead experiments/{name}/summary.md and analysis.md, and look at the pictures in figures/.")
    return check(ROOT / "experiments" / name)


def check(folder: Path) -> list[str]:
    """What is wrong with the experiment's analysis, in words."""
    found = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    problems = [f"{run}: {why}" for run, why in found["left_out"].items() if "diverged" not in why]
    steepest = {kind: max(map(abs, one["slopes"].values())) for kind, one in found["coordinates"].items()}
    if not steepest.get("mup", 1.0) <= FLAT < steepest.get("standard", 0.0):
        problems.append(f"the coordinate check does not tell muP from the standard parametrisation: {steepest}")
    return problems


if __name__ == "__main__":
    main(demo, str(__doc__))
