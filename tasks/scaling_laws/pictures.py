"""The pictures of an analysis, as PNG files: each says in its title what is drawn and from how many runs."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / "scaling-laws-matplotlib"))

# isort: split
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from tasks.scaling_laws import law as laws
from tasks.scaling_laws.analysis import Analysis
from tasks.scaling_laws.runs import Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


def draw_all(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes the pictures that there is something for, and says which."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[Any, Callable[[Analysis], Figure]]] = {
        "loss_and_compute": (analysis.grid, loss_and_compute),
        "residuals": (isinstance(_law(analysis), dict), residuals),
        "learning_rates": (analysis.sweeps, learning_rates),
        "isoflop": (analysis.isoflop, isoflops),
        "coordinate_check": (analysis.coordinates, coordinate_check),
    }
    written = []
    for name, (there, picture) in pictures.items():
        if there:
            figure = picture(analysis)
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
            written.append(folder / f"{name}.png")
    return written


def loss_and_compute(analysis: Analysis) -> Figure:
    """Loss over FLOPs of every run; the law's curves of each size of the control, and what it says is best."""
    figure, (axes,) = _figure(1)
    control = analysis.grid[analysis.control or ""]
    sizes = _sizes(control)
    others = [name for name in analysis.grid if name != analysis.control]
    for place, name in enumerate(others, len(sizes)):
        axes.plot(*_xy(analysis.grid[name]), "^", color=_colour(place), ms=5, mfc="none", label=name)
    law = _law(analysis)
    for place, (n, runs) in enumerate(sizes):
        axes.plot(*_xy(runs), "o", color=_colour(place), ms=5, label=f"{_short(n)} parameters")
        if law:
            _curve(axes, law, runs, _colour(place))
    words = "no law"
    if law:
        _frontier(axes, law, control)
        words = (
            f"$L = {law['E']:.3g} + {law['A']:.3g}\\,N^{{-{law['alpha']:.3f}}}"
            f" + {law['B']:.3g}\\,D^{{-{law['beta']:.3f}}}$"
        )
        words += "" if law["identifiable"] else " (not identified)"
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="validation loss, nats a token")
    _few_numbers(axes)
    axes.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{analysis.control}, {len(control)} runs\n{words}", fontsize=9)
    return figure


def residuals(analysis: Analysis) -> Figure:
    """How far the control's runs lie from its law, over parameters and over tokens."""
    figure, both = _figure(2)
    law, runs = _law(analysis), analysis.grid[analysis.control or ""]
    assert law is not None
    for axes, key, label in zip(both, ("n", "d"), ("parameters N", "tokens D"), strict=True):
        x = np.array([getattr(run, key) for run in runs], dtype=float)
        y = [100 * (run.loss / _predicted(law, run.n, run.d) - 1) for run in runs]
        axes.axhline(0, color="#999999", lw=0.8)
        axes.plot(x, y, "o", color=COLOURS[0], ms=4)
        axes.set(xscale="log", xlabel=label, ylabel="loss above the law, %")
    figure.suptitle(f"Residuals of the law, {len(runs)} runs of {analysis.control}", fontsize=9)
    return figure


def learning_rates(analysis: Analysis) -> Figure:
    """Loss over learning rate of each width with its parabola; a panel an arm."""
    figure, panels = _figure(len(analysis.sweeps), share_y=True)
    for axes, (name, sweep) in zip(panels, analysis.sweeps.items(), strict=True):
        for place, (width, best) in enumerate(sweep["widths"].items()):
            points = [(lr, loss) for of, lr, loss in sweep["points"] if of == width and np.isfinite(loss)]
            axes.plot(*zip(*points, strict=True), "o", color=_colour(place), ms=4, label=f"width {width}")
            if best["parabola"]:
                _parabola(axes, best, [lr for lr, _ in points], _colour(place))
        law = sweep["in_width"]
        words = "" if law["exponent"] is None else f": best lr $\\propto$ width$^{{{law['exponent']:+.2f}}}$"
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_title(f"{name}{words}", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("validation loss, nats a token")
    figure.suptitle("Best learning rates: parabolas in ln lr; a star is a vertex that counts", fontsize=9)
    return figure


def isoflops(analysis: Analysis) -> Figure:
    """Loss over size for each budget of compute."""
    figure, (axes,) = _figure(1)
    for place, curve in enumerate(analysis.isoflop):
        n, loss = np.array(curve["points"]).T
        colour, x = _colour(place), np.geomspace(n.min(), n.max(), 60)
        axes.plot(n, loss, "o", color=colour, ms=5, label=f"{curve['flops']:.1e} FLOPs")
        axes.plot(x, np.polyval(curve["parabola"], np.log(x)), color=colour, lw=1)
        if curve["best_n"]:
            best = curve["best_n"]
            axes.plot(best, np.polyval(curve["parabola"], np.log(best)), "*", color=colour, ms=11)
    axes.set(xscale="log", xlabel="parameters N", ylabel="validation loss, nats a token")
    axes.legend(fontsize=7, frameon=False)
    figure.suptitle(f"isoFLOP curves of {analysis.control}; a star is a best size between those trained", fontsize=9)
    return figure


def coordinate_check(analysis: Analysis) -> Figure:
    """The mean size of the logits over width before each of the first steps; a panel a parametrisation."""
    figure, panels = _figure(len(analysis.coordinates), share_y=True)
    for axes, (kind, one) in zip(panels, analysis.coordinates.items(), strict=True):
        for step, sizes in one["logits"].items():
            if step and all(sizes):
                slope = one["slopes"][f"step {step} logits"]
                axes.plot(one["widths"], sizes, "o-", color=_colour(step - 1), label=f"step {step}: {slope:+.2f}")
        axes.set(xscale="log", yscale="log", xlabel="width")
        _few_numbers(axes)
        axes.set_xticks(one["widths"], [str(width) for width in one["widths"]], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(kind, fontsize=8)
        axes.legend(title="slope of log2 over log2", title_fontsize=7, fontsize=7, frameon=False)
    panels[0].set_ylabel("mean |logit|")
    figure.suptitle("Coordinate check: under a right parametrisation nothing grows with width", fontsize=9)
    return figure


def _figure(panels: int, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1 + 4.6 * panels if panels > 1 else 6.4, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False, sharey=share_y)[0]
    for axes in all_axes:
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, all_axes


def _law(analysis: Analysis) -> dict[str, Any] | None:
    law = analysis.laws.get(analysis.control or "")
    return law if isinstance(law, dict) else None


def _predicted(law: dict[str, Any], n: Any, d: Any) -> Any:
    theta = np.array([np.log(law["E"]), np.log(law["A"]), np.log(law["B"]), law["alpha"], law["beta"]])
    return laws.predicted(theta, np.atleast_1d(n).astype(float), np.atleast_1d(d).astype(float))


def _curve(axes: Axes, law: dict[str, Any], runs: Sequence[Run], colour: str) -> None:
    """The law over the lengths of one size."""
    d = np.geomspace(min(run.d for run in runs), max(run.d for run in runs), 40)
    per_token = runs[0].flops / runs[0].d
    axes.plot(per_token * d, _predicted(law, np.full(40, runs[0].n), d), color=colour, lw=1)


def _frontier(axes: Axes, law: dict[str, Any], runs: Sequence[Run]) -> None:
    """The lowest loss that the law gives for each compute C = 6ND, drawn over the exact FLOPs, which are near it."""
    low, high = min(run.flops for run in runs), max(run.flops for run in runs)
    exact = float(np.exp(np.mean([np.log(run.flops / (6 * run.n * run.d)) for run in runs])))
    alpha, beta = law["alpha"], law["beta"]
    compute = np.geomspace(low, high, 40) / exact
    n = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta)) * (compute / 6) ** (beta / (alpha + beta))
    loss = _predicted(law, n, compute / 6 / n)
    a = beta / (alpha + beta)
    axes.plot(
        exact * compute, loss, "--", color="#555555", lw=1.2, label=f"best of the law, $N \\propto C^{{{a:.2f}}}$"
    )


def _few_numbers(axes: Axes) -> None:
    """Plain numbers on a logarithmic axis of less than a decade."""
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _parabola(axes: Axes, best: dict[str, Any], lrs: Sequence[float], colour: str) -> None:
    x = np.geomspace(min(lrs), max(lrs), 60)
    y = np.polyval(best["parabola"], np.log(x))
    axes.plot(x, y, color=colour, lw=1)
    if best["how"] == "vertex":
        axes.plot(best["lr"], np.polyval(best["parabola"], np.log(best["lr"])), "*", color=colour, ms=11)


def _sizes(runs: Sequence[Run]) -> list[tuple[int, list[Run]]]:
    sizes: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        sizes[run.n].append(run)
    return sorted(sizes.items())


def _xy(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    return [run.flops for run in runs], [run.loss for run in runs]


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _short(n: int) -> str:
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"
