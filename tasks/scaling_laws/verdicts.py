"""What an analysis shows and what it does not, in plain words: the section that goes beside an experiment's summary."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tasks.scaling_laws import isoflop
from tasks.scaling_laws.analysis import Analysis

STEADY = 0.5  # octaves by which the best learning rate of a good parametrisation may move over 4x width
FLAT = 0.1  # largest slope of the coordinate check


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
        law_words = (
            f"L = {_floor(law['E'])} + {law['A']:.4g} / N^{law['alpha']:.3g} + {law['B']:.4g} / D^{law['beta']:.3g}"
        )
        words = f"{name}, {law['n']} runs: {law_words}{_intervals(law)}."
        doubt = " ".join(([] if law["identifiable"] else [law["why"]]) + doubts(analysis, name))
        found.append(f"Not shown: {words} {doubt}" if doubt else f"Shown: {words} {law['why']}")
    without = [name for name, law in analysis.laws.items() if isinstance(law, str) and name != analysis.control]
    if without:
        found.append(f"Not shown: laws of {'; '.join(without)}. Each has too few runs.")
    return found or ["Not shown: a law; no run that is not of a sweep ended with a loss."]


def doubts(analysis: Analysis, arm: str) -> list[str]:
    """What the guards hold against a conclusion from an arm's runs."""
    said = []
    failed = {run.name: run.failed_guards for run in analysis.grid.get(arm, []) if run.failed_guards}
    if failed:
        first, guards = next(iter(failed.items()))
        said.append(f"Guards failed in {len(failed)} runs: in {first}, {', '.join(guards)}.")
    if len(analysis.validations) > 1:
        said.append(f"The runs were validated on {len(analysis.validations)} different sets of tokens.")
    return said


def lr_verdicts(analysis: Analysis) -> list[str]:
    """One for each arm that was swept."""
    return [_lr_verdict(name, sweep) for name, sweep in analysis.sweeps.items()] or ["Nothing was swept."]


def _lr_verdict(name: str, sweep: dict[str, Any]) -> str:
    law, widths = sweep["in_width"], sweep["widths"]
    best = ", ".join(f"{one['lr']:.3g} at {width} ({one['how']})" for width, one in widths.items())
    diverged = sum(one["n_diverged"] for one in widths.values())
    words = f"{name}: best learning rate {best}" + (f"; {diverged} runs diverged" if diverged else "")
    if law["exponent"] is None:
        return f"Not shown: how the learning rate grows with width. {words}; a single width."
    ci = f" ({law['ci'][0]:+.2f} to {law['ci'][1]:+.2f})" if law["ci"] else ""
    pairs = zip(sweep["drift_of_seeds"], sweep["doubt_of_seeds"], strict=True)
    reach = [(drift, doubt) for drift, doubt in pairs if drift is not None]
    drifts = [drift for drift, _ in reach]
    each = ", ".join(f"{drift:+.2f}" for drift in drifts)
    words += f"; it goes as width^{law['exponent']:+.2f}{ci}: {law['drift_octaves']:+.2f} octaves over "
    words += f"{law['growth']:.3g}x width (seed by seed {each})"
    edges = [width for width, one in widths.items() if one["at_edge"]]
    if edges:
        return f"Not shown: {words}. At width {edges[0]} the best is the last that was tried: sweep further."
    if len(drifts) < 2:
        return f"Not shown: {words}. It is one seed: add another."
    if all(abs(drift) + doubt <= STEADY for drift, doubt in reach):
        return f"Shown: {words}. It moves by at most {STEADY} octaves in every seed."
    for sign in (1, -1):
        if all(sign * drift - doubt > STEADY for drift, doubt in reach):
            return f"Shown: {words}. It moves by more than {STEADY} octaves in every seed, so it does not transfer."
    coarse = max(doubt for _, doubt in reach)
    if coarse and all(abs(drift) <= STEADY for drift in drifts):
        return (
            f"Not shown: {words}. Without a vertex the best is known to {coarse:.2f} octaves only: sweep more finely."
        )
    return f"Not shown: {words}. The seeds disagree on whether it moves by more than {STEADY} octaves, or by how much."


def compute_verdicts(analysis: Analysis) -> list[str]:
    """Power laws, multipliers against the control, and isoFLOP."""
    found = [_power_verdict(name, one) for name, one in analysis.powers.items()]
    for name, one in analysis.multipliers.items():
        pair = f"{analysis.control} against {name}"
        if isinstance(one, str):
            found.append(f"Not shown: {pair}; {one}.")
            continue
        ci = f" ({one['ci'][0]:.2f} to {one['ci'][1]:.2f})" if one["ci"] else ""
        words = f"{pair} needs {one['multiplier']:.2f} times its compute{ci} for the same loss"
        words += f", at {one['n']} of its sizes and lengths with {one['window'][0]:.3g} to {one['window'][1]:.3g} nats"
        words += f"; {one['n_outside']} lie beyond and are left out" if one["n_outside"] else ""
        shown = one["ci"] and not one["ci"][0] <= 1 <= one["ci"][1]
        wrong = doubts(analysis, name) + doubts(analysis, analysis.control or "")
        found.append(
            f"{'Shown' if shown and not wrong else 'Not shown'}: {' '.join([words + '.', *dict.fromkeys(wrong)])}"
        )
    return [*found, _isoflop_verdict(analysis)]


def _power_verdict(name: str, one: dict[str, Any]) -> str:
    ci = f" ({one['alpha_ci'][0]:.3f} to {one['alpha_ci'][1]:.3f})" if one["alpha_ci"] else ""
    low, high = one["window"]
    others = ", ".join(f"{alpha:.3f} with E {floor}" for floor, alpha in one["alpha_by_E"].items())
    return (
        f"{name}: lowest loss = {one['E']:.3g} + {one['A']:.3g} C^-{one['alpha']:.3f}{ci}, E from {one['E_from']}, "
        f"over {low:.2g} to {high:.2g} FLOPs ({one['n']} sizes and lengths). The exponent hangs on E: {others}."
    )


def _isoflop_verdict(analysis: Analysis) -> str:
    known = [curve for curve in analysis.isoflop if curve["best_n"]]
    if not analysis.isoflop:
        return "Not shown: isoFLOP curves; no budget is reached by three sizes with two lengths each."
    grown, law = isoflop.growth(analysis.isoflop), analysis.laws.get(analysis.control or "")
    words = f"isoFLOP: {len(known)} of {len(analysis.isoflop)} budgets have a best size between those trained"
    if grown is None:
        return f"Not shown: {words}, and an exponent needs three."
    exponent = law["optimal_n_exponent"] if isinstance(law, dict) else None
    other = "" if exponent is None else f"; the law says {exponent:.2f}"
    return f"{words}; it grows as C^{grown:.2f}{other}. The budgets share runs, so this has no interval."


def ladder_verdicts(analysis: Analysis) -> list[str]:
    """The table of the ladder and what it says."""
    if not analysis.rungs:
        return ["Nothing was changed one at a time."]
    said = [f"The control is {analysis.ladder_control}. Pairs of equal seeds, 95 % intervals, Holm's adjustment."]
    return said + [rung.words for rung in analysis.rungs]


def coordinate_verdicts(analysis: Analysis) -> list[str]:
    """One for each parametrisation that was checked."""
    found = []
    for kind, one in analysis.coordinates.items():
        worst = max(one["slopes"], key=lambda key: abs(one["slopes"][key]))
        steepest = one["slopes"][worst]
        words = f"{kind}: the steepest of {len(one['slopes'])} slopes over widths {one['widths']} is {steepest:+.2f}"
        flat = abs(steepest) <= FLAT
        verdict = "as a right parametrisation has it" if flat else f"more than {FLAT}: outputs change with width"
        found.append(f"Shown: {words} ({worst}), {verdict}.")
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
    lrs = {run.config["lr"] for run in runs}
    if len(lrs) == 1:
        found.append(f"Not shown: that {lrs.pop():g} is the best learning rate of each size and length.")
    cells = Counter((run.n, run.d) for run in runs)
    if single := sum(times == 1 for times in cells.values()):
        found.append(
            f"Not shown: what another seed would change: {single} of {len(cells)} sizes and lengths were trained once."
        )
    return found


def _intervals(law: dict[str, Any]) -> str:
    if not law["ci"]:
        return ""
    each = [f"{name} {_floor(law['ci'][name][0])} to {law['ci'][name][1]:.3g}" for name in ("E", "alpha", "beta")]
    return f" ({', '.join(each)})"


def _floor(value: float) -> str:
    """A number that is 0 where a fit went towards it without end."""
    return f"{value:.3g}" if value > 1e-6 else "0"
