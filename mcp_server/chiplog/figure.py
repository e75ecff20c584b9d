"""The picture of a summary: one point for every run, a score with its interval, controls as hollow points."""

from __future__ import annotations

import io
import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from chiplog.record import State
from chiplog.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by all

TITLE_WIDTH = 76  # letters that fit into a line
TALLEST = 30  # inches of rows, from which on they move together


def scores_figure(summary: Summary, metric: str) -> bytes:
    """A PNG: runs from top to bottom, the share of items right from left to right, failed runs named."""
    with _plain_text():
        return _draw(summary, metric)


def losses_figure(summary: Summary) -> bytes:
    """A PNG: runs from top to bottom, the validation loss at the end from left to right, runs without one named."""
    with _plain_text():
        return _draw_losses(summary)


@contextmanager
def _plain_text() -> Iterator[None]:
    """Names and questions are plain text: a $ is a dollar, and starts no formula."""
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), "chiplog-matplotlib"))  # noqa: PTH118
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def _draw_losses(summary: Summary) -> bytes:
    from matplotlib.transforms import blended_transform_factory

    rows = summary.rows
    figure, axes = _empty([row.run for row in rows])
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    for place, row in enumerate(rows):
        if row.val_loss is None or row.state is not State.COMPLETED:
            words = "diverged" if row.diverged else row.state.lower() if row.state else "not run"
            axes.text(0.01, place, f"{words}: no loss", transform=beside, va="center", color="#555555", style="italic")
            continue
        axes.plot(row.val_loss, place, "o", color=COLOURS[0])
        axes.annotate(
            f"{row.val_loss:.4g}", (row.val_loss, place), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.15)
    axes.set_yticks(range(len(rows)), [row.run for row in rows])
    axes.set_xlabel("validation loss at the end, nats a token")
    return _finished(figure, axes, summary, len(rows))


def _empty(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with room for that many rows; of very many, they move together."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 1.4 + min(0.38 * len(names), max(TALLEST, 0.12 * len(names)))
    figure = Figure(figsize=(6 + 0.08 * max(map(len, names)), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finished(figure: Figure, axes: Axes, summary: Summary, n: int) -> bytes:
    """The PNG, with its title and nothing that carries no information."""
    axes.set_ylim(n - 0.4, -0.6)
    figure.suptitle(_title(summary), x=0.01, ha="left", fontsize=10, wrap=True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw(summary: Summary, metric: str) -> bytes:
    models = list(dict.fromkeys(row.model for row in summary.rows))
    rows = sorted(summary.rows, key=lambda row: (models.index(row.model), row.kind == "control"))
    figure, axes = _empty([row.run for row in rows])
    for place, row in enumerate(rows):
        colour = COLOURS[models.index(row.model) % len(COLOURS)]
        score = row.scores.get(metric)
        if score is None:
            words = row.state.lower() if row.state else "not run"
            axes.text(1, place, f"{words}: no score", va="center", color="#555555", style="italic")
            continue
        value, low, high = (100 * x for x in (score.value, score.low, score.high))
        inside = "white" if row.kind == "control" else colour
        error = [[value - low], [high - value]]
        axes.errorbar(value, place, xerr=error, fmt="o", color=colour, capsize=3, markerfacecolor=inside)
        left = value > 75
        axes.annotate(
            f"{value:.0f}",
            (low if left else high, place),
            xytext=(-6 if left else 6, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=colour,
        )
    axes.set_yticks(range(len(rows)), [row.run + (" (control)" if row.kind == "control" else "") for row in rows])
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{metric.replace('_', ' ')}, % of the items, with the exact 95 % interval")
    return _finished(figure, axes, summary, len(rows))


def _title(summary: Summary) -> str:
    """The question, in a few lines; where the font lacks its letters, the name of the experiment."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    question = " ".join(summary.question.split())
    known = get_font(findfont(FontProperties())).get_charmap()
    title = question if all(ord(letter) in known for letter in question) else summary.experiment
    return textwrap.fill(title, TITLE_WIDTH, max_lines=3, placeholder=" ...")
