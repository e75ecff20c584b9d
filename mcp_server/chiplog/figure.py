"""The picture of a summary: one point with its interval for every run, controls as hollow points."""

from __future__ import annotations

import io
import os
import tempfile
import textwrap

from chiplog.summary import Summary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by all

TITLE_WIDTH = 76  # letters that fit into a line


def scores_figure(summary: Summary, metric: str) -> bytes:
    """A PNG: runs from top to bottom, the share of items right from left to right, failed runs named."""
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), "chiplog-matplotlib"))  # noqa: PTH118
    from matplotlib import rc_context

    # Names and questions are plain text: a $ is a dollar, and starts no formula.
    with rc_context({"text.parse_math": False, "text.usetex": False}):
        return _draw(summary, metric)


def _draw(summary: Summary, metric: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.model for row in summary.rows))
    rows = sorted(summary.rows, key=lambda row: (models.index(row.model), row.kind == "control"))
    longest = max(len(row.run) for row in rows)
    figure = Figure(figsize=(6 + 0.08 * longest, 1.4 + 0.38 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{metric.replace('_', ' ')}, % of the items, with the exact 95 % interval")
    figure.suptitle(_title(summary), x=0.01, ha="left", fontsize=10, wrap=True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _title(summary: Summary) -> str:
    """The question, in a few lines; where the font lacks its letters, the name of the experiment."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    question = " ".join(summary.question.split())
    known = get_font(findfont(FontProperties())).get_charmap()
    title = question if all(ord(letter) in known for letter in question) else summary.experiment
    return textwrap.fill(title, TITLE_WIDTH, max_lines=3, placeholder=" ...")
