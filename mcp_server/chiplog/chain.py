"""From runs to jobs: each run's evaluation after its training, runs that ask for the same in one array."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from chiplog.engines import After, Batch
from chiplog.engines.job import read_options
from chiplog.files import write_atomic
from chiplog.folder import ExperimentFolder
from chiplog.plan import Run
from chiplog.render import template_environment
from chiplog.settings import Settings
from chiplog.text import clock

ARRAYS = "arrays"
OWN = ("--job-name", "--output", "--time")  # options in which the jobs of an array may differ


class Chain(NamedTuple):
    """What is submitted for some runs."""

    batches: list[Batch]
    places: dict[str, list[tuple[int, int]]]  # of each run, its jobs in their order: which batch, and which of it


def scripts(folder: ExperimentFolder, run: Run) -> list[str]:
    """The scripts of a run that are still to be done, in their order."""
    if run.kind != "finetune":  # nothing is evaluated after it
        return ["run.sbatch"]
    is_trained = (folder.path / "runs" / run.name / "DONE").is_file()
    return ["eval.sbatch"] if is_trained else ["run.sbatch", "eval.sbatch"]


@contextmanager
def chained(folder: ExperimentFolder, runs: Sequence[Run], settings: Settings, close: bool) -> Iterator[Chain]:
    """The jobs of these runs, and with `close` a last one after all of them; its files go again if the block fails."""
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(_asks(folder, run, script) for script in scripts(folder, run))].append(run)
    chain = Chain([], {run.name: [] for run in runs})
    made: list[str] = []
    try:
        for members in groups.values():
            for place, script in enumerate(scripts(folder, members[0])):
                before = (len(chain.batches) - 1) if place else None
                if len(members) == 1:
                    home = folder.path / "runs" / members[0].name
                    after = () if before is None else (After(kind="afterok", batch=before),)
                    batch = Batch(script=home / script, folder=home, after=after)
                else:
                    made.append(_new_label(folder, members[0], script))
                    after = () if before is None else (After(kind="aftercorr", batch=before),)
                    batch = _array(folder, members, script, made[-1], settings).model_copy(update={"after": after})
                for number, run in enumerate(members):
                    chain.places[run.name].append((len(chain.batches), number))
                chain.batches.append(batch)
        if close:
            last = {places[-1][0] for places in chain.places.values()}
            after = tuple(After(kind="afterany", batch=number) for number in sorted(last))
            chain.batches.append(Batch(script=folder.path / "close.sbatch", folder=folder.path, after=after))
        yield chain
    except BaseException:
        for label in made:
            with suppress(OSError):
                (folder.path / ARRAYS / f"{label}.sbatch").unlink(missing_ok=True)
                shutil.rmtree(folder.path / ARRAYS / label, ignore_errors=True)
        raise


def _asks(folder: ExperimentFolder, run: Run, script: str) -> tuple[object, ...]:
    """What decides whether jobs can be one array: all options, and the time limit to a factor of two."""
    file = folder.path / "runs" / run.name / script
    limit = read_options(file).time_limit_s
    return (script, *_options(file), limit and (limit // 60).bit_length())


def _options(file: Path) -> list[str]:
    """The option lines of a script, without those that are its own."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#SBATCH ")]
    return [line for line in lines if not line.removeprefix("#SBATCH ").startswith(OWN)]


def _new_label(folder: ExperimentFolder, run: Run, script: str) -> str:
    """The name of a new array, by its number in the experiment and what its jobs do."""
    numbers = [int(file.name[:3]) for file in (folder.path / ARRAYS).glob("[0-9][0-9][0-9]-*")]
    there = max(numbers, default=0)
    does = "base" if run.kind == "control" else "train" if script == "run.sbatch" else "eval"
    return f"{there + 1:03}-{does}"


def _array(folder: ExperimentFolder, runs: Sequence[Run], script: str, label: str, settings: Settings) -> Batch:
    """Writes the array's script, and a link to the folder of each of its runs."""
    files = [folder.path / "runs" / run.name / script for run in runs]
    limits = [limit for file in files if (limit := read_options(file).time_limit_s)]
    options = _options(files[0]) + ([f"#SBATCH --time={clock(max(limits))}"] if limits else [])
    text = (
        template_environment()
        .get_template("array.sbatch.j2")
        .render(
            name=f"{folder.path.name}-{label.partition('-')[2]}",
            label=label,
            options=options,
            script=script,
            stagger_s=settings.slurm.stagger_s if settings.slurm else 0,
        )
    )
    home = folder.path / ARRAYS / label
    home.mkdir(parents=True)
    for number, run in enumerate(runs):
        (home / str(number)).symlink_to(Path("../../runs") / run.name)
    write_atomic(home.with_suffix(".sbatch"), text.encode())
    indices = tuple(range(len(runs)))
    return Batch(script=home.with_suffix(".sbatch"), folder=folder.path, indices=indices)
