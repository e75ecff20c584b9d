"""What an experiment showed, and what it did not, from the records alone.

Every run of the plan has a row, whether it ran or not. Arms that differ in one variable are compared, and each arm
with its control; a difference counts as shown only after Holm's adjustment for the number of comparisons.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pydantic import Field

from chiplog.compare import Comparison, Interval, proportion
from chiplog.errors import RecordError
from chiplog.folder import ExperimentFolder
from chiplog.guards import Verdict, arm_name, counted, verdicts
from chiplog.losses import MOST_ARMS, compare_losses
from chiplog.plan import VAL_LOSS, Run, Value
from chiplog.record import Record, State
from chiplog.schema import Frozen
from chiplog.scores import compare_answers, one_apart, read_answers


class Row(Frozen):
    """One run of the plan."""

    run: str = Field(description="Name of the run.")
    kind: str = Field(description="finetune, train or control.")
    model: str | None = Field(description="Short name of the base model; null where it made its own.")
    varied: dict[str, Value] = Field(description="The settings that differ between runs.")
    batch_size: int | None = Field(description="Samples per optimiser step; null for a control.")
    state: State | None = Field(description="How its last attempt ended; null if it was never submitted.")
    reason: str | None = Field(description="Why, where it did not complete.")
    attempts: int = Field(description="How often it was submitted.")
    predicted_s: tuple[float, float, float] | None = Field(description="Foretold seconds: value, low, high.")
    elapsed_s: float | None = Field(description="Seconds that it took.")
    time_limit_s: int | None = Field(description="Its time limit; null: none.")
    predicted_bytes: tuple[float, float, float] | None = Field(description="Foretold peak memory: value, low, high.")
    peak_mem_bytes: int | None = Field(description="Peak memory.")
    mem_kind: str | None = Field(description="What the peak counts.")
    val_loss_best: float | None = Field(description="Lowest validation loss; null where it did not validate.")
    val_loss_best_step: int | None = Field(description="Optimiser steps before it.")
    val_loss: float | None = Field(default=None, description="Validation loss at the end; null: none, or no number.")
    diverged: str | None = Field(default=None, description="How its loss became no number; null: it did not.")
    tokens: int | None = Field(default=None, description="Tokens trained on.")
    n_params: int | None = Field(default=None, description="Parameters of the model.")
    scores: dict[str, Interval] = Field(description="Share of items for each metric, with its exact 95 % interval.")
    n_items: int | None = Field(description="Items scored.")


class Analysis(Frozen, extra="ignore"):
    """What a study's own analyze.py says of an experiment, beside the summary."""

    analysis: str = Field(description="File that says it all.")
    figures: list[str] = Field(description="Pictures that it drew.")
    shown: list[str] = Field(description="What the runs show of the study's question.")
    not_shown: list[str] = Field(description="What they do not.")


class Summary(Frozen):
    """All of it."""

    experiment: str = Field(description="Name of the plan.")
    question: str = Field(description="What was asked.")
    rows: list[Row] = Field(description="One for every run of the plan.")
    comparisons: list[Comparison] = Field(
        description="Each arm with its control, and arms that differ in one variable."
    )
    not_shown: list[str] = Field(description="What this experiment does not show.")
    deviations: list[str] = Field(default=[], description="What runs did otherwise than planned, and why.")
    guards: list[Verdict] = Field(description="What the validity guards say, those that fired first.")
    analysis: Analysis | None = Field(default=None, description="The study's own analysis; null: it has none.")
    attempts: int = Field(description="How often runs were submitted, all added up.")
    run_s: float | None = Field(description="Seconds of all attempts at all runs, added up.")
    gpu_hours: float = Field(description="GPU hours of them all.")

    @property
    def complete(self) -> bool:
        """Whether every run ended well."""
        return all(row.state is State.COMPLETED for row in self.rows)

    @property
    def guard_words(self) -> list[str]:
        """How many guards passed, then those that did not, a line each."""
        words = [f"{one.guard}: {one.found}" for one in self.guards if not one.ok]
        return [f"{counted(self.guards)}{':' if words else '.'}", *words]

    @property
    def shown(self) -> list[str]:
        """What the experiment shows, a line each: of the study's question, then of its arms."""
        return [*(self.analysis.shown if self.analysis else []), *[c.words for c in self.comparisons if c.shown]]

    def with_analysis(self, found: Analysis) -> Summary:
        """This summary with what the study's own analysis says, first."""
        return self.model_copy(update={"analysis": found, "not_shown": [*found.not_shown, *self.not_shown]})

    @property
    def repeated(self) -> bool:
        """Whether some run was submitted more than once."""
        return any(row.attempts > 1 for row in self.rows)

    @property
    def n_compared(self) -> int:
        """Comparisons that were made: the number that Holm's adjustment is for."""
        return sum(comparison.difference is not None for comparison in self.comparisons)


def summarize(folder: ExperimentFolder, records: Sequence[Record]) -> Summary:
    """The summary of what was collected."""
    plan, runs = folder.plan, folder.runs()
    last = {record.run: record for record in sorted(records, key=lambda record: record.attempt)}
    rows = [_row(run, last.get(run.name)) for run in runs]
    guards = verdicts(runs, {name: record for name, record in last.items() if name})
    if plan.framework == "trainer":
        comparisons, not_shown = _by_loss(runs, rows, guards)
    else:
        comparisons, not_shown = _by_answers(folder, runs, rows, guards)
    gpus = {run.name: run.resources.all_gpus for run in runs}
    attempts = [(record.usage.elapsed_s, gpus[record.run]) for record in records if record.run in gpus]
    took = [(seconds, n) for seconds, n in attempts if seconds is not None]
    return Summary(
        experiment=folder.path.name,
        question=plan.question,
        rows=rows,
        comparisons=comparisons,
        not_shown=not_shown,
        deviations=[f"{run.name}: {words}" for run in runs if run.name in last and (words := last[run.name].deviation)],
        guards=guards,
        attempts=len(attempts),
        run_s=sum(seconds for seconds, _ in took) if took else None,
        gpu_hours=sum(seconds * n for seconds, n in took) / 3600,
    )


def _by_answers(
    folder: ExperimentFolder, runs: Sequence[Run], rows: Sequence[Row], guards: Sequence[Verdict]
) -> tuple[list[Comparison], list[str]]:
    """The comparisons of arms that answered the same items, and what is not shown."""
    plan = folder.plan
    # What a failed run left behind is nobody's answer.
    ended_well = [row.run for row in rows if row.state is State.COMPLETED]
    scored = list(dict.fromkeys(name for row in rows for name in row.scores))
    metric = next((name for name in [*plan.metrics, *scored] if name in scored), plan.metrics[0])
    left_out = [
        f"{name}: nothing scored it, there are {', '.join(scored)}" for name in plan.metrics if name not in scored
    ]
    answers: dict[str, dict[str, bool]] = {}
    for name in ended_well:
        try:
            answers[name] = read_answers(folder.path / "runs" / name, metric)
        except RecordError as error:
            left_out.append(f"{name}: cannot be compared, since {error}")
    comparisons = compare_answers(metric, runs, {name: found for name, found in answers.items() if found})
    comparisons = [_guarded(one, runs, guards) for one in comparisons]
    return comparisons, [
        *(left_out if scored else []),
        *_not_shown(rows, comparisons, runs, [name for name, found in answers.items() if not found]),
    ]


def _by_loss(runs: Sequence[Run], rows: Sequence[Row], guards: Sequence[Verdict]) -> tuple[list[Comparison], list[str]]:
    """The comparisons of arms by their validation losses, and what is not shown; of many arms, none in pairs."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(arm_name(run), []).append(run)
    losses = {row.run: row.val_loss for row in rows if row.state is State.COMPLETED and row.val_loss is not None}
    measured = {arm: [losses[run.name] for run in group if run.name in losses] for arm, group in arms.items()}
    pairs = [
        (one, other)
        for one, other in itertools.combinations([arm for arm in arms if measured[arm]], 2)
        if one_apart(arms[one], arms[other])
    ]
    lost = {row.run for row in rows if row.diverged}
    diverged = {arm for arm, group in arms.items() if any(run.name in lost for run in group)}
    many = len(arms) > MOST_ARMS
    found = [_guarded(one, runs, guards) for one in compare_losses(VAL_LOSS, [] if many else pairs, measured, diverged)]
    left = [
        f"{row.run}: nothing, since it {'diverged: ' + row.diverged if row.diverged else 'has no validation loss'}"
        for row in rows
        if row.state is State.COMPLETED and row.val_loss is None
    ]
    if many:
        left.append(f"Which of the {len(arms)} arms differ: more than {MOST_ARMS} are not compared in pairs.")
    return found, [*_not_shown(rows, found, runs, []), *left]


def _row(run: Run, record: Record | None) -> Row:
    predicted = record.predicted if record else None
    scores = {name: proportion(score.count, score.n) for name, score in record.metrics.items()} if record else {}
    best = record.usage.best_validation if record else None
    return Row(
        run=run.name,
        kind=run.kind,
        model=run.model,
        varied=run.varied,
        batch_size=run.config.get("batch_size"),
        state=record.state if record else None,
        reason=record.reason if record else "never submitted",
        attempts=record.attempt if record else 0,
        predicted_s=predicted.elapsed_s if predicted else None,
        elapsed_s=record.usage.elapsed_s if record else None,
        time_limit_s=run.resources.time_limit_s,
        predicted_bytes=predicted.peak_mem_bytes if predicted else None,
        peak_mem_bytes=record.usage.peak_mem_bytes if record else None,
        mem_kind=record.usage.mem_kind if record else None,
        val_loss_best=best.loss if best else None,
        val_loss_best_step=best.step if best else None,
        val_loss=_last_loss(record) if record else None,
        diverged=record.diverged if record else None,
        tokens=record.usage.tokens if record else None,
        n_params=record.usage.n_params if record else None,
        scores=scores,
        n_items=next((score.n for score in record.metrics.values()), None) if record else None,
    )


def _last_loss(record: Record) -> float | None:
    """The validation loss with which a training ended; null where it did not end so, and a NaN is none."""
    losses = record.usage.val_losses
    return losses[-1] if losses and math.isfinite(losses[-1]) and not record.diverged else None


def _guarded(comparison: Comparison, runs: Sequence[Run], guards: Sequence[Verdict]) -> Comparison:
    """The comparison, not shown where a guard that fired concerns it."""
    first, second = (
        [run.name for run in runs if arm_name(run) == arm] for arm in (comparison.first, comparison.second)
    )
    fired = [
        f"the guard {one.guard!r} fired: {failure.words}"
        for one in guards
        for failure in one.failures
        if failure.concerns(first, second)
    ]
    if not fired or not comparison.shown:
        return comparison
    words = comparison.words.replace(", shown", ", not shown", 1)
    return comparison.model_copy(update={"shown": False, "words": f"{words}, since {'; '.join(fired[:3])}"})


def _not_shown(
    rows: Sequence[Row], comparisons: Sequence[Comparison], runs: Sequence[Run], unanswered: Sequence[str]
) -> list[str]:
    found = [
        f"{row.run}: nothing, since it is {row.state or 'not run'}" + (f" ({row.reason})" if row.reason else "")
        for row in rows
        if row.state is not State.COMPLETED
    ]
    found += [f"{name}: cannot be compared, since it has no answers (eval/predictions.jsonl)" for name in unanswered]
    open_pairs = [c for c in comparisons if not c.shown]
    found += [c.words for c in open_pairs]
    if len({run.seed for run in runs if run.kind != "control"}) == 1:
        found.append("How much another seed would change: every arm was trained once.")
    if not any(run.kind in ("control", "train") for run in runs):
        found.append("What the base models could do before: the plan has no control.")
    return found
