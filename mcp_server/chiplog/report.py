"""Writes what people read when the runs have ended: `summary.md` and its figure."""

from __future__ import annotations

from pathlib import Path

from chiplog.figure import scores_figure
from chiplog.files import write_atomic
from chiplog.folder import ExperimentFolder
from chiplog.render import template_environment
from chiplog.summary import Summary
from chiplog.tables import table_headings, table_row
from chiplog.text import duration


def write_summary(folder: ExperimentFolder, summary: Summary) -> list[Path]:
    """Writes `summary.md` and `figures/scores.png`; returns their paths."""
    plan = folder.plan
    columns = list(dict.fromkeys(key for row in summary.rows for key in row.varied))
    text = (
        template_environment()
        .get_template("summary.md.j2")
        .render(
            plan=plan,
            summary=summary,
            headings=table_headings(plan, columns),
            rows=[table_row(number, row, plan, columns) for number, row in enumerate(summary.rows, start=1)],
            duration=duration,
        )
    )
    files = [folder.path / "summary.md"]
    write_atomic(files[0], text.encode())
    if any(row.scores for row in summary.rows):
        files.append(folder.path / "figures" / "scores.png")
        write_atomic(files[1], scores_figure(summary, plan.metrics[0]))
    return files
