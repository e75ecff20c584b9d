"""What a run does otherwise than its plan says, so that it goes on at all: a smaller micro-batch, the same batch.

`deviation.json` in a run's folder is written by a recipe whose GPU runs out of memory, and at submission again for a
run that was ended for its memory; the recipe reads it, and nothing else of the run's configuration changes.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from chiplog.ledger.metrics import Start, of_job, read_events
from chiplog.plan import Run
from chiplog.record import Record, State
from chiplog.schema import Frozen

FILE = "deviation.json"


class Deviation(Frozen, extra="ignore"):
    """A smaller micro-batch than was asked for."""

    micro_batch_size: int = Field(ge=1, description="Samples of a forward pass, instead of those asked for.")
    asked: int = Field(ge=1, description="What was asked for.")
    reason: str = Field(description="Why.")

    @property
    def words(self) -> str:
        return (
            f"micro_batch_size {self.micro_batch_size} instead of {self.asked}, since {self.reason}; the effective "
            "batch is as planned, by more passes a step"
        )


def read_deviation(run_folder: Path) -> Deviation | None:
    """What a run's folder holds; null for none, or for one that cannot be read."""
    try:
        return Deviation.model_validate_json((run_folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def after_running_out(run: Run, run_folder: Path, last: Record | None) -> Deviation | None:
    """For a run whose last attempt was ended for its memory: the next smaller divisor, at most half; null: none left.

    A size that a recipe noted by itself is tried first: nothing is halved that the attempt did not run with.
    """
    if last is None or last.state is not State.OUT_OF_MEMORY or run.kind == "control":
        return None
    if (run_folder / "DONE").is_file():  # it was the evaluation
        return None
    batch = run.config.get("batch_size")
    chosen = _started_with(run_folder) if run.kind == "train" else None  # by itself, where the settings say none
    asked = run.config.get("micro_batch_size") or chosen or batch
    if not isinstance(batch, int) or not isinstance(asked, int):
        return None
    noted = read_deviation(run_folder)
    before = noted.micro_batch_size if noted else asked
    if not _was_tried(before, run_folder, last):
        return None
    of_each = batch // run.resources.processes
    smaller = [size for size in range(1, before // 2 + 1) if of_each % size == 0]
    if not smaller:
        return None
    reason = f"job {last.job_id} ran out of memory with {before}"
    return Deviation(micro_batch_size=smaller[-1], asked=asked, reason=reason)


def _started_with(run_folder: Path) -> int | None:
    """The micro-batch of the last start."""
    starts = [event for event in read_events(run_folder / "metrics.jsonl") if isinstance(event, Start)]
    return starts[-1].micro_batch_size if starts else None


def _was_tried(size: int, run_folder: Path, attempt: Record) -> bool:
    """Whether the last start of that attempt took that size; also where nothing was ever written that would say so."""
    events = read_events(run_folder / "metrics.jsonl")
    if not any(isinstance(event, Start) and event.micro_batch_size for event in events):
        return True
    starts = [event for event in of_job(events, attempt.started) if isinstance(event, Start)]
    return bool(starts) and starts[-1].micro_batch_size == size
