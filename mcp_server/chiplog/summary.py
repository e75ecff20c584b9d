"""What an experiment showed, and what it did not, from the records alone.

Every run of the plan has a row, whether it ran or not. Arms that differ in one variable are compared, and each arm
with its control; a difference counts as shown only after Holm's adjustment for the number of comparisons.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from chiplog.compare import Difference, Interval, holm, paired, proportion
from chiplog.errors import RecordError
from chiplog.folder import ExperimentFolder
from chiplog.guards import Verdict, arm_name, control_of, counted, verdicts
from chiplog.losses import MOST_ARMS, compare_losses
from chiplog.plan import VAL_LOSS, Run, Value
from chiplog.record import Record, State
from chiplog.schema import Frozen, plain_errors

ALPHA = 0.05
MOST_PAIRS = 200  # of more, only those with a control or with the best arm are compared


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


class Comparison(Frozen):
    """Two arms over the same items, or of trainings that make their own models over their seeds."""

    first: str = Field(description="Arm that is compared.")
    second: str = Field(description="Arm or control that it is compared with.")
    against_control: bool = Field(description="Whether the second is the first one's base model.")
    metric: str = Field(description="Criterion.")
    difference: Difference | None = Field(description="First minus second; null if they cannot be compared.")
    p_adjusted: float | None = Field(description="p after Holm's adjustment.")
    shown: bool = Field(description="Whether the difference is shown.")
    words: str = Field(description="The conclusion in one line.")


class Answered(Frozen, extra="ignore"):
    """What a line of `eval/predictions.jsonl` must have for arms to be compared by it."""

    index: int = Field(description="Number of the row in its split, from 0.")
    prompt: str = Field(description="What was asked.")
    target: str = Field(description="What should be answered.")
    scores: dict[str, bool] = Field(description="Whether the answer met each criterion.")


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
            answers[name] = _answers(folder.path / "runs" / name, metric)
        except RecordError as error:
            left_out.append(f"{name}: cannot be compared, since {error}")
    comparisons = _comparisons(metric, runs, {name: found for name, found in answers.items() if found})
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
        if _one_apart(arms[one], arms[other])
    ]
    lost = {row.run for row in rows if row.diverged}
    diverged = {arm for arm, group in arms.items() if any(run.name in lost for run in group)}
    many = len(arms) > MOST_ARMS
    found = [
        _guarded(Comparison(against_control=False, metric=VAL_LOSS, **pair._asdict()), runs, guards)
        for pair in compare_losses(VAL_LOSS, [] if many else pairs, measured, diverged)
    ]
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


def _answers(run_folder: Path, metric: str) -> dict[str, bool]:
    """Whether each item was right, by the item's own text; empty where there are no predictions.

    Raises RecordError that names the line.
    """
    file = run_folder / "eval" / "predictions.jsonl"
    # Not splitlines: it cuts at U+2028, which JSON leaves in a text.
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    found: dict[str, bool] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = Answered.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(
                f"{file}, line {number} is no scored answer ({' '.join(plain_errors(error).split())}): remove that "
                "eval folder and submit the run again, which only evaluates it"
            ) from error
        if metric not in item.scores:
            raise RecordError(
                f"{file} has no metric {metric!r}: it has {', '.join(item.scores)}; plan with one of these"
            )
        found[json.dumps([item.index, item.prompt, item.target])] = item.scores[metric]
    return found


def _comparisons(metric: str, runs: Sequence[Run], answers: Mapping[str, Mapping[str, bool]]) -> list[Comparison]:
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(arm_name(run), []).append(run)
    pairs = [(one, _control_of(arms, one), True) for one in arms if arms[one][0].kind != "control"]
    pairs += [
        (one, other, False) for one, other in itertools.combinations(arms, 2) if _one_apart(arms[one], arms[other])
    ]
    pairs = _limited([(one, other, flag) for one, other, flag in pairs if other], arms, answers)
    found = []
    for one, other, is_control in pairs:
        scored = [{run.name: answers[run.name] for run in arms[name] if run.name in answers} for name in (one, other)]
        why = _not_the_same_items(scored[0] | scored[1])
        first, second = (list(arm.values()) for arm in scored)
        found.append((one, other, is_control, why or _difference(first, second, is_control)))
    adjusted = iter(holm([result.p for *_, result in found if isinstance(result, Difference)]))
    return [
        _comparison(one, other, is_control, metric, result, next(adjusted) if isinstance(result, Difference) else None)
        for one, other, is_control, result in found
    ]


def _limited(
    pairs: list[tuple[str, str, bool]], arms: Mapping[str, Sequence[Run]], answers: Mapping[str, Mapping[str, bool]]
) -> list[tuple[str, str, bool]]:
    """The pairs in which both arms have answers; of very many, those with a control or with the best arm."""
    shares = {
        arm: sum(sum(answers[run.name].values()) for run in runs if run.name in answers)
        / max(1, sum(len(answers[run.name]) for run in runs if run.name in answers))
        for arm, runs in arms.items()
        if any(run.name in answers for run in runs)
    }
    pairs = [pair for pair in pairs if pair[0] in shares and pair[1] in shares]
    if len(pairs) <= MOST_PAIRS:
        return pairs
    best = max((pair[0] for pair in pairs), key=lambda arm: shares[arm])
    return [pair for pair in pairs if pair[2] or best in pair[:2]]


def _control_of(arms: Mapping[str, Sequence[Run]], name: str) -> str | None:
    control = control_of((runs[0] for runs in arms.values()), arms[name][0])
    return control and arm_name(control)


def _one_apart(one: Sequence[Run], other: Sequence[Run]) -> bool:
    """Whether two arms differ in exactly one setting, whatever their names say."""
    if "control" in (one[0].kind, other[0].kind) or one[0].recipe != other[0].recipe:
        return False
    first, second = one[0].config, other[0].config
    return sum(first.get(key) != second.get(key) for key in (first.keys() | second.keys()) - {"seed"}) == 1


def _not_the_same_items(answers: Mapping[str, Mapping[str, bool]]) -> str | None:
    """Why these runs cannot be compared item by item, if so."""
    first, *others = answers
    for other in others:
        if differ := len(answers[first].keys() ^ answers[other].keys()):
            counts = f"{first} answered {len(answers[first])} items and {other} {len(answers[other])}"
            return f"{counts}, {differ} of them only one of the two"
    return None


def _difference(first: list[Mapping[str, bool]], second: list[Mapping[str, bool]], against_control: bool) -> Difference:
    arms = [[[scored[item] for item in first[0]] for scored in arm] for arm in (first, second)]
    return paired(arms[0], arms[1], against_control=against_control)


def _comparison(
    one: str, other: str, is_control: bool, metric: str, result: Difference | str, p: float | None
) -> Comparison:
    difference = result if isinstance(result, Difference) else None
    # The test asks which arm wins more items, the interval how much: where they disagree, nothing is shown.
    ends = (difference.interval.low, difference.interval.high) if difference else (0.0, 0.0)
    shown = p is not None and p < ALPHA and (ends[0] > 0 or ends[1] < 0)
    if difference is None:
        words = f"{one} against {other}: cannot be compared, since {result}"
    else:
        change, low, high = (
            f"{100 * x:+.1f}" for x in (difference.interval.value, difference.interval.low, difference.interval.high)
        )
        verdict = ("shown" if shown else "not shown") + (" for one training each" if difference.seeds == 1 else "")
        words = f"{one} against {other}: {metric} {change} points ({low} to {high}), {verdict}"
    return Comparison(
        first=one,
        second=other,
        against_control=is_control,
        metric=metric,
        difference=difference,
        p_adjusted=p,
        shown=shown,
        words=words,
    )


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
