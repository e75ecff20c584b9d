"""Writes what people read when the runs have ended: `summary.md` and its figure."""

from __future__ import annotations

from pathlib import Path

from chiplog.figure import scores_figure
from chiplog.files import write_atomic
from chiplog.folder import ExperimentFolder
from chiplog.render import refuse_links, template_environment
from chiplog.summary import Summary
from chiplog.tables import summary_table
from chiplog.text import duration


def write_summary(folder: ExperimentFolder, summary: Summary) -> list[Path]:
    """Writes `summary.md` and, where there are scores, `figures/scores.png`; returns their paths.

    Raises RenderError if a link leads out of the folder.
    """
    refuse_links(folder.path, ["summary.md", "figures/scores.png"])
    plan = folder.plan
    template = template_environment().get_template("summary.md.j2")
    table = summary_table(summary.rows, plan.metrics)
    figure = any(row.scores for row in summary.rows)
    text = template.render(plan=plan, summary=summary, table=table, figure=figure, duration=duration)
    files = [folder.path / "summary.md"]
    write_atomic(files[0], text.encode())
    if figure:
        files.append(folder.path / "figures" / "scores.png")
        write_atomic(files[1], scores_figure(summary, plan.metrics[0]))
    return files
