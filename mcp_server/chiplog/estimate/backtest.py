"""How good the estimates are: each row of a table is foretold without it, and compared with what was measured.

`cold`: nothing of the row's own table (its suite) is known, nor of what is shipped any row whose source or table the
file has.
`history`: the rows before it in its table are known too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from chiplog.errors import ChiplogError, RecordError
from chiplog.estimate import forecast
from chiplog.estimate.batch import largest_batch
from chiplog.estimate.evidence import measured, passes, shipped
from chiplog.estimate.forecast import Forecast, Measured, Quantity
from chiplog.estimate.gpus import gpu
from chiplog.estimate.table import Row, Sweep, as_row
from chiplog.schema import Progress

Protocol = Literal["cold", "history"]
Values = Mapping[str, Any]  # a row as it was read
TUNED = ("full", "lora", "qlora")  # methods of which peaks on one card are counted apart


class Foretold(NamedTuple):
    """A figure beside what was foretold of it."""

    row: Row
    actual: float
    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        return abs(self.value / self.actual - 1)


def backtest(
    rows: Sequence[Values], protocol: Protocol, sweeps: Sequence[Values] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The figures of a table of measurements, as `chiplog backtest --json` prints them.

    A row that is not covered is counted by reason. Raises RecordError for a protocol that is none, or a sweep.
    """
    if protocol not in get_args(Protocol):
        raise RecordError(f"there is no protocol {protocol!r}: choose from {', '.join(get_args(Protocol))}")
    runs, uncovered = _covered(rows)
    sources, tables = ({str(values.get(name)) for values in rows} for name in ("source", "suite"))
    others = [row for row in shipped() if row.source not in sources and row.suite not in tables]
    background = [run for run, _ in _measured(others)[0]]
    peaks = list(_foretold("memory", runs, background, protocol, progress))
    steps = list(_foretold("pass", runs, background, protocol, progress))
    is_tuned = [_on_one_card(row) for row, _, _ in peaks]
    memory = [one for one, tuned in zip(peaks, is_tuned, strict=True) if tuned]
    return {
        "protocol": protocol,
        "memory": _figures([_peak(*one) for one in memory]),
        "tokens_per_s": _figures([_rate(*one) for one in steps if one[0].tokens_per_s]),
        "runtime": _figures([run for one in steps if (run := _runtime(*one))]),
        "oom": _oom(runs, background, protocol),
        "batch": batches(sweeps) if sweeps is not None else None,
        "memory_other": _figures([_peak(*one) for one, tuned in zip(peaks, is_tuned, strict=True) if not tuned]),
        "by_suite": _by_suite(memory, steps),
        "uncovered": dict(uncovered.most_common()),
    }


def _covered(rows: Sequence[Values]) -> tuple[list[tuple[Measured, Row]], Counter[str]]:
    """The rows that are covered, each as a measured run, and how many are not, by reason."""
    typed: list[Row] = []
    reasons: Counter[str] = Counter()
    for values in rows:
        try:
            typed.append(as_row(values, Row))
        except RecordError as error:
            reasons[str(error)] += 1
    covered, more = _measured(typed)
    return covered, reasons + more


def _measured(rows: Sequence[Row]) -> tuple[list[tuple[Measured, Row]], Counter[str]]:
    covered: list[tuple[Measured, Row]] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            covered.append((measured(row), row))
        except ChiplogError as error:
            reasons[str(error)] += 1
    return covered, reasons


def _foretold(
    quantity: Quantity, runs: Sequence[tuple[Measured, Row]], background: Sequence[Measured], protocol: Protocol,
    progress: Progress | None,
) -> Iterator[tuple[Row, Measured, Forecast]]:  # fmt: skip
    """Each run that has the figure, with its forecast."""
    tables = list(dict.fromkeys(run.place for run, _ in runs))
    for number, table in enumerate(tables):
        inside = [(run, row) for run, row in runs if run.place == table]
        has = [(run, row) for run, row in inside if forecast.tells(quantity, run)]
        others = [run for run, _ in runs if run.place != table]
        known = forecast.effects(quantity, [*background, *others], [run for run, _ in has])
        n_before = len(known.observations) - len(has)
        for position, (run, row) in enumerate(has):
            if quantity == "memory" and not run.peak_bytes:
                continue
            first = n_before + (position if protocol == "history" else 0)
            yield row, run, forecast.forecast(quantity, run.job, run.place, known, first=first, leave_out=table)
        if progress:
            progress(number + 1, len(tables), f"tables, {quantity}")


def _on_one_card(row: Row) -> bool:
    return row.n_gpus == 1 and row.method in TUNED


def _peak(row: Row, run: Measured, told: Forecast) -> Foretold:
    return Foretold(row, run.peak_bytes or math.nan, told.value, told.low, told.high)


def _rate(row: Row, run: Measured, told: Forecast) -> Foretold:
    """Tokens a second of a card: the faster pass is the larger rate."""
    tokens = run.job.mean_tokens / run.job.divided
    return Foretold(row, tokens / (run.pass_s or math.nan), tokens / told.value, tokens / told.high, tokens / told.low)


def _runtime(row: Row, run: Measured, told: Forecast) -> Foretold | None:
    """Seconds of the run: as many passes as it made."""
    done = passes(row, run.job)
    if not done or not row.runtime_s:
        return None
    return Foretold(row, row.runtime_s, told.value * done, told.low * done, told.high * done)


def _oom(runs: Sequence[tuple[Measured, Row]], background: Sequence[Measured], protocol: Protocol) -> dict[str, Any]:
    """Of runs whose card is known: how many that ran out of memory were foretold to, and how many foretold did."""
    hits = missed = false = fitted = 0
    for table in dict.fromkeys(run.place for run, _ in runs):
        inside = [(run, row) for run, row in runs if run.place == table]
        others = [run for run, _ in runs if run.place != table]
        known = forecast.effects("memory", [*background, *others], [run for run, _ in inside])
        before = len(known.observations) - sum(forecast.tells("memory", run) for run, _ in inside)
        seen = 0
        for run, row in inside:
            first = before + (seen if protocol == "history" else 0)
            seen += forecast.tells("memory", run)
            if row.oom is None or not run.job.gpu:
                continue
            job = run.job.model_copy(update={"memory_kind": "reserved"})
            told = forecast.forecast("memory", job, table, known, first=first, leave_out=table)
            says, ran_out = bool(told.value > gpu(run.job.gpu).memory_bytes), row.oom
            hits += says and ran_out
            missed += not says and ran_out
            false += says and not ran_out
            fitted += not (says or ran_out)
    return {
        "n": hits + missed + false + fitted, "n_oom": hits + missed,
        "recall": hits / (hits + missed) if hits + missed else None,
        "precision": hits / (hits + false) if hits + false else None,
    }  # fmt: skip


def batches(rows: Sequence[Values]) -> dict[str, Any]:
    """In each group of one benchmark and card: all batches but the largest known, the largest that fits asked for.

    What fits is what the largest batch on record held.
    """
    groups: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in (as_row(values, Sweep) for values in rows):
        if row.batch_size and row.memory_mib:
            groups[row.bench, row.gpu].append((round(row.batch_size), row.memory_mib))
    shares = []
    for points in groups.values():
        largest = max(batch for batch, _ in points)
        known = [(batch, peak) for batch, peak in points if batch < largest]
        if len({batch for batch, _ in points}) < 3:
            continue
        limit = max(peak for batch, peak in points if batch == largest)
        shares.append((largest_batch(known, limit) or 0) / largest)
    within = [share for share in shares if share <= 1]
    return {
        "groups": len(shares),
        "within_limit": len(within) / len(shares) if shares else None,
        "share_of_best": sum(min(share, 1.0) for share in shares) / len(shares) if shares else None,
    }


def _figures(told: Sequence[Foretold]) -> dict[str, float | int | None]:
    if not told:
        return {"n": 0, "mape": None, "median_ape": None, "coverage90": None, "mean_width": None, "under_rate": None}
    errors = sorted(one.error for one in told)
    mean: Callable[[Sequence[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "n": len(told),
        "mape": mean(errors),
        "median_ape": errors[len(errors) // 2] if len(errors) % 2 else mean(errors[len(errors) // 2 - 1 :][:2]),
        "coverage90": mean([one.low <= one.actual <= one.high for one in told]),
        "mean_width": mean([(one.high - one.low) / one.value for one in told]),
        "under_rate": mean([one.actual > one.high for one in told]),
    }


def _by_suite(memory: Sequence[Any], steps: Sequence[Any]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, list[Foretold]]] = defaultdict(lambda: {"memory": [], "tokens_per_s": []})
    for one in memory:
        tables[one[1].place]["memory"].append(_peak(*one))
    for one in steps:
        if one[0].tokens_per_s:
            tables[one[1].place]["tokens_per_s"].append(_rate(*one))
    return {
        name: {quantity: _figures(told) for quantity, told in both.items() if told} for name, both in tables.items()
    }


def in_words(found: dict[str, Any]) -> str:
    """The figures as tables."""
    names = ("n", "mape", "median_ape", "coverage90", "mean_width", "under_rate")
    lines = [f"{found['protocol']}:", "", f"| figure | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for figure in ("memory", "tokens_per_s", "runtime", "memory_other"):
        lines.append(f"| {figure} | {' | '.join(_cell(found[figure][name]) for name in names)} |")
    for figure in ("oom", "batch"):
        if found[figure]:
            lines += ["", f"{figure}: " + ", ".join(f"{name} {_cell(value)}" for name, value in found[figure].items())]
    if found["uncovered"]:
        lines += ["", "not covered:", *(f"- {reason}: {n}" for reason, n in found["uncovered"].items())]
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
