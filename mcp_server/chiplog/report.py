"""Writes what people read when the runs have ended: `summary.md` and its figure."""

from __future__ import annotations

import os
from pathlib import Path

from chiplog.figure import losses_figure, scores_figure
from chiplog.files import write_atomic
from chiplog.folder import ExperimentFolder
from chiplog.render import refuse_links, template_environment
from chiplog.summary import Summary
from chiplog.tables import summary_table
from chiplog.text import duration


def write_summary(folder: ExperimentFolder, summary: Summary) -> list[Path]:
    """Writes `summary.md` and, where there are results, `figures/scores.png` or `losses.png`; returns their paths.

    Raises RenderError if a link leads out of the folder.
    """
    plan = folder.plan
    trains = plan.framework == "trainer"
    picture = f"figures/{'losses' if trains else 'scores'}.png"
    refuse_links(folder.path, ["summary.md", picture])
    template = template_environment().get_template("summary.md.j2")
    table = summary_table(summary.rows, plan.metrics)
    analysis = summary.analysis and os.path.relpath(summary.analysis.analysis, folder.path)
    figure = any(row.val_loss is not None if trains else row.scores for row in summary.rows)
    text = template.render(
        plan=plan, summary=summary, table=table, figure=picture if figure else None, trains=trains, duration=duration,
        analysis=analysis,
    )  # fmt: skip
    files = [folder.path / "summary.md"]
    write_atomic(files[0], text.encode())
    if figure:
        files.append(folder.path / picture)
        drawn = losses_figure(summary) if trains else scores_figure(summary, plan.metrics[0])
        write_atomic(files[1], drawn)
    return files
