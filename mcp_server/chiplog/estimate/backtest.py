"""How good the estimates are: each row of a table is foretold without it, and compared with what was measured.

`cold`: nothing of the row's own table (its suite) is known, nor of what is shipped any row whose source or table the
file has.
`history`: the rows before it in its table are known too.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from chiplog.errors import ChiplogError, RecordError
from chiplog.estimate import forecast
from chiplog.estimate.batch import largest_batch
from chiplog.estimate.evidence import beyond_passes, capacity_bytes, is_unmasked, measured, passes, shipped, why_no_pace
from chiplog.estimate.forecast import Forecast, Quantity
from chiplog.estimate.job import Measured
from chiplog.estimate.table import Kind, Row, Sweep, as_row
from chiplog.schema import Progress

Protocol = Literal["cold", "history"]
Values = Mapping[str, Any]  # a row as it was read
# Standard deviations of what runs take beyond their passes, between tables and within one, rounded: of the shared
# tables that say, one takes 62 % (within 8 %), and four a thousandth.
BETWEEN, WITHIN = 0.2, 0.1
NINETY = 1.645  # standard deviations to either end of 90 % of a normal distribution
TUNED = ("full", "lora", "qlora")  # methods of which peaks on one card are counted apart


class Beyond(NamedTuple):
    """Log of a run's time over that of its passes, of runs of one table: a normal mean drawn towards nothing."""

    mean: float
    spread: float  # standard deviation of the next run's

    @classmethod
    def of(cls, known: Sequence[float]) -> Beyond:
        weight = 1 / BETWEEN**2 + len(known) / WITHIN**2
        return cls(sum(known) / WITHIN**2 / weight, math.hypot(WITHIN, weight**-0.5))


class Told(NamedTuple):
    """A run with what is foretold of it."""

    row: Row
    run: Measured
    figure: Forecast | None  # of what was measured
    held: Forecast | None  # of what it reserves, where it is known whether it ran out of its card's memory
    beyond: Beyond  # what runs of its table are known to take beyond their passes


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


class Tellings(NamedTuple):
    """All that is foretold of the rows of a table."""

    protocol: Protocol
    peaks: list[Told]
    steps: list[Told]
    memory: list[Foretold]  # of one card, full, LoRA and QLoRA
    other: list[Foretold]  # all other peaks
    rates: list[Foretold]  # tokens a second of a card
    runtimes: list[Foretold]
    uncovered: Counter[str]  # rows that are not covered, by reason


def backtest(
    rows: Sequence[Values], protocol: Protocol, sweeps: Sequence[Values] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The figures of a table of measurements, as `chiplog backtest --json` prints them.

    A row that is not covered is counted by reason. Raises RecordError for a protocol that is none.
    """
    return summarise(tell(rows, protocol, progress), sweeps)


def tell(rows: Sequence[Values], protocol: Protocol, progress: Progress | None = None) -> Tellings:
    """Each row's figures beside what was foretold of them. Raises RecordError for a protocol that is none."""
    if protocol not in get_args(Protocol):
        raise RecordError(f"there is no protocol {protocol!r}: choose from {', '.join(get_args(Protocol))}")
    typed, uncovered = _typed(rows, Row)
    runs, reasons = covered(typed)
    sources = {_where(str(values.get("source"))) for values in rows}
    tables = {str(values.get("suite")) for values in rows}
    others = [row for row in shipped() if _where(row.source) not in sources and row.suite not in tables]
    background = [run for run, _ in covered(others)[0]]
    peaks = list(foretold("memory", runs, background, protocol, progress))
    steps = list(foretold("pass", runs, background, protocol, progress))
    return Tellings(
        protocol,
        peaks,
        steps,
        memory=[one for told in peaks if (one := _peak(told)) and _on_one_card(told.row, told.run)],
        other=[one for told in peaks if (one := _peak(told)) and not _on_one_card(told.row, told.run)],
        rates=[one for told in steps if (one := _rate(told))],
        runtimes=[one for told in steps if (one := _runtime(told))],
        uncovered=uncovered + reasons,
    )


def _where(source: str) -> str:
    """The file that a row is from, at whatever commit and in whatever part of it."""
    return re.sub(r"@[0-9A-Za-z._-]+", "", source).partition("#")[0]


def summarise(told: Tellings, sweeps: Sequence[Values] | None = None) -> dict[str, Any]:
    """The figures of what was foretold, and of sweeps of batches."""
    tried, odd = _typed(sweeps or (), Sweep)
    uncovered = told.uncovered + Counter({f"of the sweeps: {reason}": n for reason, n in odd.items()})
    return {
        "protocol": told.protocol,
        "memory": _figures(told.memory),
        "tokens_per_s": _figures(told.rates),
        "runtime": _figures(told.runtimes),
        "oom": _oom(told.peaks),
        "batch": batches(tried) if sweeps is not None else None,
        "memory_other": _figures(told.other),
        "by_suite": _by_suite(told),
        "uncovered": dict(uncovered.most_common()),
    }


def _typed(rows: Sequence[Values], kind: type[Kind]) -> tuple[list[Kind], Counter[str]]:
    """The rows that can be read, and how many cannot, by reason."""
    typed: list[Kind] = []
    reasons: Counter[str] = Counter()
    for values in rows:
        try:
            typed.append(as_row(values, kind))
        except RecordError as error:
            reasons[str(error)] += 1
    return typed, reasons


def covered(rows: Sequence[Row]) -> tuple[list[tuple[Measured, Row]], Counter[str]]:
    """The rows that are covered, each as a measured run, and how many are not, by reason."""
    runs: list[tuple[Measured, Row]] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            run = measured(row)
        except (ChiplogError, ArithmeticError, ValueError) as error:
            reasons[str(error)] += 1
            continue
        runs.append((run, row))
        reasons.update(_not_asked(run, row))
    return runs, reasons


def _not_asked(run: Measured, row: Row) -> Iterator[str]:
    """The figures of a covered row that nothing can be asked of, each with its reason."""
    why = why_no_pace(row, run.job)
    if row.tokens_per_s and (why or is_unmasked(row)):
        yield f"tokens/s: {why or 'of labels alone'}"
    if row.runtime_s and (why or not passes(row, run.job)):
        yield f"runtime: {why or 'steps are not stated'}"
    if row.oom is not None and not capacity_bytes(row, run.job):
        yield f"oom: {why or f'{row.gpu} may have several memories'}"
    if not (row.peak_mem_gb or row.tokens_per_s or row.s_per_step or row.runtime_s or row.oom is not None):
        yield "nothing was measured"


def foretold(
    quantity: Quantity, runs: Sequence[tuple[Measured, Row]], background: Sequence[Measured], protocol: Protocol,
    progress: Progress | None = None,
) -> Iterator[Told]:  # fmt: skip
    """Each run that has the figure, or of which it is known whether it ran out of memory, with its forecast."""
    tables = list(dict.fromkeys(run.place for run, _ in runs))
    for number, table in enumerate(tables):
        inside = [(run, row) for run, row in runs if run.place == table]
        others = [run for run, _ in runs if run.place != table]
        known = forecast.effects(quantity, [*background, *others])
        beyond: list[float] = []
        for run, row in inside:
            ask = partial(forecast.forecast, quantity, place=table, known=known, leave_out=table)
            has = run.peak_bytes if quantity == "memory" else run.pass_s
            ends = quantity == "memory" and row.oom is not None and capacity_bytes(row, run.job)
            reserving = run.job.model_copy(update={"memory_kind": "reserved"})
            if has or ends:
                yield Told(row, run, ask(run.job) if has else None, ask(reserving) if ends else None, Beyond.of(beyond))
            if protocol == "history":
                known = forecast.learnt(quantity, known, run)
                beyond += [more] if (more := beyond_passes(row, run)) is not None else []
        if progress:
            progress(number + 1, len(tables), f"tables, {quantity}")


def _on_one_card(row: Row, run: Measured) -> bool:
    text = re.sub(r"[^a-z]", "", row.method.lower())
    return (row.n_gpus or run.job.gpus) == 1 and "pretrain" not in text and text.startswith(TUNED)


def _peak(told: Told) -> Foretold | None:
    figure, peak = told.figure, told.run.peak_bytes
    return Foretold(told.row, peak, figure.value, figure.low, figure.high) if figure and peak else None


def _rate(told: Told) -> Foretold | None:
    """Tokens a second of a card: the faster pass is the larger rate."""
    figure, run = told.figure, told.run
    if not (figure and run.pass_s and told.row.tokens_per_s) or is_unmasked(told.row):
        return None
    tokens = run.job.mean_tokens / run.job.spread.sample
    return Foretold(told.row, tokens / run.pass_s, tokens / figure.value, tokens / figure.high, tokens / figure.low)


def _runtime(told: Told) -> Foretold | None:
    """Seconds of the run: as many passes as it made, and what runs of its table take beyond them."""
    figure, elapsed_s, done = told.figure, told.row.runtime_s, passes(told.row, told.run.job)
    if not (figure and done and elapsed_s):
        return None
    mean, wide = told.beyond.mean, NINETY * told.beyond.spread
    value = figure.value * done * math.exp(mean)
    less, more = (math.hypot(math.log(end / figure.value), wide) for end in (figure.low, figure.high))
    return Foretold(told.row, elapsed_s, value, value * math.exp(-less), value * math.exp(more))


def _oom(peaks: Sequence[Told]) -> dict[str, Any]:
    """Of runs whose card is known: how many that ran out of memory were foretold to, and how many foretold did."""
    asked = [
        (told.held.value > capacity, bool(told.row.oom))
        for told in peaks
        if told.held and (capacity := capacity_bytes(told.row, told.run.job))
    ]
    hits, said, ran_out = (
        sum(of) for of in ([a and b for a, b in asked], [a for a, _ in asked], [b for _, b in asked])
    )
    return {
        "n": len(asked), "n_oom": ran_out,
        "recall": hits / ran_out if ran_out else None, "precision": hits / said if said else None,
    }  # fmt: skip


def batches(rows: Sequence[Sweep]) -> dict[str, Any]:
    """In each group of one benchmark and card: all batches but the largest known, the largest that fits asked for.

    What fits is what the largest batch on record held.
    """
    groups: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
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


def _by_suite(told: Tellings) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, list[Foretold]]] = defaultdict(lambda: defaultdict(list))
    figures = {
        "memory": told.memory, "tokens_per_s": told.rates, "runtime": told.runtimes, "memory_other": told.other,
    }  # fmt: skip
    for quantity, each in figures.items():
        for one in each:
            tables[one.row.suite][quantity].append(one)
    return {name: {quantity: _figures(told) for quantity, told in both.items()} for name, both in tables.items()}


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
