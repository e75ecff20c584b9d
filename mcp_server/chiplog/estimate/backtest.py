"""How good the estimates are: each row of a table is foretold without it, and compared with what was measured.

`cold`: nothing of the row's own table (its suite) is known, nor of what is shipped any row whose source the file has.
`history`: the rows before it in its table are known too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from chiplog.errors import ChiplogError
from chiplog.estimate import forecast
from chiplog.estimate.evidence import Row, measured, shipped
from chiplog.estimate.forecast import Forecast, Measured, Quantity
from chiplog.estimate.speed import model_parallel
from chiplog.schema import Progress

Protocol = Literal["cold", "history"]
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


def backtest(rows: Sequence[Row], protocol: Protocol, progress: Progress | None = None) -> dict[str, Any]:
    """The figures of a table of measurements, as `chiplog backtest --json` prints them."""
    runs, uncovered = _covered(rows)
    sources = {row.get("source") for row in rows}
    background = [run for run, _ in _covered([row for row in shipped() if row.get("source") not in sources])[0]]
    peaks = list(_foretold("memory", runs, background, protocol, progress))
    passes = list(_foretold("pass", runs, background, protocol, progress))
    is_tuned = [_on_one_card(row) for row, _, _ in peaks]
    memory = [one for one, tuned in zip(peaks, is_tuned, strict=True) if tuned]
    return {
        "protocol": protocol,
        "memory": _figures([_peak(*one) for one in memory]),
        "tokens_per_s": _figures([_rate(*one) for one in passes]),
        "memory_other": _figures([_peak(*one) for one, tuned in zip(peaks, is_tuned, strict=True) if not tuned]),
        "by_suite": _by_suite(memory, passes),
        "uncovered": dict(uncovered.most_common()),
    }


def _covered(rows: Sequence[Row]) -> tuple[list[tuple[Measured, Row]], Counter[str]]:
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
        has = [(run, row) for run, row in inside if forecast.observe(quantity, run)]
        others = [run for run, _ in runs if run.place != table]
        known = forecast.effects(quantity, [*background, *others], [run for run, _ in has])
        n_before = len(known.observations) - len(has)
        for position, (run, row) in enumerate(has):
            first = n_before + (position if protocol == "history" else 0)
            yield row, run, forecast.forecast(quantity, run.job, run.place, known, first=first, leave_out=table)
        if progress:
            progress(number + 1, len(tables), f"tables, {quantity}")


def _on_one_card(row: Row) -> bool:
    return row.get("n_gpus") == 1 and row.get("method") in TUNED


def _peak(row: Row, run: Measured, told: Forecast) -> Foretold:
    return Foretold(row, run.peak_bytes or math.nan, told.value, told.low, told.high)


def _rate(row: Row, run: Measured, told: Forecast) -> Foretold:
    """Tokens a second of a card: the faster pass is the larger rate."""
    tokens = run.job.mean_tokens / model_parallel(run.job)
    return Foretold(row, tokens / (run.pass_s or math.nan), tokens / told.value, tokens / told.high, tokens / told.low)


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


def _by_suite(memory: Sequence[Any], passes: Sequence[Any]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, list[Foretold]]] = defaultdict(lambda: {"memory": [], "tokens_per_s": []})
    for one in memory:
        tables[one[1].place]["memory"].append(_peak(*one))
    for one in passes:
        tables[one[1].place]["tokens_per_s"].append(_rate(*one))
    return {
        name: {quantity: _figures(told) for quantity, told in both.items() if told} for name, both in tables.items()
    }
