"""Plans and summaries as tables: cells hold numbers with their intervals, headings the units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from chiplog.compare import Interval
from chiplog.plan import Value, columns
from chiplog.planning import PlannedRun, Totals
from chiplog.record import State
from chiplog.summary import Row
from chiplog.text import clock, duration, percent, size

MEM_WORDS = {"host_rss": "host", "allocated": "GPU allocated", "reserved": "GPU reserved", "whole_card": "whole card"}
NO_EVIDENCE = "no evidence"


def plan_table(rows: Sequence[PlannedRun]) -> str:
    """The experiment before it runs, in Markdown."""
    varied = columns(row.run.varied for row in rows)
    cells = []
    for number, row in enumerate(rows, start=1):
        run, guess = row.run, row.estimate
        told, peak = guess.elapsed, guess.peak_mem
        memory = (
            span((peak.value, peak.low, peak.high), size) + f" {MEM_WORDS[guess.mem_kind or '']}"
            if peak
            else NO_EVIDENCE
        )
        limit = clock(run.resources.time_limit_s) if run.resources.time_limit_s else "–"
        settings = [_cell(value) for value in (*map(run.varied.get, varied), run.config.get("batch_size"))]
        time_words = span((told.value, told.low, told.high), duration) if told else NO_EVIDENCE
        cells.append([str(number), run.name, run.model, run.kind, *settings, time_words, limit, memory, guess.basis])
    return markdown(
        ["#", "run", "model", "type", *varied, "batch", "est. time", "time limit", "est. memory", "basis"], cells
    )


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def totals_words(totals: Totals) -> str:
    """What all runs need together, in one line."""
    head = f"{totals.runs} runs, {totals.controls} of them controls"
    if totals.unknown:
        return f"{head}; no evidence for the time of {totals.unknown}, so no total."
    together = totals.in_sequence_s
    assert together is not None
    here = f", {duration(totals.in_parallel_s)} on this machine" if totals.in_parallel_s is not None else ""
    in_sequence = span((together.value, together.low, together.high), duration)
    gpu = f", {totals.gpu_hours:.2f} GPU hours" if totals.gpu_hours else ""
    return f"{head}: {in_sequence} one after another{here}{gpu}."


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in one line, the first few if there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def bullets(lines: Sequence[str], most: int) -> list[str]:
    """Lines as a list, the first few if there are many."""
    more = [f"- ... and {len(lines) - most} more, in summary.md"] if len(lines) > most else []
    return [f"- {line}" for line in lines[:most]] + more


def cut_note(there: int, limit: int) -> str | None:
    """That rows were left out, if some were."""
    return f"... and {there - limit} more: raise limit to see them" if there > limit else None


def summary_table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """The experiment after it ran, in Markdown."""
    varied = columns(row.varied for row in rows)
    numbers = ["batch", "est. time", "time limit", "actual", "est. memory", "peak memory"]
    scores = [f"{metric}, % (95 % CI)" for metric in metrics]
    headings = ["#", "run", "model", "type", *varied, *numbers, *scores]
    return markdown(headings, [_summary_row(number, row, varied, metrics) for number, row in enumerate(rows, start=1)])


def _summary_row(number: int, row: Row, varied: Sequence[str], metrics: Sequence[str]) -> list[str]:
    peak = f"{size(row.peak_mem_bytes)} ({MEM_WORDS[row.mem_kind]})" if row.mem_kind in MEM_WORDS else "–"
    return [
        str(number),
        row.run,
        row.model,
        row.kind,
        *(_cell(row.varied.get(key)) for key in varied),
        _cell(row.batch_size),
        span(row.predicted_s, duration),
        clock(row.time_limit_s) if row.time_limit_s else "–",
        duration(row.elapsed_s) if row.state is State.COMPLETED else f"{row.state or 'not run'}",
        span(row.predicted_bytes, size),
        peak,
        *(_score_cell(row.scores.get(metric)) for metric in metrics),
    ]


def probe_words(rows: Sequence[PlannedRun]) -> list[str]:
    """What to do about the runs that nothing is known of, in at most one line."""
    unknown = [row.run.name for row in rows if row.estimate.elapsed is None]
    if not unknown:
        return []
    return [
        f"No evidence for {listed(unknown)}: no run like these has completed on this device. To get some, "
        "plan a probe with max_steps 20 and eval_limit 20, run it, and plan again."
    ]


def span(predicted: tuple[float, float, float] | None, words: Callable[[float], str]) -> str:
    """Value and interval, such as `25 s (16-40)`, or that there was no evidence."""
    if predicted is None:
        return NO_EVIDENCE
    value, low, high = (words(number) for number in predicted)
    if value.split()[1:] == low.split()[1:] == high.split()[1:]:
        return f"{value} ({low.split()[0]}-{high.split()[0]})"
    return f"{value} ({low} to {high})"


def _cell(value: Value) -> str:
    return "–" if value is None else str(value)


def _score_cell(score: Interval | None) -> str:
    if score is None or math.isnan(score.value):
        return "–"
    return f"{percent(score.value)} ({percent(score.low)}-{percent(score.high)})"
