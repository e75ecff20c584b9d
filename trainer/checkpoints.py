"""What a training leaves on the disk to go on from: its last checkpoint, and the events of metrics.jsonl."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer import job
from trainer.job import UserError
from trainer.settings import check_same


def save_checkpoint(checkpoints: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Writes `step_N/state.pt`, whole or not at all, then removes all but the last `keep`."""
    for leftover in checkpoints.glob(".step_*"):  # of one that was cut off
        shutil.rmtree(leftover, ignore_errors=True)
    folder = checkpoints / f"step_{state['step']}"
    try:
        with job.whole_folder(folder) as beside:
            torch.save(state, beside / "state.pt")
    except (OSError, RuntimeError) as error:  # torch's writer has an error of its own for a full disk
        if job.is_out_of_memory(error):
            raise
        raise job.cannot("written", folder, error) from error
    for older in _saved(checkpoints)[:-keep]:
        shutil.rmtree(older)


def save_model(folder: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json`, whole or not at all. Raises UserError where that cannot be."""
    try:
        with job.whole_folder(folder) as beside:
            save_file(
                {name: p.detach().cpu().contiguous() for name, p in weights.items()}, beside / "model.safetensors"
            )
            job.write_json(beside / "config.json", about)
    except (OSError, SafetensorError) as error:
        raise job.cannot("written", folder, error) from error


def load_checkpoint(checkpoints: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the last checkpoint; None where there is none.

    Raises UserError for one that cannot be read, of which a bit has changed, or that a run of another `identity` saved.
    """
    *before, last = [None, *_saved(checkpoints)]
    if last is None:
        return None
    try:
        with zipfile.ZipFile(last / "state.pt") as records:  # torch reads them without a look at their checksums
            if damaged := records.testzip():
                raise ValueError(f"the checksum of {damaged} is another")
        state = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
        made = dict(state["identity"])
    except Exception as error:  # a file with a wrong byte raises whatever that byte leads to
        said = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        then = f"go on from {before[-1].name}" if before[-1] else "start anew"
        raise UserError(f"{last} cannot be read ({said}): remove it to {then}") from error
    check_same(identity, made, last, "take another --out")
    return state


@torch.no_grad()
def restore(state: dict[str, Any], adapter: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Brings adapter and optimizer to a checkpoint's state."""
    for name, p in adapter.items():
        p.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])


def append_event(file: Path, event: str, **values: Any) -> None:
    """Adds a line to metrics.jsonl; one that a kill cut off before it stays a line of its own."""
    line = json.dumps({"event": event, **values}) + "\n"
    try:
        with file.open("ab+") as events:
            if events.tell():
                events.seek(-1, 2)
                line = line if events.read(1) == b"\n" else "\n" + line
            events.write(line.encode())
    except OSError as error:
        raise job.cannot("written", file, error) from error


def last_step(file: Path) -> int:
    """The highest step that metrics.jsonl records; 0 where there is none."""
    highest = 0
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(event, dict) and event.get("event") == "step":
            highest = max(highest, event.get("step", 0))
    return highest


def _saved(checkpoints: Path) -> list[Path]:
    """The folders step_N, the last step last; a copy of one under another name is none."""
    found = {folder: re.fullmatch(r"step_(\d+)", folder.name) for folder in checkpoints.glob("step_*")}
    return sorted((folder for folder, name in found.items() if name), key=lambda folder: int(folder.name[5:]))
