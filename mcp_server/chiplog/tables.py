"""Plans and summaries as tables: cells hold numbers with their intervals, headings the units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from chiplog.compare import Interval
from chiplog.estimate import Estimate
from chiplog.estimate.case import CaseEstimate
from chiplog.guards import Verdict
from chiplog.plan import VAL_LOSS, Value, columns
from chiplog.record import State
from chiplog.sizing import PlannedRun
from chiplog.summary import Row
from chiplog.text import clock, duration, percent, size
from chiplog.totals import Totals

MEM_WORDS = {
    "host_rss": "host",
    "allocated": "GPU allocated",
    "active": "GPU active",
    "reserved": "GPU reserved",
    "whole_card": "whole card",
}
NO_EVIDENCE = "no evidence"
MOST_VARIED = 4  # settings with a column of their own: with more a table is too wide to read, and names say them all
LAW = ("E", "A", "B", "alpha", "beta")  # of a fitted scaling law


def plan_table(rows: Sequence[PlannedRun]) -> str:
    """The experiment before it runs, in Markdown."""
    varied, tunes = _varied(row.run.varied for row in rows), any(row.run.model for row in rows)
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
        made = [run.model or "–"] if tunes else [_count(row.n_params), _count(row.tokens), _short(row.flops)]
        cells.append([str(number), run.name, *made, run.kind, *settings, time_words, limit, memory, guess.basis])
    made = ["model"] if tunes else ["params", "tokens", "FLOPs"]
    return markdown(
        ["#", "run", *made, "type", *varied, "batch", "est. time", "time limit", "est. memory", "basis"], cells
    )


def _varied(settings: Iterable[Mapping[str, Value]]) -> list[str]:
    """The settings that get a column."""
    varied = columns(settings)
    return varied if len(varied) <= MOST_VARIED else []


def case_words(found: CaseEstimate, card: str) -> str:
    """What one job would need: figures, terms, what would change them and what would fit."""
    case, told, why = found.case, found.estimate, found.explanation
    rows: list[tuple[str, str]] = []
    if case.steps or case.samples:
        rows += [(term.name, _figure(term.elapsed, duration)) for term in told.terms]
        rows += [
            (f"time in all, {found.steps:,} steps", _figure(told.elapsed, duration)),
            ("time limit, exceeded by 2 %", clock(told.time_limit_s) if told.time_limit_s else "–"),
            ("GPU hours", f"{told.gpu_hours:.2f}" if told.gpu_hours is not None else "–"),
            ("cost", f"{told.cost:.2f}" if told.cost is not None else "no price_per_hour in chiplog.toml"),
        ]
    rows += [
        ("tokens/s of a GPU", f"{found.tokens_per_s:,.0f}"),
        ("peak allocated", _figure(told.peak_mem, size)),
        ("peak reserved", _figure(told.reserved_mem, size)),
        (f"memory of {card}", size(told.capacity_bytes or 0)),
        ("chance to run out of it", percent(told.out_of_memory or 0.0) + " %"),
        ("micro-batch x passes that fit", f"{told.micro_batch_size or '–'} x {told.grad_accum or '–'}"),
        ("host memory to ask for", size(told.host_mem_bytes or 0)),
        ("disk", size(told.disk_bytes or 0)),
    ]
    held = ", ".join(f"{name} {size(part)}" for name, part in why.memory_bytes.items())
    taken = ", ".join(f"{name} {part / sum(why.pass_s.values()):.0%}" for name, part in why.pass_s.items())
    changes = [[w.change, size(w.reserved_bytes), f"{w.step_s:.3g} s"] for w in why.what_if]
    lines = [
        f"{case.method} of {case.model}, batch {case.batch_size}, {case.seq_len} tokens, {case.gpus} x {card}",
        "",
        markdown(["figure", "value (90 % interval), basis"], rows),
        "",
        f"Peak, at the {why.moment}: {held}; past runs make it {why.memory_factor:.2f} times the bare physics.",
        f"A step of {why.step_s:.3g} s: {taken}; past runs make it {why.pass_factor:.2f} times the bare physics.",
        "",
        markdown(["with", "peak reserved", "a step"], changes),
    ]
    if found.fits:
        ways = [
            [f"{100 * each.share:.0f} %", *(str(value or "none") for value in (
                each.micro_batch, each.seq_len, each.rank, each.model, each.gpu))]
            for each in found.fits
        ]  # fmt: skip
        headings = ["of which would fit", "micro-batch", "sequence", "rank", "model", "smallest GPU"]
        lines += ["", "The largest of each, all else as it is:", "", markdown(headings, ways)]
    if found.steps_in_budget is not None:
        lines.append(f"{found.steps_in_budget:,} steps fit into {case.budget_gpu_hours:g} GPU hours.")
    evidence = list(dict.fromkeys([*_names(told.peak_mem), *_names(told.elapsed)]))
    return "\n".join([*lines, *(f"note: {note}" for note in told.notes), f"Evidence: {listed(evidence, 3)}."])


def _figure(number: Estimate | None, words: Callable[[float], str]) -> str:
    if number is None:
        return NO_EVIDENCE
    return f"{span((number.value, number.low, number.high), words)}, {number.basis}"


def _names(number: Estimate | None) -> list[str]:
    return number.evidence if number else []


def note_words(rows: Sequence[PlannedRun]) -> list[str]:
    """What the estimates leave out, each once."""
    return [f"note: {note}" for note in dict.fromkeys(note for row in rows for note in row.estimate.notes)]


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
    here = f", {duration(totals.in_parallel_s)} side by side" if totals.in_parallel_s is not None else ""
    in_sequence = span((together.value, together.low, together.high), duration)
    gpu = f", {totals.gpu_hours:.2f} GPU hours" if totals.gpu_hours else ""
    cost = f", cost {totals.cost:.2f}" if totals.cost else ""
    disk = f", {size(totals.disk_bytes)} of disk" if totals.disk_bytes else ""
    return f"{head}: {in_sequence} one after another{here}{gpu}{cost}{disk}."


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
    varied, tunes = _varied(row.varied for row in rows), any(row.model for row in rows)
    numbers = ["batch", "est. time", "time limit", "actual", "est. memory", "peak memory"]
    metrics = [metric for metric in metrics if metric != VAL_LOSS]
    scores = [f"{metric}, % (95 % CI)" for metric in metrics]
    validates = any(row.val_loss_best is not None for row in rows) or not tunes
    losses = [*([] if tunes else ["val. loss"]), *(["best val. loss (step)"] if validates else [])]
    headings = [
        "#",
        "run",
        *(["model"] if tunes else ["params", "tokens"]),
        "type",
        *varied,
        *numbers,
        *losses,
        *scores,
    ]
    cells = [_summary_row(number, row, varied, metrics, validates, tunes) for number, row in enumerate(rows, start=1)]
    return markdown(headings, cells)


def _summary_row(
    number: int, row: Row, varied: Sequence[str], metrics: Sequence[str], validates: bool, tunes: bool
) -> list[str]:
    peak = f"{size(row.peak_mem_bytes)} ({MEM_WORDS[row.mem_kind]})" if row.mem_kind in MEM_WORDS else "–"
    return [
        str(number),
        row.run,
        *([row.model or "–"] if tunes else [_count(row.n_params), _count(row.tokens)]),
        row.kind,
        *(_cell(row.varied.get(key)) for key in varied),
        _cell(row.batch_size),
        span(row.predicted_s, duration),
        clock(row.time_limit_s) if row.time_limit_s else "–",
        duration(row.elapsed_s) if row.state is State.COMPLETED else f"{row.state or 'not run'}",
        span(row.predicted_bytes, size),
        peak,
        *([] if tunes else ["diverged" if row.diverged else _short(row.val_loss)]),
        *([_loss_cell(row)] if validates else []),
        *(_score_cell(row.scores.get(metric)) for metric in metrics),
    ]


def guard_table(found: Sequence[Verdict]) -> str:
    """Every guard with the runs that it failed, did not check and passed, in Markdown."""
    cells = []
    for one in found:
        outcome = {True: "passed", False: "failed", None: "not checked"}[one.ok]
        runs = [listed([name for name, ok in one.runs.items() if ok is wanted], 4) for wanted in (False, None, True)]
        cells.append([one.guard, outcome, *(names or "–" for names in runs)])
    return markdown(["guard", "outcome", "failed", "not checked", "passed"], cells)


def probe_words(rows: Sequence[PlannedRun]) -> list[str]:
    """What to do about the runs that nothing is known of, in at most one line."""
    unknown = [row.run.name for row in rows if row.estimate.elapsed is None]
    if not unknown:
        return []
    limits = "max_steps 20 and eval_limit 20" if any(row.run.model for row in rows) else "max_steps 20"
    return [
        f"No evidence for {listed(unknown)}: no run like these has completed on this device. To get some, "
        f"plan a probe with {limits}, run it, and plan again."
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


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def _loss_cell(row: Row) -> str:
    return "–" if row.val_loss_best is None else f"{row.val_loss_best:.4g} ({_cell(row.val_loss_best_step)})"


def _score_cell(score: Interval | None) -> str:
    if score is None or math.isnan(score.value):
        return "–"
    return f"{percent(score.value)} ({percent(score.low)}-{percent(score.high)})"


def law_words(found: Mapping[str, Any]) -> str:
    """A fitted scaling law as a table with its intervals, then whether the runs can tell its parts."""
    rows = [f"| {name} | {found[name]:.5g} | {_between(found['ci'].get(name))} |" for name in LAW]
    left = "; ".join(f"{n} rows left out: {why}" for why, n in found["left_out"].items())
    told = "Identified" if found["identifiable"] else "Not identified"
    return "\n".join(
        [
            f"L = E + A / N^alpha + B / D^beta, of {found['n']} points of {found['n_runs']} runs"
            + (f" ({left})" if left else ""),
            "",
            f"| | value | {found['ci_level']:.0%} interval |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"Objective {found['objective']:.6e}. Best N grows as C^{_exponent(found['optimal_n_exponent'])} "
            f"({_between(found['optimal_n_exponent_ci'])}).",
            f"{told}: {found['why']}",
        ]
    )


def _exponent(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _between(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "–"
