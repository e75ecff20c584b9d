"""Arms of fine-tunings compared by the answers that they and their controls gave to the same items."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from chiplog.compare import ALPHA, Comparison, Difference, holm, paired
from chiplog.errors import RecordError
from chiplog.guards import arm_name, control_of
from chiplog.plan import Run
from chiplog.schema import Frozen, plain_errors

MOST_PAIRS = 200  # of more, only those with a control or with the best arm are compared


class Answered(Frozen, extra="ignore"):
    """What a line of `eval/predictions.jsonl` must have for arms to be compared by it."""

    index: int = Field(description="Number of the row in its split, from 0.")
    prompt: str = Field(description="What was asked.")
    target: str = Field(description="What should be answered.")
    scores: dict[str, bool] = Field(description="Whether the answer met each criterion.")


def compare_answers(metric: str, runs: Sequence[Run], answers: Mapping[str, Mapping[str, bool]]) -> list[Comparison]:
    """Each arm with its control, and arms that differ in one variable; `answers` by run, then by item.

    p after Holm's adjustment for the number of comparisons.
    """
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(arm_name(run), []).append(run)
    pairs = [(one, _control_of(arms, one), True) for one in arms if arms[one][0].kind != "control"]
    pairs += [
        (one, other, False) for one, other in itertools.combinations(arms, 2) if one_apart(arms[one], arms[other])
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


def one_apart(one: Sequence[Run], other: Sequence[Run]) -> bool:
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


def read_answers(run_folder: Path, metric: str) -> dict[str, bool]:
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
