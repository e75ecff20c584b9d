"""How well the first 50 steps of a run foretell its training: from runs that have ended.

    python -m benchmarks.first_steps EXPERIMENT_FOLDER...

Of each run that was never interrupted, what `experiment_status` would have said after so many steps, and what the rest
then took.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from chiplog.ledger.metrics import Start, Step, read_events
from chiplog.progress import training_left

AFTER = (20, 50, 100)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="How well a run's first steps foretell its training.")
    parser.add_argument("folders", nargs="+", type=Path, help="of experiments that have ended")
    files = [file for folder in parser.parse_args().folders for file in sorted(folder.glob("runs/*/metrics.jsonl"))]
    print("| after step | runs | median error, % | mean error, % | intervals that hold |\n|---|---|---|---|---|")
    for after in AFTER:
        told = [one for file in files if (one := foretold(file, after))]
        if told:
            errors = [100 * abs(value / actual - 1) for value, _, _, actual in told]
            held = sum(low <= actual <= high for _, low, high, actual in told)
            cells = f"{statistics.median(errors):.1f} | {statistics.fmean(errors):.1f} | {held} of {len(told)}"
            print(f"| {after} | {len(told)} | {cells} |")


def foretold(file: Path, after: int) -> tuple[float, float, float, float] | None:
    """Seconds of the rest of a run as foretold after that step, its interval, and as it was; null for a short run."""
    events = read_events(file)
    steps = [event for event in events if isinstance(event, Step)]
    starts = [event for event in events if isinstance(event, Start)]
    if len(starts) != 1 or len(steps) < 2 * after or steps[-1].step != starts[0].total_steps:
        return None
    left = training_left(steps[:after], steps[-1].step)
    return (left.value, left.low, left.high, sum(step.seconds for step in steps[after:])) if left else None


if __name__ == "__main__":
    main()
