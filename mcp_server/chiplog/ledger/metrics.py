"""What a job of ours wrote about itself: `metrics.jsonl` of the training, `eval/scores.json` of the evaluation."""

from __future__ import annotations

import json
import statistics
from datetime import datetime
from pathlib import Path
from typing import Any

from chiplog.errors import RecordError
from chiplog.record import Score, Usage

# What an event must have to be one; a line that was cut off has less.
NEEDED = {
    "start": {"started", "device", "n_params", "total_steps", "setup_s", "packages"},
    "step": {"step", "loss", "tokens", "seconds", "peak_mem_bytes", "mem_kind"},
    "checkpoint": {"seconds"},
}
SCORES = {"n", "scores", "ended", "setup_s", "seconds", "peak_mem_bytes", "mem_kind", "device"}
WARM_UP = 0.1  # share of the steps, at the start, that the steady speed leaves out


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a `metrics.jsonl` that can be read; its last line may still be being written."""
    if not file.is_file():
        return []
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and all(key in event for key in NEEDED.get(event.get("event", ""), {"event"})):
            events.append(event)
    return events


def of_job(events: list[dict[str, Any]], started: str | None) -> list[dict[str, Any]]:
    """The events, if the job that began at `started` wrote the last of them; none if an earlier attempt did."""
    begun = [event["started"] for event in events if event["event"] == "start"]
    if not begun or started is None:
        return []
    # Events note whole seconds.
    return events if datetime.fromisoformat(begun[-1]) >= datetime.fromisoformat(started).replace(microsecond=0) else []


def last_step(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest step event."""
    return next((event for event in reversed(events) if event["event"] == "step"), None)


def train_usage(events: list[dict[str, Any]]) -> Usage:
    """What the training used. A resumed run repeats the steps since its checkpoint: the last line of a step counts."""
    of = {kind: [e for e in events if e["event"] == kind] for kind in ("start", "step", "checkpoint")}
    by_step: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start":  # what the last attempt did after its checkpoint is lost, and done again
            by_step = {step: old for step, old in by_step.items() if step <= event.get("step", 0)}
        elif event["event"] == "step":
            by_step[event["step"]] = event
    steps = list(by_step.values())
    if not of["start"]:
        return Usage()
    first = of["start"][-1]
    seconds = [event["seconds"] for event in steps]
    steady = seconds[int(len(seconds) * WARM_UP) :]
    done = steps[-1]["step"] if steps else 0
    # Where not every step is logged, those that are stand for the others.
    share = done / len(steps) if steps else 0.0
    tokens = sum(event["tokens"] for event in steps) * share
    return Usage(
        device=first["device"],
        resumed=len(of["start"]) > 1,
        setup_s=sum(event["setup_s"] for event in of["start"]),
        train_s=sum(seconds) * share if steps else None,
        checkpoint_s=sum(event["seconds"] for event in of["checkpoint"]),
        steps=done,
        steps_planned=first["total_steps"],
        tokens=round(tokens) if steps else None,
        steps_per_s=1 / statistics.median(steady) if steady else None,
        tokens_per_s=tokens / (sum(seconds) * share) if steps else None,
        peak_mem_bytes=max((event["peak_mem_bytes"] for event in steps), default=None),
        mem_kind=steps[-1]["mem_kind"] if steps else None,
        n_params=first["n_params"],
        loss_first=steps[0]["loss"] if steps else None,
        loss_last=steps[-1]["loss"] if steps else None,
    )


def read_scores(file: Path) -> dict[str, Any] | None:
    """The evaluation's own account; null if there is none yet. Raises RecordError for a file that is not whole."""
    if not file.is_file():
        return None
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{file} is not whole: remove it, then evaluate the run again. {error}") from error
    missing = SCORES - scores.keys() if isinstance(scores, dict) else SCORES
    if missing:
        raise RecordError(f"{file} lacks {', '.join(sorted(missing))}: remove it, then evaluate the run again")
    return scores


def with_evaluation(usage: Usage, scores: dict[str, Any]) -> Usage:
    """`usage` with what the evaluation used; the peak is the larger one, if both are of one kind."""
    peak, kind = usage.peak_mem_bytes, usage.mem_kind
    if kind in (None, scores["mem_kind"]):
        peak, kind = max(peak or 0, scores["peak_mem_bytes"]), scores["mem_kind"]
    evaluated = {"eval_setup_s": scores["setup_s"], "eval_s": scores["seconds"], "eval_samples": scores["n"]}
    return usage.model_copy(
        update={**evaluated, "device": usage.device or scores["device"], "peak_mem_bytes": peak, "mem_kind": kind}
    )


def score_table(scores: dict[str, Any]) -> dict[str, Score]:
    """The scores by criterion."""
    return {name: Score.model_validate(value) for name, value in scores["scores"].items()}
