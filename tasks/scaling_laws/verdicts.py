"""What an analysis shows and what it does not, in plain words: the section that goes beside an experiment's summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.scaling_laws.analysis import Analysis
from tasks.scaling_laws.curves import equation, floored
from tasks.scaling_laws.doubts import doubts, doubts_of_points
from tasks.scaling_laws.fit import LEAST
from tasks.scaling_laws.learning_rates import OVER, STEADY
from tasks.scaling_laws.runs import Run

FLAT = 0.1  # largest slope of the coordinate check
LEAST_SEEDS = 2


def section(analysis: Analysis) -> str:
    """Markdown."""
    lines = ["## What the runs show", "", *analysis.found.in_words()]
    if swept := len(analysis.found.runs) - sum(map(len, analysis.grid.values())):
        lines.append(f"{swept} of them belong to sweeps of learning rates and are no points of laws.")
    lines.append("")
    for heading, verdicts in (
        ("The law", law_verdicts(analysis)),
        ("Learning rates", lr_verdicts(analysis)),
        ("Compute", compute_verdicts(analysis)),
        ("One change at a time", ladder_verdicts(analysis)),
        ("Coordinate check", coordinate_verdicts(analysis)),
        ("How far this reaches", reach_verdicts(analysis)),
    ):
        lines += [f"### {heading}", "", *[f"- {verdict}" for verdict in verdicts], ""]
    return "\n".join(lines)


def law_verdicts(analysis: Analysis) -> list[str]:
    """One for each arm that could have a law."""
    found = []
    for name, law in analysis.laws.items():
        if isinstance(law, str):
            if name == analysis.control:
                found.append(f"Not shown: a law of {name}; {law}.")
            continue
        runs = f"{name}, {law['n']} runs"
        words = f"{runs}: {equation(law)}{_intervals(law)}." if law["n"] >= LEAST else f"a law of {runs}."
        wrong = ([] if law["identifiable"] else [law["why"]]) + doubts_of_points(analysis.grid[name])
        found.append(_verdict(words, wrong, because=law["why"]))
    without = [name for name, law in analysis.laws.items() if isinstance(law, str) and name != analysis.control]
    if without:
        found.append(f"Not shown: laws of {'; '.join(without)}. Each has too few runs.")
    return found or ["Not shown: a law; no run that is not of a sweep ended with a loss."]


def lr_verdicts(analysis: Analysis) -> list[str]:
    """One for each arm that was swept."""
    return [_lr_verdict(name, sweep) for name, sweep in analysis.sweeps.items()] or ["Nothing was swept."]


def _lr_verdict(name: str, sweep: dict[str, Any]) -> str:
    law, widths = sweep["in_width"], sweep["widths"]
    best = ", ".join(f"{one['lr']:.3g} at {width} ({one['how']})" for width, one in widths.items())
    diverged = sum(not math.isfinite(point["loss"]) for point in sweep["points"])
    words = f"{name}: best learning rate {best or 'nowhere: no run has a loss'}"
    words += f"; {diverged} runs diverged" if diverged else ""
    words += f"; {len(sweep['lost'])} runs were lost, such as {sweep['lost'][0]}" if sweep["lost"] else ""
    if law["exponent"] is None:
        return _verdict(f"how the learning rate grows with width. {words}.", ["It is of a single width."])
    ends, seeds = sweep["ends"], sweep["seeds"]
    ci = f" ({law['ci'][0]:+.2f} to {law['ci'][1]:+.2f})" if law["ci"] else ""
    each = ", ".join("none" if one["octaves"] is None else f"{one['octaves']:+.2f}" for one in seeds.values())
    words += f"; it goes as width^{law['exponent']:+.2f}{ci}: {ends['octaves']:+.2f} octaves over "
    words += f"{ends['to'] / ends['from']:.3g}x width (seed by seed {each})."
    wrong = _lr_doubts(sweep)
    return _verdict(words, wrong) if wrong else _moves(words, sweep)


def _lr_doubts(sweep: dict[str, Any]) -> list[str]:
    """Why a sweep shows nothing, wherever its best learning rates lie."""
    wrong, seeds = [], sweep["seeds"]
    edges = {*sweep["ends"]["at_edge"], *(width for one in seeds.values() for width in one["at_edge"])}
    if sweep["missing"]:
        wrong.append(f"No run has a loss at width {sweep['missing'][0]}, and {len(sweep['missing'])} such are missing.")
    if edges:
        wrong.append(f"At width {min(edges)} the best is the last that was tried: sweep further.")
    if len(seeds) < LEAST_SEEDS:
        wrong.append("It is one seed: add another.")
    return wrong + sweep["doubts"]


def _moves(words: str, sweep: dict[str, Any]) -> str:
    """Whether the best learning rate stays: of all seeds between any two widths, and in each seed from end to end."""
    ends, far, seeds = sweep["ends"], sweep["farthest"], list(sweep["seeds"].values())
    over = f"{STEADY} octaves over {OVER:g}x width"
    for sign in (1, -1):
        if all(sign * one["octaves"] - one["doubt"] > one["allowed"] for one in seeds):
            return f"Shown: {words} It moves by more than {over} in every seed, so it does not transfer."
    if all(abs(one["octaves"]) + one["doubt"] <= one["allowed"] for one in [far, *seeds]):
        stays = f"It stays within {over}: in every seed from end to end, and of all seeds between any two widths."
        grown = ends["to"] / ends["from"]
        return _verdict(words, [] if grown >= OVER else [f"{stays} The widest is only {grown:.3g}x as wide."], stays)
    if abs(far["octaves"]) - far["doubt"] > far["allowed"] and (far["from"], far["to"]) != (ends["from"], ends["to"]):
        return _verdict(words, [f"Between widths {far['from']} and {far['to']} it moves by {far['octaves']:+.2f}."])
    if coarse := max(one["doubt"] for one in [far, *seeds]):
        return _verdict(words, [f"Without a vertex the best is known to {coarse:.2f} octaves only: sweep more finely."])
    return _verdict(words, [f"The seeds disagree on whether it moves by more than {over}, or by how much."])


def compute_verdicts(analysis: Analysis) -> list[str]:
    """Power laws, multipliers against the control, and isoFLOP."""
    found = [_power_verdict(name, one, doubts_of_points(analysis.grid[name])) for name, one in analysis.powers.items()]
    control = analysis.grid.get(analysis.control or "", [])
    for name, one in analysis.multipliers.items():
        pair = f"{analysis.control} against {name}"
        if isinstance(one, str):
            found.append(f"Not shown: {pair}; {one}.")
            continue
        ci = f" ({one['ci'][0]:.2f} to {one['ci'][1]:.2f})" if one["ci"] else ""
        words = f"{pair} needs {one['multiplier']:.2f} times its compute{ci} for the same loss"
        words += f", at {one['n']} of its sizes and lengths with {one['window'][0]:.3g} to {one['window'][1]:.3g} nats"
        words += f"; {one['n_outside']} lie beyond and are left out." if one["n_outside"] else "."
        wrong = [] if one["ci"] else ["One size and length has no interval."]
        wrong += ["The interval holds 1."] if one["ci"] and one["ci"][0] <= 1 <= one["ci"][1] else []
        found.append(_verdict(words, wrong + _of_both(control, analysis.grid[name])))
    return [*found, _isoflop_verdict(analysis, doubts_of_points(control))]


def _power_verdict(name: str, one: dict[str, Any], wrong: list[str]) -> str:
    ci = f" ({one['alpha_ci'][0]:.3f} to {one['alpha_ci'][1]:.3f})" if one["alpha_ci"] else ""
    low, high = one["window"]
    others = ", ".join(f"{alpha:.3f} with E {floor}" for floor, alpha in one["alpha_by_E"].items())
    words = f"{name}: lowest loss = {one['E']:.3g} + {one['A']:.3g} C^-{one['alpha']:.3f}{ci}, E from {one['E_from']}, "
    words += f"over {low:.2g} to {high:.2g} FLOPs ({one['n']} sizes and lengths)."
    hangs = f"The exponent hangs on E: {others}."
    return _verdict(words, ([] if one["E_known"] and ci else [hangs]) + wrong, because=hangs)


def _isoflop_verdict(analysis: Analysis, wrong: list[str]) -> str:
    known = [curve for curve in analysis.isoflop if curve["best_n"]]
    if not analysis.isoflop:
        return "Not shown: isoFLOP curves; no budget is reached by three sizes."
    grown, law = analysis.isoflop_growth, analysis.laws.get(analysis.control or "")
    words = f"isoFLOP: {len(known)} of {len(analysis.isoflop)} budgets have a best size between those trained"
    if grown is None:
        return _verdict(f"{words}.", ["An exponent needs three.", *wrong])
    ci = grown["ci"]
    words += f"; it grows as C^{grown['exponent']:.2f}" + (f" ({ci[0]:.2f} to {ci[1]:.2f}). " if ci else ". ")
    exponent = law["optimal_n_exponent"] if isinstance(law, dict) and law["identifiable"] else None
    words += "The budgets share runs; the interval leaves out a size at a time." if ci else ""
    words += "" if exponent is None else f" The law says {exponent:.2f}."
    open_ = [] if ci else ["Without one of the sizes too few budgets have a best one."]
    open_ += ["The interval holds 0: it needs more sizes, or budgets further apart."] if ci and ci[0] <= 0 else []
    return _verdict(words.strip(), open_ + wrong)


def _of_both(control: Sequence[Run], arm: Sequence[Run]) -> list[str]:
    """What is to be held against a conclusion from the runs of two arms."""
    return list(dict.fromkeys([*doubts_of_points(control), *doubts_of_points(arm), *doubts([*control, *arm])]))


def ladder_verdicts(analysis: Analysis) -> list[str]:
    """The table of the ladder and what it says."""
    if not analysis.rungs:
        return ["Nothing was changed one at a time."]
    said = [f"The control is {analysis.ladder_control}. Pairs of equal seeds, 95 % intervals, Holm's adjustment."]
    return said + [rung.words for rung in analysis.rungs]


def coordinate_verdicts(analysis: Analysis) -> list[str]:
    """One for each parametrisation that was checked; a flat one counts where the standard one, its control, is not."""
    steepest = {kind: max(one["slopes"].items(), key=lambda each: abs(each[1]), default=("nothing", 0.0))
                for kind, one in analysis.coordinates.items()}  # fmt: skip
    caught = abs(steepest.get("standard", ("", 0.0))[1]) > FLAT
    found = []
    for kind, (worst, slope) in steepest.items():
        one = analysis.coordinates[kind]
        words = f"{kind}: the steepest of {len(one['slopes'])} slopes over widths {one['widths']} is {slope:+.2f} "
        large = f"more than {FLAT}: outputs change with width"
        words += f"({worst}), {'as a right parametrisation has it' if abs(slope) <= FLAT else large}."
        wrong = [] if one["slopes"] else ["Every output is 0 at some width."]
        wrong += [] if caught else ["The standard parametrisation was not caught, so the check tells nothing here."]
        found.append(_verdict(words, wrong))
    return found or ["Not made."]


def reach_verdicts(analysis: Analysis) -> list[str]:
    """What no run of this experiment could have shown."""
    runs = analysis.grid.get(analysis.control or "", [])
    texts = sorted({Path(run.config["dataset"]).name for run in analysis.found.runs if run.config.get("dataset")})
    found = [f"Not shown: anything of other text than {' and '.join(texts)}."] if texts else []
    if not runs:
        return found or ["Nothing was trained beside sweeps."]
    n, d = sorted(run.n for run in runs), sorted(run.d for run in runs)
    found.append(f"Not shown: the law beyond {n[0]:,} to {n[-1]:,} parameters and {d[0]:,} to {d[-1]:,} tokens.")
    lrs = " or ".join(f"{lr:g}" for lr in sorted({run.config["lr"] for run in runs}))
    found.append(f"Not shown: that {lrs} is the best learning rate of each size and length.")
    cells = Counter((run.n, run.d) for run in runs)
    if single := sum(times == 1 for times in cells.values()):
        found.append(
            f"Not shown: what another seed would change: {single} of {len(cells)} sizes and lengths were trained once."
        )
    return found


def _verdict(words: str, wrong: Sequence[str], because: str = "") -> str:
    """Shown, and because of what, or not shown, and for all that is wrong."""
    if wrong:
        return " ".join([f"Not shown: {words}", *dict.fromkeys(wrong)])
    return f"Shown: {words} {because}".strip()


def _intervals(law: dict[str, Any]) -> str:
    if not law["ci"]:
        return ""
    each = [f"{name} {floored(law['ci'][name][0])} to {law['ci'][name][1]:.3g}" for name in ("E", "alpha", "beta")]
    return f" ({', '.join(each)})"
