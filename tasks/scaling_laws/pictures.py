"""The pictures of an analysis, as PNG files: each says in its title what is drawn and from how many runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / "scaling-laws-matplotlib"))

# isort: split
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

from tasks.scaling_laws import curves
from tasks.scaling_laws.analysis import Analysis
from tasks.scaling_laws.curves import COLOURS, colour, short
from tasks.scaling_laws.runs import Run

ARMS = "^sDvPX"  # markers of those that are not the control


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
    """Loss over FLOPs of every run; the law's curves of each size of the control, and what it says is best.

    Of a law that is not identified the curves are dotted, and there is no best.
    """
    figure, (axes,) = _figure(1)
    control = analysis.grid[analysis.control or ""]
    sizes = curves.by_size(control)
    others = [name for name in analysis.grid if name != analysis.control]
    for place, name in enumerate(others):
        marker = ARMS[place % len(ARMS)]
        axes.plot(*_xy(analysis.grid[name]), marker, color="#555555", ms=5, mfc="none", label=name)
    law = _law(analysis)
    for place, (n, runs) in enumerate(sizes):
        axes.plot(*_xy(runs), "o", color=colour(place), ms=5, label=f"{short(n)} parameters")
        if law:
            axes.plot(*curves.of_size(law, runs), "-" if law["identifiable"] else ":", color=colour(place), lw=1)
    if law and law["identifiable"]:
        flops, loss, exponent = curves.best_of_law(law, control)
        label = f"best of the law, $N \\propto C^{{{exponent:.2f}}}$"
        axes.plot(flops, loss, "--", color="#555555", lw=1.2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="validation loss, nats a token")
    _few_numbers(axes)
    _some_sizes(axes)
    axes.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{analysis.control}, {len(control)} runs\n{curves.titled(law)}", fontsize=9)
    return figure


def residuals(analysis: Analysis) -> Figure:
    """How far the control's runs lie from its law, over parameters and over tokens."""
    figure, both = _figure(2)
    law, runs = _law(analysis), analysis.grid[analysis.control or ""]
    assert law is not None
    for axes, key, label in zip(both, ("n", "d"), ("parameters N", "tokens D"), strict=True):
        x = np.array([getattr(run, key) for run in runs], dtype=float)
        y = [100 * (run.loss / curves.predicted(law, run.n, run.d) - 1) for run in runs]
        axes.axhline(0, color="#999999", lw=0.8)
        axes.plot(x, y, "o", color=COLOURS[0], ms=4)
        axes.set(xscale="log", xlabel=label, ylabel="loss above the law, %")
        _some_sizes(axes)
    figure.suptitle(f"Residuals of the law, {len(runs)} runs of {analysis.control}", fontsize=9)
    return figure


def learning_rates(analysis: Analysis) -> Figure:
    """Loss over learning rate of each width with the parabola, over what it was fitted to; a panel an arm."""
    figure, panels = _figure(len(analysis.sweeps), share_y=True)
    for axes, (name, sweep) in zip(panels, analysis.sweeps.items(), strict=True):
        for place, (width, best) in enumerate(sweep["widths"].items()):
            ended, diverged = curves.of_width(sweep, width)
            axes.plot(*_columns(ended), "o", color=colour(place), ms=4, label=f"width {width}")
            top = [1.0 - 0.03 * place] * len(diverged)
            axes.plot([p["lr"] for p in diverged], top, "x", color=colour(place), transform=axes.get_xaxis_transform())
            if best["parabola"]:
                axes.plot(*curves.parabola(best["parabola"], best["window"]), color=colour(place), lw=1)
            if best["how"] == "vertex":
                at = curves.on_parabola(best["parabola"], best["lr"])
                axes.plot(best["lr"], at, "*", color=colour(place), ms=11)
            else:
                axes.axvline(best["lr"], color=colour(place), lw=0.8, ls=":")
        law = sweep["in_width"]
        words = "" if law["exponent"] is None else f": best lr $\\propto$ width$^{{{law['exponent']:+.2f}}}$"
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_title(f"{name}{words}", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("validation loss, nats a token")
    figure.suptitle(
        "Best learning rates: a star is a parabola's vertex that counts, a dotted line the best that was tried;\n"
        "a cross diverged",
        fontsize=9,
    )
    return figure


def isoflops(analysis: Analysis) -> Figure:
    """Loss over size for each budget of compute."""
    figure, (axes,) = _figure(1)
    for place, curve in enumerate(analysis.isoflop):
        n, loss = zip(*curve["points"], strict=True)
        axes.plot(n, loss, "o", color=colour(place), ms=5, label=f"{curve['flops']:.1e} FLOPs")
        axes.plot(*curves.parabola(curve["parabola"], n), color=colour(place), lw=1)
        if best := curve["best_n"]:
            axes.plot(best, curves.on_parabola(curve["parabola"], best), "*", color=colour(place), ms=11)
    axes.set(xscale="log", xlabel="parameters N", ylabel="validation loss, nats a token")
    _some_sizes(axes)
    axes.legend(fontsize=7, frameon=False)
    title = curves.isoflop_title(analysis.isoflop)
    figure.suptitle(f"{title}: {analysis.control}; a star is a best size", fontsize=9)
    return figure


def coordinate_check(analysis: Analysis) -> Figure:
    """The mean size of the logits over width before each of the first steps; a panel a parametrisation."""
    figure, panels = _figure(len(analysis.coordinates), share_y=True)
    for axes, (kind, one) in zip(panels, analysis.coordinates.items(), strict=True):
        for step, sizes in enumerate(one["logits"]):
            if step and all(sizes):
                slope = one["slopes"][f"step {step} logits"]
                axes.plot(one["widths"], sizes, "o-", color=colour(step - 1), label=f"step {step}: {slope:+.2f}")
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


def _few_numbers(axes: Axes) -> None:
    """Plain numbers on a logarithmic axis of less than a decade."""
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _some_sizes(axes: Axes) -> None:
    """1, 2 and 5 of each decade on a logarithmic axis that has few, so that labels stand apart."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(9, 9)))
    axes.xaxis.set_minor_locator(NullLocator())


def _columns(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["lr"] for point in points], [point["loss"] for point in points]


def _xy(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    return [run.flops for run in runs], [run.loss for run in runs]
