"""Trains many models that differ in a few settings, on one machine: one thread each, as many at once as it has cores.

    python -m trainer.sweep --config base.yaml --out DIR --vary lr=0.001,0.003 --vary seed=0,1,2 [--at-once N]

Each run has a folder of its own under DIR, named by what varies (- for /), with its config.yaml, log and all that
train.py writes. Small models on several threads wait more than they compute, so runs beside one another beat runs in
sequence; benchmarks/trainer.py says by how much. Runs that are done are left as they are. SIGUSR1, SIGTERM and
Ctrl-C are handed on, and the exit code is 75 then; 1 where a run failed, 0 when all are done.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

# isort: split
import yaml
from tqdm import tqdm

from trainer.job import REQUEUE, Stop, UserError
from trainer.settings import check_same, checked, identity

RESTARTS = 10  # of a run that asks to be started again, as after running out of memory
POLL_S = 0.05


def main() -> int:
    """The exit code of the sweep."""
    parser = argparse.ArgumentParser(description="Trains many models, one thread each.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with every setting of train.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for the folders of the runs")
    parser.add_argument("--vary", action="append", required=True, help="a setting and its values: lr=0.001,0.003")
    parser.add_argument("--at-once", type=int, default=len(os.sched_getaffinity(0)), help="runs beside one another")
    arguments = parser.parse_args()
    runs = make_runs(arguments.config, arguments.out, arguments.vary)
    return sweep(runs, max(1, arguments.at_once), Stop())


def make_runs(config: Path, out: Path, vary: list[str]) -> list[Path]:
    """The folders of the product of all values, each with its config.yaml. Raises UserError before it writes any."""
    schema = Path(__file__).with_name("train.yaml")
    base = vars(job.read_config(config, schema))
    values: dict[str, list[Any]] = {}
    for text in vary:
        key, _, listed = text.partition("=")
        if key in values:
            raise UserError(f"--vary {key} is given twice: list all its values in one")
        if key not in base:
            raise UserError(f"--vary {text}: there is no setting {key!r}; train.yaml explains those there are")
        values[key] = [_value(word) for word in listed.split(",")]
    runs: dict[Path, dict[str, Any]] = {}
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        name = "_".join(f"{key}{value}" for key, value in settings.items()).replace("/", "-")
        if out / name in runs:
            raise UserError(f"two runs would be called {name}: give each value once, and files of other names")
        runs[out / name] = {**base, **settings}
    for folder, settings in runs.items():
        _check(folder, settings, job.default_settings(schema))
    for folder, settings in runs.items():
        if job.done_steps(folder) >= settings["max_steps"]:
            continue  # its config.yaml says how it was made
        folder.mkdir(parents=True, exist_ok=True)
        job.write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    return list(runs)


def _check(folder: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises UserError for settings that cannot be, or where a run that cannot go on with them has begun."""
    try:
        job.check_kinds(settings, defaults)
        checked(SimpleNamespace(**settings))
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from error
    file = folder / "config.yaml"
    if (folder / "metrics.jsonl").is_file() and file.is_file():
        before = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        check_same(identity(SimpleNamespace(**settings)), before, folder, "take another --out")


def sweep(runs: list[Path], at_once: int, stop: Stop) -> int:
    """Trains all, and returns the exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train"])  # torch is imported once
    waiting, running, codes = list(runs), {}, {}
    starts = dict.fromkeys(runs, 0)
    with tqdm(total=len(runs), mininterval=0.1 if sys.stderr.isatty() else 10.0) as bar:
        while waiting or running:
            while waiting and len(running) < at_once and not stop.asked:
                folder = waiting.pop(0)
                starts[folder] += 1
                running[folder] = _started(context, folder)
            if stop.asked:
                _hand_on(running)
                waiting.clear()
            for folder in [folder for folder, process in running.items() if process.exitcode is not None]:
                code = running.pop(folder).exitcode
                codes[folder] = REQUEUE if stop.asked and code == -signal.SIGTERM else code  # it did not listen yet
                if codes[folder] == REQUEUE and starts[folder] <= RESTARTS and not stop.asked:
                    waiting.append(folder)
                else:
                    bar.update(1)
            time.sleep(POLL_S)
    failed = [folder for folder, code in codes.items() if code not in (0, REQUEUE)]
    for folder in failed:
        print(f"error: {folder.name} ended with {codes[folder]}: see {folder / 'log'}", file=sys.stderr)
    return 1 if failed else REQUEUE if len(codes) < len(runs) or REQUEUE in codes.values() else 0


def _started(context: Any, folder: Path) -> BaseProcess:
    process = context.Process(target=_train, args=(str(folder),))
    process.start()
    return process


def _train(folder: str) -> None:
    """One run, in a process of its own whose output goes to the folder's log."""
    import torch

    from trainer import train

    torch.set_num_threads(1)
    log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train", "--config", f"{folder}/config.yaml", "--out", folder]
    stop = Stop()
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    job.run(lambda: train.main(stop))


def _end_with_the_sweep() -> None:
    """Asks this run to stop, as a signal does, when the process that began it is gone."""
    parent = multiprocessing.parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _hand_on(running: dict[Path, BaseProcess]) -> None:
    """SIGTERM to each that listens; once, since its process has ended when this is asked again."""
    for process in running.values():
        if process.pid and process.is_alive():
            process.terminate()
    for process in running.values():
        process.join()


def _value(word: str) -> Any:
    try:
        value = yaml.safe_load(word)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for a date such as 2026-13-01
        raise UserError(f"--vary: {word!r} is no value: list values as in lr=0.001,0.003") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a word
        except ValueError:
            return value
    return value


if __name__ == "__main__":
    job.run(main)
