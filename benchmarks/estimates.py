"""How good the estimates are on public measurements, beside what others reach: writes docs/estimates.md and its picture.

    python -m benchmarks.estimates FOLDER

FOLDER holds runs.json and batch_sweeps.json.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import beta, binomtest

from chiplog.estimate import backtest as back
from chiplog.estimate.backtest import Foretold, Told, Values
from chiplog.estimate.table import read_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
REJECT = 0.01  # level of the test that a suite's intervals hold 90 %
SAME_RECIPE = 3  # runs on record
PEERS = """| estimator | mean error | note |
|---|---|---|
| memory: accelerate estimate-memory x4 | 75 % | |
| memory: LLaMA-Factory table | 58 % | too low for 96 % of rows |
| memory: IBM fm-training-estimator, theory part | 45 % | |
| memory: Soup `profile` | 41 % | |
| memory: Red Hat training_hub | 33 % | its range holds 15 % of the peaks |
| memory: physics with seven fitted coefficients, suite left out | 25 % | |
| memory: the same, within a suite | 13.8 % | median 8.7 % |
| tokens/s: a constant share of the peak, 0.4 | 50-60 % | |
| tokens/s: 6N and attention with the median share of that GPU | 9.2 % | in sample |
| run time: Hugging Face skill's cost script | 636 % | |
| papers, memory: LLMem | 1.6 % (1 GPU), 3.0 % (several) | no interval |
| papers, time: NeuSight 2.3 %, Charon 5.4 %, CPU-only 5.0-9.4 %, Habitat 11.8 % | | no interval |
"""


class Goal(NamedTuple):
    """A line of the table of goals."""

    figure: str
    goal: str
    measured: str
    met: bool | None  # null: not measured


def main() -> None:
    """Runs both protocols and writes the page."""
    folder = Path(sys.argv[1])
    rows, sweeps = read_table(folder / "runs.json"), read_table(folder / "batch_sweeps.json")
    began = time.perf_counter()
    cold, history = (back.tell(rows, protocol) for protocol in ("cold", "history"))
    figures = {name: back.summarise(told, sweeps) for name, told in (("cold", cold), ("history", history))}
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in ("runs.json", "batch_sweeps.json")}
    text = page(figures, goals(cold, history, figures), cold, digests)
    (DOCS / "estimates.md").write_text(text, encoding="utf-8")
    (DOCS / "estimates.png").write_bytes(picture(cold))
    print(f"{DOCS / 'estimates.md'} in {time.perf_counter() - began:.0f} s, {len(rows)} rows")


def goals(cold: back.Tellings, history: back.Tellings, figures: dict[str, dict[str, Any]]) -> list[Goal]:
    """The goals with what was measured."""
    memory, rates = figures["cold"]["memory"], figures["cold"]["tokens_per_s"]
    again = same_recipe(history.peaks, history.memory)
    once = same_gpu(history.steps, history.rates)
    times = same_recipe(history.steps, history.runtimes, least=1)
    every = [*cold.memory, *cold.other, *cold.rates, *history.memory, *history.other, *history.rates]
    held, rejected = coverage(every), rejecting(cold, history)
    batch, oom = figures["cold"]["batch"], figures["cold"]["oom"]
    over = round(batch["groups"] * (1 - batch["within_limit"]))
    most = float(beta.ppf(0.975, over + 1, batch["groups"] - over))
    least = float(beta.ppf(0.025, over, batch["groups"] - over + 1)) if over else 0.0
    return [
        Goal("memory, cold, LoRA/QLoRA/full, 1 GPU", "MAPE <= 15 %", errors(cold.memory), memory["mape"] <= 0.15),
        Goal(
            f"memory, {SAME_RECIPE} or more runs of the recipe on record", "MAPE <= 5 %, median <= 2.5 %",
            errors(again), mape(again) <= 0.05 and median(again) <= 0.025,
        ),
        Goal(
            "90 % interval, memory and tokens/s, both protocols", "holds 88-95 % of all rows",
            f"{held:.1%} of {len(every)}", 0.88 <= held <= 0.95,
        ),
        Goal(
            "the same, by suite", f"none rejects 0.90 (binomial, {REJECT:.0%})",
            f"{len(rejected)} of {len(suites(cold, history))} do" + (f": {', '.join(rejected)}" if rejected else ""), not rejected,
        ),
        Goal(
            "recommended batch", "over the limit in no group, >= 85 % of the largest",
            f"over in {over} of {batch['groups']} (95 % interval {least:.1%}-{most:.1%}), {batch['share_of_best']:.1%} of the largest",
            over == 0 and batch["share_of_best"] >= 0.85,
        ),
        Goal(
            "will it run out of memory?", "recall >= 95 %, precision >= 90 %",
            f"recall {oom['recall']:.0%}, precision {oom['precision']:.0%}, n {oom['n']}, of which {oom['n_oom']} ran out",
            oom["recall"] >= 0.95 and oom["precision"] >= 0.9,
        ),
        Goal("tokens/s, cold", "MAPE <= 20 %", errors(cold.rates), rates["mape"] <= 0.2),
        Goal("tokens/s, a run on that GPU in the suite on record", "MAPE <= 8 %", errors(once), mape(once) <= 0.08),
        Goal("job time, a run of the recipe on record", "median <= 5 %", errors(times), median(times) <= 0.05),
        Goal("job time, from the first 50 steps of the live job", "median <= 2 %", "not measured: public tables have no steps", None),
        Goal("time limit", "<= 1.35x of the time used, <= 2 % time-outs", "not measured: `chiplog backtest` says it of your own runs", None),
        Goal("one query of 20,000 runs", "<= 50 ms, no torch", "benchmarks/README.md", None),
    ]  # fmt: skip


def same_recipe(told: Sequence[Told], figures: Sequence[Foretold], least: int = SAME_RECIPE) -> list[Foretold]:
    """The figures of runs of whose recipe so many runs stood before them in their table."""
    return _after(told, figures, lambda one: one.run.job.recipe, least)


def same_gpu(told: Sequence[Told], figures: Sequence[Foretold]) -> list[Foretold]:
    """The figures of runs on whose GPU a run stood before them in their table."""
    return _after(told, figures, lambda one: one.run.job.gpu, 1)


def _after(told: Sequence[Told], figures: Sequence[Foretold], key: Any, least: int) -> list[Foretold]:
    seen: Counter[Any] = Counter()
    chosen = set()
    for one in told:
        name = (one.run.place, key(one))
        if seen[name] >= least:
            chosen.add(id(one.row))
        seen[name] += one.figure is not None
    return [figure for figure in figures if id(figure.row) in chosen]


def errors(told: Sequence[Foretold]) -> str:
    return f"MAPE {mape(told):.1%}, median {median(told):.1%}, n {len(told)}" if told else "n 0"


def mape(told: Sequence[Foretold]) -> float:
    return statistics.fmean(one.error for one in told)


def median(told: Sequence[Foretold]) -> float:
    return statistics.median(one.error for one in told)


def coverage(told: Sequence[Foretold]) -> float:
    return statistics.fmean(one.low <= one.actual <= one.high for one in told)


def suites(*tellings: back.Tellings) -> dict[str, list[Foretold]]:
    """Figures by suite and quantity and protocol."""
    found: dict[str, list[Foretold]] = defaultdict(list)
    for name, telling in zip(("cold", "history"), tellings, strict=True):
        for quantity, told in (("memory", [*telling.memory, *telling.other]), ("tokens/s", telling.rates)):
            for one in told:
                found[f"{one.row.suite} {quantity} {name}"].append(one)
    return found


def rejecting(*tellings: back.Tellings) -> list[str]:
    """Suites whose intervals hold another share than 90 %, by an exact test."""
    return [
        f"{name} ({sum(one.low <= one.actual <= one.high for one in told)} of {len(told)})"
        for name, told in suites(*tellings).items()
        if binomtest(sum(one.low <= one.actual <= one.high for one in told), len(told), 0.9).pvalue < REJECT
    ]


def page(figures: dict[str, dict[str, Any]], found: Sequence[Goal], cold: back.Tellings, digests: dict[str, str]) -> str:
    """The page in Markdown."""
    inputs = ", ".join(f"{name} ({digest})" for name, digest in digests.items())
    lines = [
        "# How good the estimates are", "",
        "Written by `python -m benchmarks.estimates FOLDER` from public measurements, each row foretold without itself;",
        f"inputs, with the start of their SHA-256: {inputs}. The sizes of effects and the intervals were chosen on the",
        "same tables: expect worse of others. None of these runs was ours, and nothing here ran on a GPU of ours.", "",
        "- cold: nothing of the row's own table (suite) is known.",
        "- history: the rows before it in its table are known too.", "",
        "## Goals", "",
        "| figure | goal | measured | met |", "|---|---|---|---|",
        *(f"| {g.figure} | {g.goal} | {g.measured} | {'–' if g.met is None else 'yes' if g.met else '**no**'} |" for g in found),
        "", "Of 48 tests of suites at 1 %, one rejects by chance in two of five pages like this.", "",
        "## What others reach on the same rows", "", PEERS,
        "## By protocol", "",
    ]  # fmt: skip
    for name in ("cold", "history"):
        lines += [back.in_words(figures[name] | {"uncovered": {}}), ""]
    lines += [
        "## Residuals, cold", "",
        "Each dot is a run: measured over foretold. Left of the line it held or did less than was foretold.", "",
        "![measured over foretold, by suite](estimates.png)", "",
        "| suite | quantity | n | measured / foretold: 5 %, median, 95 % | mean error | intervals that hold | mean width |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, told in sorted(by_suite(cold).items()):
        ratios = sorted(one.actual / one.value for one in told)
        ends = ", ".join(f"{ratios[min(len(ratios) - 1, int(share * len(ratios)))]:.2f}" for share in (0.05, 0.5, 0.95))
        width = statistics.fmean((one.high - one.low) / one.value for one in told)
        lines.append(
            f"| {' | '.join(name)} | {len(told)} | {ends} | {mape(told):.1%} | {coverage(told):.0%} | {width:.2f} |"
        )
    lines += ["", "The largest errors:", "", "| suite | model | method | GPU | quantity | measured / foretold |", "|---|---|---|---|---|---|"]
    worst = [(name[1], one) for name, told in by_suite(cold).items() for one in told]
    for quantity, one in sorted(worst, key=lambda pair: -abs(math.log(pair[1].actual / pair[1].value)))[:12]:
        row = one.row
        lines.append(
            f"| {row.suite} | {row.model} | {row.method} | {row.gpu} | {quantity} | {one.actual / one.value:.2f} |"
        )
    uncovered = figures["cold"]["uncovered"]
    lines += ["", "## Not covered", "", *(f"- {reason}: {n}" for reason, n in uncovered.items()), ""]
    return "\n".join(lines)


def by_suite(cold: back.Tellings) -> dict[tuple[str, str], list[Foretold]]:
    found: dict[tuple[str, str], list[Foretold]] = defaultdict(list)
    for quantity, told in (("memory", [*cold.memory, *cold.other]), ("tokens/s", cold.rates)):
        for one in told:
            found[one.row.suite, quantity].append(one)
    return found


def picture(cold: back.Tellings) -> bytes:
    """Measured over foretold, a line a suite, memory and tokens a second side by side."""
    import io

    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, quantity in zip(figure.subplots(1, 2), ("memory", "tokens/s"), strict=True):
        chosen = {name: told for (name, of), told in sorted(by_suite(cold).items(), reverse=True) if of == quantity}
        for place, told in enumerate(chosen.values()):
            for one in told:
                inside = one.low <= one.actual <= one.high
                jitter = 0.5 * (hash(id(one)) % 97 / 97 - 0.5) if len(told) > 1 else 0.0
                axes.plot(
                    one.actual / one.value, place + jitter, "o", markersize=3.5, alpha=0.6,
                    color="#0072B2" if inside else "#D55E00",
                )  # fmt: skip
        axes.axvline(1, color="#555555", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yticks(range(len(chosen)), [f"{name} ({len(told)})" for name, told in chosen.items()], fontsize=8)
        axes.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        axes.set_xlabel(f"{quantity}: measured / foretold; orange lies outside its 90 % interval")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


if __name__ == "__main__":
    main()
