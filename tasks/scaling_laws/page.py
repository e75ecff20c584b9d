"""The pictures of an analysis as one page to look into: each point names its run. Opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io

from tasks.scaling_laws import curves
from tasks.scaling_laws.analysis import Analysis
from tasks.scaling_laws.curves import colour, short
from tasks.scaling_laws.runs import Run

ARMS = ("triangle-up-open", "square-open", "diamond-open", "triangle-down-open", "cross-open", "x-open")
LOSS = "validation loss, nats a token"


def page(analysis: Analysis, title: str) -> str:
    """HTML, with the library that draws it."""
    makes = (loss_and_compute, residuals, learning_rates, isoflops, coordinates)
    figures = [figure for make in makes for figure in make(analysis)]
    parts = [
        plotly.io.to_html(figure, full_html=False, include_plotlyjs=place == 0) for place, figure in enumerate(figures)
    ]
    body = "\n".join(parts) or "<p>No run ended with a loss.</p>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>'
        f'<body style="font-family: sans-serif"><h1>{escape(title)}</h1>\n{body}</body></html>'
    )


def loss_and_compute(analysis: Analysis) -> list[go.Figure]:
    """Loss over FLOPs of every run of the grid, with the law's curves of the control."""
    control, law = analysis.control, analysis.laws.get(analysis.control or "")
    if control is None:
        return []
    law = law if isinstance(law, dict) else None
    figure, sizes = go.Figure(), curves.by_size(analysis.grid[control])
    for place, (n, runs) in enumerate(sizes):
        figure.add_trace(_runs(runs, f"{short(n)} parameters", colour(place), "circle"))
        if law:
            _line(figure, *curves.of_size(law, runs), colour(place), dash="solid" if law["identifiable"] else "dot")
    for place, name in enumerate(name for name in analysis.grid if name != control):
        figure.add_trace(_runs(analysis.grid[name], name, "#555555", ARMS[place % len(ARMS)]))
    if law and law["identifiable"]:
        flops, loss, exponent = curves.best_of_law(law, analysis.grid[control])
        _line(figure, flops, loss, "#555555", f"best of the law, N ~ C^{exponent:.2f}", dash="dash")
    return [_titled(figure, f"{control}: {curves.titled(law)}", "training FLOPs", LOSS, log_y=True)]


def residuals(analysis: Analysis) -> list[go.Figure]:
    """How far the control's runs lie from its law."""
    control, law = analysis.control, analysis.laws.get(analysis.control or "")
    if control is None or not isinstance(law, dict):
        return []
    figure = go.Figure()
    for place, (n, runs) in enumerate(curves.by_size(analysis.grid[control])):
        above = [100 * (run.loss / float(curves.predicted(law, run.n, run.d)[0]) - 1) for run in runs]
        names = [run.name for run in runs]
        _points(figure, [run.d for run in runs], above, f"{short(n)} parameters", colour(place), names=names)
    return [_titled(figure, f"Residuals of the law: {control}", "tokens D", "loss above the law, %")]


def learning_rates(analysis: Analysis) -> list[go.Figure]:
    """Loss over learning rate, with the parabola of each width where it was fitted; a figure an arm."""
    figures = []
    for name, sweep in analysis.sweeps.items():
        figure = go.Figure()
        for place, (width, best) in enumerate(sweep["widths"].items()):
            ended, diverged = curves.of_width(sweep, width)
            lrs, losses = [point["lr"] for point in ended], [point["loss"] for point in ended]
            _points(figure, lrs, losses, f"width {width}", colour(place), names=[point["name"] for point in ended])
            if best["parabola"]:
                _line(figure, *curves.parabola(best["parabola"], best["window"]), colour(place))
            figure.add_vline(best["lr"], line={"color": colour(place), "width": 1, "dash": "dot"})
            if diverged:
                top = [max(losses)] * len(diverged)
                names = [f"{point['name']} diverged" for point in diverged]
                _points(figure, [point["lr"] for point in diverged], top, f"width {width}, diverged", colour(place),
                        names=names, symbol="x")  # fmt: skip
        figures.append(_titled(figure, f"Learning rates: {name}", "learning rate", LOSS))
    return figures


def isoflops(analysis: Analysis) -> list[go.Figure]:
    """Loss over size for each budget of compute."""
    figure = go.Figure()
    for place, curve in enumerate(analysis.isoflop):
        n, losses = zip(*curve["points"], strict=True)
        _points(figure, n, losses, f"{curve['flops']:.1e} FLOPs", colour(place))
        _line(figure, *curves.parabola(curve["parabola"], n), colour(place))
    return [_titled(figure, curves.isoflop_title(analysis.isoflop), "parameters N", LOSS)] if analysis.isoflop else []


def coordinates(analysis: Analysis) -> list[go.Figure]:
    """The mean size of the logits over width, a figure a parametrisation."""
    figures = []
    for kind, one in analysis.coordinates.items():
        figure = go.Figure()
        for step, sizes in enumerate(one["logits"]):
            if step and all(sizes):
                _points(figure, one["widths"], sizes, f"step {step}", colour(step - 1), "lines+markers")
        figures.append(_titled(figure, f"Coordinate check: {kind}", "width", "mean |logit|", log_y=True))
    return figures


def _runs(runs: Sequence[Run], name: str, colour: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        x=[run.flops for run in runs], y=[run.loss for run in runs], name=name, mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 8},
        customdata=[[run.name, run.n, run.d] for run in runs],
        hovertemplate="%{customdata[0]}<br>N %{customdata[1]:,}, D %{customdata[2]:,}<br>%{x:.3g} FLOPs, loss %{y:.4f}",
    )  # fmt: skip


def _points(
    figure: go.Figure,
    x: Sequence[float],
    y: Sequence[float],
    name: str,
    colour: str,
    mode: str = "markers",
    names: Sequence[str] | None = None,
    symbol: str = "circle",
) -> None:
    marker = {"color": colour, "size": 8, "symbol": symbol}
    figure.add_trace(go.Scatter(x=list(x), y=list(y), name=name, mode=mode, marker=marker, text=names))


def _line(figure: go.Figure, x: Any, y: Any, colour: str, name: str | None = None, dash: str = "solid") -> None:
    figure.add_trace(
        go.Scatter(
            x=list(x),
            y=list(y),
            name=name,
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": dash},
            showlegend=name is not None,
            hoverinfo="skip",
        )
    )


def _titled(figure: go.Figure, title: str, x: str, y: str, log_y: bool = False) -> go.Figure:
    figure.update_layout(title=title, template="plotly_white", height=480, width=900)
    figure.update_xaxes(title=x, type="log")
    figure.update_yaxes(title=y, type="log" if log_y else "linear")
    return figure
