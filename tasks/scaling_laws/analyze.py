"""What the runs of an experiment's folder show: laws, learning rates, compute, and what they leave open.

    python analyze.py experiments/NAME [--bootstrap 4000] [--no-coordinates]

Writes into the folder analysis.md (verdicts in words), analysis.json (every number), figures/*.png and figures.html (to
look into), and prints {"analysis", "json", "figures", "page", "shown", "not_shown"}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks.scaling_laws.analysis import Analysis, analyse
from tasks.scaling_laws.fit import DRAWS, whole
from tasks.scaling_laws.runs import object_of, read_experiment
from tasks.scaling_laws.verdicts import section
from trainer import job
from trainer.job import UserError


def main() -> int:
    """Exit code 0, when the files are written."""
    parser = argparse.ArgumentParser(description="Says what the runs of a folder show.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of an experiment, with runs/")
    parser.add_argument("--bootstrap", type=whole, default=4000, help=DRAWS)
    parser.add_argument("--seed", type=whole, default=0, help="of the draws")
    parser.add_argument("--coordinates", action=argparse.BooleanOptionalAction, default=True,
                        help="train small models for the coordinate check; minutes where widths are large")  # fmt: skip
    arguments = parser.parse_args()
    analysis = analyse(read_experiment(arguments.folder), arguments.bootstrap, arguments.seed)
    if arguments.coordinates:
        analysis.coordinates.update(coordinates_of(analysis, arguments.folder))
    print(json.dumps(write(analysis, arguments.folder)))
    return 0


def write(analysis: Analysis, folder: Path) -> dict[str, Any]:
    """Writes the files, and returns what is printed."""
    from tasks.scaling_laws.page import page
    from tasks.scaling_laws.pictures import draw_all

    figures = draw_all(analysis, folder / "figures")
    text = section(analysis)
    links = "".join(f"![{file.stem.replace('_', ' ')}](figures/{file.name})\n" for file in figures)
    title = f"Analysis of {folder.name}"
    points = "[The pictures to look into](figures.html): each point names its run.\n\n"
    job.write_text(folder / "analysis.md", f"# {title}\n\n{text}\n{points}{links}")
    job.write_text(folder / "figures.html", page(analysis, title))
    job.write_json(folder / "analysis.json", plain(analysis.as_dict()))
    said = [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]
    return {
        "analysis": str(folder / "analysis.md"),
        "json": str(folder / "analysis.json"),
        "figures": [str(file) for file in figures],
        "page": str(folder / "figures.html"),
        "shown": [line.removeprefix("Shown: ") for line in said if line.startswith("Shown: ")],
        "not_shown": [line.removeprefix("Not shown: ") for line in said if line.startswith("Not shown: ")],
    }


def coordinates_of(analysis: Analysis, folder: Path) -> dict[str, Any]:
    """The coordinate check with the settings of a Transformer of the experiment, if its text is here.

    It trains, so what it found stands in coordinates.json and is taken from there as long as the settings are the same.
    """
    config = next((run.config for run in analysis.found.runs if run.config["architecture"] == "transformer"), None)
    if config is None:
        return {}
    file = folder / "coordinates.json"
    known = (object_of(file.read_bytes()) or {}) if file.is_file() else {}
    if known.get("config") == config and isinstance(known.get("found"), dict):
        return known["found"]
    try:
        from tasks.scaling_laws.coordinate_check import check

        found = check(config)
    except (UserError, ImportError) as error:  # the text, or torch, is not here
        analysis.found.notes.append(f"No coordinate check: {error}.")
        return {}
    job.write_json(file, {"config": config, "found": found})
    return found


def plain(value: Any) -> Any:
    """A value that JSON has words for: what is no number is null."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


if __name__ == "__main__":
    job.run(main)
