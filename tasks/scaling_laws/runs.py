"""The runs of an experiment's folder as points of a law, and by name what cannot be one and why.

Reads records.jsonl (how each job ended), and of each run config.yaml, metrics.jsonl and guards.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from tasks.scaling_laws.arms import TRAIN, Arm, arm_of
from trainer import job
from trainer.job import UserError
from trainer.settings import WITHOUT_END, checked

DIVERGED = "finite loss"  # the guard that says so: such a run is left out for it
TOLD = ("max_steps", "batch_size", "seq_len", "width", "lr", "depth", "seed", "architecture", "dataset")  # of any age
TEXT = ("dataset", "device")  # settings whose default, null, does not say that they are text
LEAST = {"step": 0, "n_params": 1}  # whole numbers that events tell
UNDECAYED = 0.5  # share of the learning rate that is too much at a run's end


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
    losses_sha256: str = ""  # of the training's losses, step for step
    failed_guards: tuple[str, ...] = ()

    @property
    def arm(self) -> Arm:
        """The settings that make it one of its arm."""
        return arm_of(self.config)

    @property
    def undecayed(self) -> bool:
        """Whether it ended with a learning rate from which more steps of a smaller one would have lowered the loss."""
        return self.config["lr_schedule"] in WITHOUT_END or self.config["final_lr"] >= UNDECAYED


@dataclass(frozen=True)
class Lost:
    """A run without a loss to fit. That it diverged is a result; that its job failed is none."""

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
    controls: list[dict[str, Any]] = field(default_factory=list)  # settings of the runs that the plan names as such

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
    return Found(runs, [one for one in each if isinstance(one, Lost)], notes, _controls(folder))


def _controls(folder: Path) -> list[dict[str, Any]]:
    """What plan.yaml says of controls that are runs; nothing where it is not there or not YAML."""
    file = folder / "plan.yaml"
    with suppress(yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError):
        plan = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        experiments = plan.get("experiments") or []
        return [one["control"] for one in experiments if isinstance(one.get("control"), dict)]
    return []


def _ends(folder: Path) -> dict[str, dict[str, Any]]:
    """The last record of each run, by name; none where nothing was collected."""
    file = folder / "records.jsonl"
    records: dict[str, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        record = object_of(line)
        if record and record.get("run") and isinstance(record["run"], str):
            records[record["run"]] = record
    return records


def _read(folder: Path, record: dict[str, Any] | None, notes: list[str]) -> Run | Lost:
    try:
        return _told(folder, record, notes)
    except UserError as error:
        return Lost(folder.name, f"its files cannot be read: {error}")


def _told(folder: Path, record: dict[str, Any] | None, notes: list[str]) -> Run | Lost:
    """Raises UserError for files that say what cannot be."""
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
    by_step = {event["step"]: _float(event.get("loss")) for event in events if event["event"] == "step"}
    told = hashlib.sha256(repr(sorted(by_step.items())).encode()).hexdigest() if by_step else ""
    return Run(name, config, start["n_params"], d, flops, loss, start.get("val_sha256") or "", told, failed)


def _config(folder: Path, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Every setting; null where nothing is known. Raises UserError for what is missing or cannot be.

    What config.yaml lacks is as the record has it; what was added to the trainer since is at its default.
    """
    file, of_record, own = folder / "config.yaml", (record or {}).get("config"), None
    if file.is_file():
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # the record's are left
            own = yaml.safe_load(file.read_text(encoding="utf-8"))
    told = {key: value for key, value in of_record.items() if value is not None} if isinstance(of_record, dict) else {}
    told |= own if isinstance(own, dict) else {}
    if not told and not file.is_file():
        return None
    if missing := [key for key in TOLD if key not in told]:
        raise UserError(f"neither config.yaml nor its record says {', '.join(missing)}")
    defaults = job.default_settings(TRAIN)
    config = {**defaults, **told}
    job.check_kinds(config, defaults)
    job.check_kinds(config, dict.fromkeys((key for key in TEXT if config[key] is not None), ""))
    checked(SimpleNamespace(**config))
    return config


def _check_event(event: dict[str, Any]) -> None:
    """Raises UserError for a number that is none."""
    must = ["step"] if event["event"] in ("step", "validation", "end") else []
    for key in {*must, *event} & LEAST.keys():
        value = event.get(key)
        if type(value) is not int or value < LEAST[key]:
            raise UserError(f"{key} is {value!r} in the event {event['event']}")
    flops = event.get("flops_per_token", 1)
    if type(flops) not in (int, float) or not 0 < flops < math.inf:
        raise UserError(f"flops_per_token is {flops!r} in the event {event['event']}")


def _events(file: Path) -> tuple[list[dict[str, Any]], str]:
    """The events, of each step the last one told, and in words what is none."""
    events, nul, broken = [], 0, 0
    for line in file.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        event = object_of(line)
        if event is not None and isinstance(event.get("event"), str):
            _check_event(event)
            events.append(event)
        elif b"\0" in line:
            nul += 1
        else:
            broken += 1
    words = [f"{n} lines {what}" for n, what in ((nul, "with NUL bytes"), (broken, "that are no events")) if n]
    return events, " and ".join(words)


def object_of(text: bytes) -> dict[str, Any] | None:
    """A JSON object; null for anything else."""
    try:
        value = json.loads(text)
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
    """The guards that say no; a run of which they say nothing was judged by none."""
    file = folder / "guards.json"
    if not file.is_file():
        return ("guards.json is missing",)
    try:
        outcomes = json.loads(file.read_text(encoding="utf-8"))
        failed = tuple(str(one["guard"]) for one in outcomes if not one["ok"] and one["guard"] != DIVERGED)
    except (ValueError, TypeError, KeyError):
        return ("guards.json cannot be read",)
    return failed if outcomes else ("guards.json holds none",)


def _unstarted(record: dict[str, Any] | None) -> str:
    return "it wrote no metrics" + _state(record)


def _state(record: dict[str, Any] | None) -> str:
    """How its job ended, if that is known."""
    if not record or record.get("state") in (None, "COMPLETED"):
        return ""
    reason = f": {record['reason']}" if record.get("reason") else ""
    return f" ({record['state']}{reason})"
