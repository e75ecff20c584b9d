"""The runs of an experiment's folder as points of a law, and by name what cannot be one and why.

Reads records.jsonl (how each job ended), and of each run config.yaml, metrics.jsonl and guards.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer import job
from trainer.job import UserError

TRAIN = Path(__file__).resolve().parents[2] / "trainer" / "train.yaml"
# What makes runs one arm, whatever their size, length, learning rate and seed.
ARM = ("architecture", "parametrization", "activation", "norm", "norm_position", "position", "init", "optimizer",
       "lr_schedule", "tied")  # fmt: skip
LSTM_ARM = ("architecture", "depth", "parametrization", "init", "optimizer", "lr_schedule", "tied")
DIVERGED = "finite loss"  # the guard that says so: such a run is left out for it


@dataclass(frozen=True)
class Run:
    """A training that ended as planned, with the validation loss at its end in nats a token."""

    name: str
    config: dict[str, Any]
    n: int  # parameters
    d: int  # tokens
    flops: float  # of the training, exact
    loss: float
    val_sha256: str = ""
    failed_guards: tuple[str, ...] = ()

    @property
    def arm(self) -> tuple[tuple[str, Any], ...]:
        """The settings that make it one of its arm."""
        return arm_of(self.config)

    @property
    def cell(self) -> tuple[Any, ...]:
        """What runs of different arms must share to be compared one by one."""
        return tuple(self.config[key] for key in ("width", "depth", "max_steps", "batch_size", "seq_len"))


@dataclass(frozen=True)
class Lost:
    """A run without a loss to fit. `value` is an infinite loss where it diverged: that is a result."""

    name: str
    why: str
    config: dict[str, Any] = field(default_factory=dict)
    diverged: bool = False


@dataclass(frozen=True)
class Found:
    """All runs of a folder: nothing is dropped without its name and a reason."""

    runs: list[Run]
    lost: list[Lost]
    notes: list[str]  # what was passed over in runs that count

    def in_words(self) -> list[str]:
        """A line on how many count, one for each that does not, and the notes."""
        n = len(self.runs) + len(self.lost)
        lines = [f"{len(self.runs)} of {n} runs ended with a loss."]
        return lines + [f"Left out: {one.name}, {one.why}." for one in self.lost] + self.notes


def read_experiment(folder: Path) -> Found:
    """Raises UserError for a folder without runs."""
    ends = _ends(folder)
    names = sorted({run.name for run in (folder / "runs").glob("*") if run.is_dir()} | set(ends))
    if not names:
        raise UserError(f"{folder} holds no runs/: give the folder of an experiment")
    notes: list[str] = []
    each = [_read(folder / "runs" / name, ends.get(name), notes) for name in names]
    runs = [one for one in each if isinstance(one, Run)]
    return Found(runs, [one for one in each if isinstance(one, Lost)], notes)


def arm_of(config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings by which arms differ, with their names."""
    keys = LSTM_ARM if config["architecture"] == "lstm" else ARM
    return tuple((key, config[key]) for key in keys)


def usual(arm: tuple[tuple[str, Any], ...]) -> int:
    """How many settings of an arm are the trainer's defaults: of two that could be the control, the plainer one is."""
    defaults = job.default_settings(TRAIN)
    return sum(defaults[key] == value for key, value in arm)


def arm_names(arms: Iterable[tuple[tuple[str, Any], ...]]) -> dict[tuple[tuple[str, Any], ...], str]:
    """A short name for each arm: its architecture, and what differs between arms and is not the trainer's default."""
    arms = list(dict.fromkeys(arms))
    values: dict[str, set[Any]] = {}
    for arm in arms:
        for key, value in arm:
            values.setdefault(key, set()).add(value)
    return {arm: _named(arm, values) for arm in arms}


def _named(arm: tuple[tuple[str, Any], ...], values: dict[str, set[Any]]) -> str:
    defaults, told = job.default_settings(TRAIN), []
    for key, value in arm:
        differs = len(values[key]) > 1 and (value != defaults[key] or key == "parametrization")
        if key == "depth":
            told.append(f"{value} layer{'s' * (value > 1)}")
        elif key == "architecture" or differs:
            told.append("untied" if key == "tied" else str(value))
    return ", ".join(told)


def _ends(folder: Path) -> dict[str, dict[str, Any]]:
    """The last record of each run, by name; none where nothing was collected."""
    file = folder / "records.jsonl"
    records: dict[str, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        record = _line(line)
        if record and record.get("run"):
            records[record["run"]] = record
    return records


def _read(folder: Path, record: dict[str, Any] | None, notes: list[str]) -> Run | Lost:
    name = folder.name
    config = _config(folder, record)
    if config is None:
        return Lost(name, "it has no config.yaml and no record of its settings")
    if not (folder / "metrics.jsonl").is_file():
        return Lost(name, _unstarted(record), config)
    events, odd = _events(folder / "metrics.jsonl")
    if odd:
        notes.append(f"In {name}, {odd} were passed over.")
    kinds = {event["event"] for event in events}
    if not kinds & {"step", "validation"}:
        words = "its metrics hold only the header" if kinds else "its metrics hold no event"
        return Lost(name, f"{words}{_state(record)}", config)
    return _ended(name, config, events, _failed_guards(folder), record)


def _ended(
    name: str, config: dict[str, Any], events: list[dict], failed: tuple[str, ...], record: dict[str, Any] | None
) -> Run | Lost:
    start = next((event for event in events if event["event"] == "start"), None)
    end = next((event for event in reversed(events) if event["event"] == "end"), None)
    validations = [event for event in events if event["event"] == "validation"]
    losses = [_float(event.get("loss")) for event in events if event["event"] == "step"]
    if (end and end.get("diverged")) or not all(math.isfinite(loss) for loss in losses):
        at = end["step"] if end else len(losses)
        return Lost(name, f"it diverged, the loss being no number after step {at}", config, diverged=True)
    if start is None or not start.get("n_params"):
        return Lost(name, "its metrics do not say how many parameters it has", config)
    if end is None or end["step"] < config["max_steps"]:
        done = max((event["step"] for event in events if "step" in event), default=0)
        words = f"it ended after {done} of {config['max_steps']} steps, before its learning rate had decayed"
        return Lost(name, words + _state(record), config)
    if not validations or validations[-1]["step"] != end["step"]:
        return Lost(name, "it was not validated after its last step", config)
    loss = _float(validations[-1].get("loss"))
    if not (math.isfinite(loss) and loss > 0):
        return Lost(name, f"its validation loss is {loss}", config, diverged=True)
    d = end["step"] * config["batch_size"] * config["seq_len"]
    flops = start.get("flops_per_token", 6 * start["n_params"]) * d
    return Run(name, config, start["n_params"], d, flops, loss, start.get("val_sha256") or "", failed)


def _config(folder: Path, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Every setting, those that were added to the trainer since at their default; null where nothing is known."""
    known = (record or {}).get("config") or {}
    file = folder / "config.yaml"
    if file.is_file():
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # the record's are left
            known = yaml.safe_load(file.read_text(encoding="utf-8")) or known
    return {**job.default_settings(TRAIN), **known} if known else None


def _events(file: Path) -> tuple[list[dict[str, Any]], str]:
    """The events, of each step the last one told, and in words what is none."""
    events, nul, broken = [], 0, 0
    for line in file.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        event = _line(line)
        if event is not None and "event" in event:
            events.append(event)
        elif b"\0" in line:
            nul += 1
        else:
            broken += 1
    words = [f"{n} lines {what}" for n, what in ((nul, "with NUL bytes"), (broken, "that are no events")) if n]
    return events, " and ".join(words)


def _line(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # NUL bytes too, and what is no UTF-8
        return None
    return value if isinstance(value, dict) else None


def _float(value: Any) -> float:
    """A number, also one that JSON writes as a word; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _failed_guards(folder: Path) -> tuple[str, ...]:
    file = folder / "guards.json"
    if not file.is_file():
        return ()
    try:
        outcomes = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return ("guards.json cannot be read",)
    return tuple(one["guard"] for one in outcomes if not one["ok"] and one["guard"] != DIVERGED)


def _unstarted(record: dict[str, Any] | None) -> str:
    return "it wrote no metrics" + _state(record)


def _state(record: dict[str, Any] | None) -> str:
    """How its job ended, if that is known."""
    if not record or record.get("state") in (None, "COMPLETED"):
        return ""
    reason = f": {record['reason']}" if record.get("reason") else ""
    return f" ({record['state']}{reason})"
