"""Lines of a training loop: a step, an epoch, a loss and times, in whatever words.

A line is found by its loss. What else it says is read from that line alone or, where it is a row of a table, from what
stands around it.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from chiplog.ledger.reader import EDGE, Found, Pattern, Span, pattern
from chiplog.ledger.units import duration, number, stamp, whole

_VALUE = rb"(?P<loss>[-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|nan|inf|NaN)\b)"
LOSS = pattern(
    rb"(?i:(?<![\w/-])(?<!init )(?<!initial )(?<!best )(?:actor/(?:pg_)?|train/|loss/train/|g_)?"
    rb"(?:(?:per[_ ]token|train(?:ing)?(?:'s)?|av[gr]\.?|average|mean|running|total|lm|ce|sft|batch|step|log|reduced)"
    rb"[_/ -]?){0,5}"
    rb"(?:loss|logloss|xent|cross-?_?entropy_?loss)(?: so far)?(?:/train(?:/total|_step|_epoch)?|\(train\))?"
    rb"(?: \[[\d-]+\])?(?: (?!scale|func|type|ratio|mask|weight|is\b|for\b|on\b)[a-z]{2,20}(?= ?:))?)"
    rb"(?:[\"']?(?: *(?:[=:|]|\xe2\x94\x82)+ *| +(?:is:? +|of +)?))[\"'\[(]?(?:tensor\()?(?:\d+ +(?=-?\d+\.\d))?"
    + _VALUE,
    b"loss",
    b"xent",
)
COST = pattern(rb"(?i:(?<![\w/-])(?<!time )cost)[\"']?(?: *[=:] *| +)" + _VALUE, b"cost")
METRIC = pattern(  # what a loop prints that names no loss
    rb"(?i:(?<![\w/])(?:[a-z]+[-_ ])?"
    rb"(?:rmse|mse|mae|acc(?:uracy)?|perplexity|ppl|reward|nll|auc|error|bleu|f1|return|learn))"
    rb"[\"']?(?: *[=:|] *| +)\[?" + _VALUE,
    b"mse", b"mae", b"acc", b"perplexity", b"ppl", b"reward", b"nll", b"auc", b"error", b"bleu", b"f1", b"return",
    b"learn",
)  # fmt: skip
NAMED_TRAIN = pattern(rb"^\d+ train " + _VALUE, b" train ")  # nanoGPT's own file, `94 train 7.32`
STEPPED = pattern(  # where not even that is printed
    rb"^[^\n]{0,80}?(?i:\b(?:iter(?:ation)?|(?:global[_ ]?)?step|batch))[\"']?[ :=#]+[\"'\[]?(?=\d)|^\[\d+/\d+\] ",
    b"iter",
    b"step",
    b"batch",
    b"\n[",
)
OF_TEST = re.compile(
    rb"(?i)(?<![a-z/])(?:net output|test|val|valid|validation|eval|evaluation|evaluating|dev)(?![a-z/])"
)
OWN = re.compile(rb"(?i)\btrain")

_NAMES = rb"[\"']?(?: *(?:[=:#|(\[-]|\xe2\x94\x82)+ *| +)[\[(]? *"
_COUNT = rb"(?P<step>\d[\d,]*+)(?!\.\d|[\d.]*[eE]\d|%| *(?:ms|secs?|it/s|s/it)\b)(?: *(?:/|of) *(?P<total>\d[\d,]*+))?"
STEPS = [
    re.compile(rb"\[batch=(?P<step>\d+)/(?P<total>\d+)\]"),
    re.compile(rb"TRAIN Batch \d+/(?P<step>\d+)\b"),
    re.compile(rb"(?i)(?:num_updates|global[_ ]?step|completed step|total[_ ]?timesteps)" + _NAMES + _COUNT),
    re.compile(rb"(?i)(?<![\w/-])(?:train(?:ing)?[_ ])?steps?" + _NAMES + _COUNT),
    re.compile(rb"(?i)(?<![\w/-])(?:train(?:ing)?[_ ])?(?:iter(?:ation)?s?|it|updates?|up\.|rounds?"
               rb"|(?:mini-?)?batch(?:[_ ](?:id|idx|index))?)" + _NAMES + _COUNT),
    re.compile(rb"\b\d+-(?P<step>\d+)batch\b"),
    re.compile(rb"\b(?P<step>\d+)/ *(?P<total>\d+) batches\b"),
    re.compile(rb"[\[(] *(?P<step>\d+) */ *(?P<total>\d+)(?= *[\])%(])"),
    re.compile(rb"(?<=: ) *(?P<step>\d+) / (?P<total>\d+)\b"),
    re.compile(rb"(?:^|[\]:] )\[(?P<step>\d+)\](?=\s)"),
    re.compile(rb"^(?P<step>\d+)(?=:\tlearn: | train \d)"),
]  # fmt: skip
EPOCH = pattern(
    rb"(?:(?i:(?<![a-z/_-])(?<!per )(?<![^dg] at )(?<!from )(?<!best )epoch)|(?<![A-Za-z/-])Ep|^ep(?=: )"
    rb"|\bTrain(?=: \d+ \[))"
    rb"(?:\.{1,3}|\(train\))?[\"']?"
    rb"(?: *[=:#|\[(_]+ *| +|(?=\d))[\[(]? *(?P<epoch>\d++(?:\.\d++)?)(?!/micro|[%a-z])"
    rb"(?: *(?:/|of) *(?P<epochs>\d+))?"
    rb"|\b(?P<before>\d+)epoch:",
    b"epoch", b" ep", b"\nep", b"_ep", b"train: ",
)  # fmt: skip
PER_STEP = re.compile(
    rb"(?i)(?P<s>[\d.]+) ?(?P<unit>ms|s|secs?|seconds?) ?/ ?(?:step|it|iter|iteration|batch|update)\b"
    rb"|(?P<rate>[\d.]+) ?(?:steps?|its?|iters?|iterations?|batch(?:es)?|updates?) ?/ ?s(?:ec(?:ond)?)?\b"
    rb"|\b(?P<unit4>ms|s)/(?:batch|step|iter) +(?P<s4>[\d.]+)"
    rb"|time_per_(?:iteration|step)_(?P<unit3>ms)[\"']?[=: ]+(?P<s3>[\d.]+)"
    rb"|(?:(?:steps?|iters?|iterations?|batches|updates|it)(?:_per_|/)s(?:ec(?:ond)?)?|\bups)[\"']?[=: ]+"
    rb"(?P<rate2>[\d.]+)"
    rb"|(?:(?<!\w)|(?<=train_))(?:(?:iter|iteration|step|batch)[_ -]?(?:time|cost|duration)|dt|step_timing in s|"
    rb"timing_s/step|time/step|(?<=, )seconds)[\"']?[=: ]+"
    rb"(?P<s2>[\d.]+(?:e[-+]\d+)?) ?(?P<unit2>ms|s|sec)?\b"
)
TIME = re.compile(
    rb"(?i)(?<![\w/-])(?:(?:total |train_)?time(?:[ _]?(?:elapsed|used|usage))?|elapsed(?:[ _]time)?"
    rb"|wall(?:[ _]time)?)[\"']?"
    rb"(?: *(?:[=:|]|\xe2\x94\x82)+ *| +)(?P<time>(?:\d+ days?, *)?\d+:\d\d(?::\d\d)?(?:\.\d+)?|[\d.]+(?: ?(?:ms|"
    rb"sec(?:ond)?s?|s|min|m|h))?\b)"
    rb"|(?<=[-|;] ) {0,4}(?P<end>[\d.]+ ?s(?:ecs?)?|\d+:\d\d:\d\d)s?;?\s*$"
)
MEMORY = re.compile(
    rb"(?i)\b(?:peak[_ ])?(?:gpu[_ ])?(?:max[_ ])?mem(?:ory)?(?:[_ ]?used)?(?: \((?P<before>[GM]i?)B\))?[\"']?"
    rb"[=:] *(?P<size>[\d.,]+)(?(before)| ?(?P<unit>[GM]i?)b?\b)|\bmax mem: (?P<megabytes>\d+)\b"
)
BAR_END = re.compile(rb"(?:it/s|s/it)[^\]\n]*\]")
RULE = re.compile(rb"\n[-=_*#+|]{8,}[ \r]*\n")  # between two tables
SAMPLES = re.compile(rb"Train Epoch:? *\d+ \[ *\d+/\d+ \(")  # a count of samples and not of steps
PART = {b"function", b"surrogate", b"policy", b"value", b"critic", b"entropy", b"kl", b"triplet", b"force", b"energy"}
SO_FAR = re.compile(rb"(?i)elapsed|wall|total")
ITERATION = re.compile(rb"(?i)\biter(?:ation)? (?P<n>\d+) step \d")  # of so many a step is made
BESIDE = 800  # bytes before a loss in which its step may be named, and half as many after it
LEAST = 1 << 13  # bytes at either end that are searched first
FEW, SHARE = 6, 0.7  # so many losses of which so many are called alike are of one kind
NAME = re.compile(rb"[A-Za-z][\w/-]*(?=[^A-Za-z]|$)")
FIRST, LAST = 8, 24  # lines that are read of each end


@dataclass(frozen=True, slots=True)
class Line:
    """What one line says; null what it does not."""

    found: Found
    loss: float | None
    step: int | None
    total: int | None
    epoch: float | None
    epochs: int | None
    step_s: float | None  # seconds of a step
    time_s: float | None  # seconds of a step, of an epoch, or of all until then
    so_far: bool  # whether it says that they are of all until then
    at: datetime | None
    memory: str | None  # as printed, with its unit


def training_lines(span: Span, wanted: Pattern = LOSS) -> list[Line]:
    """The lines that name a loss of training, at either end of a span."""
    edge = LEAST
    while True:
        matches = [found for found in span.near(wanted, edge) if not _of_test(found)]
        late = bool(matches) and matches[-1].offset >= span.stop - edge
        early = bool(matches) and matches[0].offset < span.start + edge
        if (early and late) or edge >= EDGE or 2 * edge >= len(span):
            break
        edge = min(8 * edge, EDGE)
    matches = _of_one_kind(matches)
    if len(matches) > FIRST + LAST:
        matches = matches[:FIRST] + matches[-LAST:]
    return [_line(span, group, start) for group, start in _groups(span, matches)]


def counted_lines(span: Span) -> list[Line]:
    """Lines that count steps up, and say nothing of how it goes."""
    lines = [line for line in training_lines(span, STEPPED) if line.step is not None]
    return lines if len(lines) >= 3 and len(_rising(lines, lambda line: line.step)) == len(lines) else []


def _of_one_kind(matches: list[Found]) -> list[Found]:
    """Without losses that are called otherwise than most, such as those of a last test."""
    if len(matches) < FEW:
        return matches
    kinds = [NAME.findall(found.before[-30:].encode() + found.text)[-2:] for found in matches]
    kinds = [b" ".join(kind).lower() for kind in kinds]
    most, n = Counter(kinds).most_common(1)[0]
    if n <= SHARE * len(kinds):
        return matches
    return [found for found, kind in zip(matches, kinds, strict=True) if kind == most]


def _of_test(found: Found) -> bool:
    """Whether its line speaks of a test before it, or of a part of the loss."""
    before = BAR_END.split(found.before.encode())[-1][-200:]
    if PART.intersection(before.lower().split()[-1:]):
        return True
    own = max((word.start() for word in OWN.finditer(before + found.text)), default=-1)
    return any(word.start() > own for word in OF_TEST.finditer(before))


def _groups(span: Span, matches: Sequence[Found]) -> Iterator[tuple[list[Found], int]]:
    """Matches by line, and where the line begins; of a line that names a step between two losses, by step."""
    group: list[Found] = []
    start = 0
    for found in matches:
        if group and found.offset - group[-1].end < BESIDE:
            between = span.log.text(group[-1].end, found.offset)
            begins = b"\n" in between or b"%|" in between or any(step.search(between) for step in STEPS[:5])
            if not begins:
                group.append(found)
                continue
        if group:
            yield group, start
        start = max(found.line_offset, group[-1].end if group else 0)
        group = [found]
    if group:
        yield group, start


def _line(span: Span, group: Sequence[Found], start: int) -> Line:
    chosen = min(group, key=_rank)
    text = span.log.text(start, group[-1].end) + _rest(span, group[-1].end)
    epoch, pace = EPOCH.regex.search(text), PER_STEP.search(text)
    times = list(TIME.finditer(text))
    time = next((one for one in times if SO_FAR.search(one.group())), times[0] if times else None)
    step = _step(text[: epoch.start()] + b" " + text[epoch.end() :] if epoch else text)
    if step and SAMPLES.search(text):
        step = None
    held = MEMORY.search(text)
    if not step and not epoch:
        after = span.log.text(group[-1].end, min(span.stop, group[-1].end + BESIDE // 2))
        before = RULE.split(span.log.text(max(span.start, start - BESIDE), start))[-1]
        step = _step(before, last=True) or _step(after)
        pace, held = pace or PER_STEP.search(after), held or MEMORY.search(after)
    return Line(
        found=chosen,
        loss=number(chosen.get("loss")),
        step=_whole(step, "step"),
        total=_whole(step, "total") or _total(text, step),
        epoch=number(_text(epoch, "epoch") or _text(epoch, "before")),
        epochs=_whole(epoch, "epochs"),
        step_s=_step_s(pace, _per_step(text, step)),
        time_s=duration(_text(time, "time") or _text(time, "end")),
        so_far=bool(time and SO_FAR.search(time.group())),
        at=stamp(text.decode(errors="replace")),
        memory=f"{(held['size'] or held['megabytes']).decode()} {_unit(held)}B" if held else None,
    )


def _unit(held: re.Match[bytes]) -> str:
    return (_text(held, "unit") or _text(held, "before") or "M").upper().replace("I", "i")


def _rank(found: Found) -> int:
    """Of the losses in a line the total is the training's, before those of one part."""
    name = found.text.lower()
    return 0 if name.startswith(b"total") else 2 if b"pg_" in name else 1


def _rest(span: Span, start: int) -> bytes:
    """What stands in the line after a byte."""
    return span.log.text(start, min(span.stop, start + BESIDE // 2)).partition(b"\n")[0]


def _step(text: bytes, last: bool = False) -> re.Match[bytes] | None:
    for form in STEPS:
        matches = list(form.finditer(text))
        if matches:
            return matches[-1 if last else 0]
    return None


def _total(text: bytes, step: re.Match[bytes] | None) -> int | None:
    """How many steps are planned, where the line names its step again with that."""
    again = (match for form in STEPS for match in form.finditer(text))
    totals = (_whole(match, "total") for match in again if step and _whole(match, "step") == _whole(step, "step"))
    return next((total for total in totals if total), None)


def _per_step(text: bytes, step: re.Match[bytes] | None) -> float:
    """Iterations a step, where a line counts both."""
    iteration, n = ITERATION.search(text), _whole(step, "step")
    return (_whole(iteration, "n") or 1) / n if iteration and n else 1.0


def _step_s(match: re.Match[bytes] | None, iterations: float) -> float | None:
    """Seconds of a step of so many iterations, stated or as the inverse of steps a second."""
    if not match:
        return None
    rate = number(_text(match, "rate") or _text(match, "rate2"))
    if rate is not None:
        return 1 / rate if rate > 0 else None
    time = number(_text(match, "s") or _text(match, "s2") or _text(match, "s3") or _text(match, "s4"))
    unit = _text(match, "unit") or _text(match, "unit2") or _text(match, "unit3") or _text(match, "unit4")
    return iterations * time / (1000 if unit == "ms" else 1) if time else None


def _text(match: re.Match[bytes] | None, name: str) -> str | None:
    value = match[name] if match and name in match.re.groupindex else None
    return None if value is None else value.decode(errors="replace")


def _whole(match: re.Match[bytes] | None, name: str) -> int | None:
    return whole(_text(match, name))


def pace(lines: Sequence[Line]) -> float | None:
    """Median seconds of a step: as the lines state it, else from times of single steps, else from their stamps."""
    stamped = _stamped(lines)
    stated = [one.step_s for one in lines if one.step_s]
    times = [one.time_s for one in lines if one.time_s and one.step is not None] if not so_far(lines) else []
    for values in (stated, times):
        warm = values[max(1, len(values) // 10) :] or values
        median = statistics.median(warm) if warm else None
        # What contradicts the stamps is the time of something else, such as of loading data.
        if median and (stamped is None or 0.5 < median / stamped < 2):
            return stamped if stamped and _coarse(median) else median
    return stamped


def _coarse(step_s: float) -> bool:
    """Whether a pace was stated as a rate of one or two digits."""
    rate = 1 / step_s
    return rate < 0.1 and abs(rate - round(rate, 2)) < 1e-9


def _stamped(lines: Sequence[Line]) -> float | None:
    """Seconds of a step between the last lines that have a stamp and a step."""
    known = [(one.step, one.at) for one in lines if one.step is not None and one.at]
    known = _rising(known, lambda pair: pair[0])
    if len(known) < 2:
        return None
    (first, began), (last, ended) = known[0], known[-1]
    passed = (ended - began).total_seconds()
    return passed / (last - first) if last > first and passed > 0 else None


def _rising(values: Sequence, key: Callable) -> list:
    """The last values, as far back as they rise."""
    kept = list(values[-1:])
    for one in reversed(values[:-1]):
        if key(one) > key(kept[-1]):
            break
        if key(one) < key(kept[-1]):  # other ranks say the same
            kept.append(one)
    return kept[::-1]


def so_far(lines: Sequence[Line]) -> float | None:
    """Seconds of training until the last line, where the lines count them up."""
    timed = [one for one in lines if one.time_s is not None]
    if not timed:
        return None
    if timed[-1].so_far:
        return timed[-1].time_s
    times = [one.time_s or 0.0 for one in timed]
    steps = [later - one for one, later in itertools.pairwise(times)]
    if len(timed) == 1 and timed[0].step is None and timed[0].epoch in (0.0, 1.0) and len(lines) < len(timed) + 2:
        return times[0]
    counted = len(times) >= 5 and min(steps) > 0 and times[-1] > 3 * statistics.median(steps)
    return times[-1] if counted else None
