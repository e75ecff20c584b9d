"""Any other training log: a bar, or lines that name a step and a loss in whatever words."""

from __future__ import annotations

import re

from chiplog.ledger.bars import bars
from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import LogReader, Span, pattern
from chiplog.ledger.runs import take_bars, take_speed, training_bars, trains
from chiplog.ledger.units import number, seconds, whole

STEP = pattern(
    rb"\[ *(?P<in>\d+)/(?P<of>\d+)\]|(?i:\b(?:global[_ ]?step|training[_ ]step|train[_ ]step|completed step"
    rb"|steps?|iter(?:ation)?s?|it|batch|update))"
    rb"[\"']?(?: *[=:#\[(|-] *| +)\[? *(?P<step>\d[\d,]*)(?: *(?:/|of) *(?P<total>\d[\d,]*))?"
)
LOSS = pattern(
    rb"(?i:(?<![\w/-])(?:actor/|train/)?(?:(?:train(?:ing)?|avg|mean|running|total|lm|ce|sft)[_/ ]?)*loss)"
    rb"(?:[\"']?(?: *[=:]+ *| +(?:is +)?))[\"'\[(]?(?:tensor\()?(?P<loss>[-+]?\d[\d.]*(?:[eE][-+]?\d+)?|nan|inf"
    rb"|NaN|-inf)\b",
    b"oss",
)
OF_TEST = re.compile(r"(?i)\s*(?:test|eval(?:uation)?)\s*:")
VALIDATION = pattern(
    rb"(?i:\b(?:val(?:idation)?|eval|dev|test)[_/ ]?loss)[\"']?(?: *[=:]+ *| +)(?P<loss>\d[\d.]*(?:[eE][-+]?\d+)?|nan)",
    b"val",
    b"dev",
    b"test",
)
EPOCH = pattern(
    rb"(?i:(?<![\w/-])epoch)[\"']?(?: *[=:#\[(] *| +)\[? *(?P<epoch>\d+(?:\.\d+)?)(?!/micro)\b(?: *(?:/|of) *"
    rb"(?P<epochs>\d+))?",
    b"poch",
)
NUM_UPDATES = pattern(rb"\bnum_updates[\"']?[: ]+[\"']?(?P<step>\d+)", b"num_updates")
OVERALL = pattern(
    rb"Overall training speed: (?P<steps>\d+) iterations in (?P<time>(?:\d+ days?, )?\d+:\d\d:\d\d)",
    b"Overall training",
)
PLANNED = pattern(
    rb"(?i:total|max|train|num)[_ ](?:train(?:ing)?[_ ])?steps[\"']?[ ,=:]+[\"']?(?P<total>\d+)\b", b"steps"
)
TIME = pattern(rb"(?i:\b(?:total |full )?train(?:ing)?(?:[ _](?:time|took|done in|finished in|completed in"
               rb"|runtime|duration))+)"
               rb"[^\d\n]{0,12}(?P<time>(?:\d+ days?, *)?\d+:\d\d:\d\d(?:\.\d+)?|[\d.]+ ?(?:s|sec|secs|seconds"
               rb"|min|mins|minutes|h|hrs?|hours)\b)", b"rain")  # fmt: skip
NAMED_MEMORY = pattern(
    rb"max_mem(?:ory)?_(?P<kind>allocated|reserved)_(?P<unit>[mg]i?b)[\"']?[:= ]+(?P<size>[\d.]+)", b"max_mem"
)
MEMORY = pattern(rb"(?i:(?:peak|max(?:imum)?)[_ ](?:gpu[_ ])?(?:mem(?:ory)?)(?:[_ ](?P<kind>alloc"
                 rb"(?:ated)?|reserved|active))?(?:[_ ]usage)?)"
                 rb"[^\d\n]{0,25}(?P<size>[\d.]+) ?(?P<unit>[MG]i?B)", b"mem")  # fmt: skip
RATE = pattern(
    rb"(?i:tokens?(?:/s(?:ec(?:ond)?)?|_per_sec(?:ond)?)(?P<scope>/(?:device|gpu))?)[\"']?[=: ]+(?P<rate>[\d.,]+)"
)
BESIDE = 400  # bytes from a loss in which its step is named
KIND = {"reserved": "reserved", "active": "active"}


def sniff(head: bytes, tail: bytes) -> float:
    return 0.1


def parse(log: LogReader) -> list[Draft]:
    return [run(log.whole, Draft(log.whole, None))]


def run(span: Span, draft: Draft) -> Draft:
    """Everything that is named in the usual words."""
    losses(draft, span)
    epochs(draft, span)
    take_bars(draft, training_bars(bars(span, trains)))
    steps(draft, span)
    memory(draft, span)
    if found := span.last(TIME):
        draft.default("train_s", seconds(found["time"]) or _spelled(found["time"]), found)
        if draft.get("steps"):
            take_speed(draft, draft.get("steps"), draft.get("train_s"))
    if found := span.last(RATE):
        draft.default("tokens_per_s", number(found["rate"]), found)
        draft.default("tokens_scope", "per_gpu" if found.get("scope") else "unknown")
    return draft


def losses(draft: Draft, span: Span) -> None:
    """First, last and validation losses."""
    first, last = span.first(LOSS, far=True), span.last(LOSS, far=True)
    while last and OF_TEST.match(last.line):  # what a test printed is no training loss
        last = span.before(last.offset - len(last.before.encode())).last(LOSS)
    if first and last:
        draft.default("loss_first", number(first["loss"]), first)
        draft.default("loss_last", number(last["loss"]), last)
        draft.worked(last)
    found = [value for f in span.near(VALIDATION) if (value := number(f["loss"])) is not None]
    draft.default("val_losses", found or None)


def epochs(draft: Draft, span: Span) -> None:
    """The last epoch that is named, and how many are planned."""
    if found := span.last(EPOCH):
        draft.default("epoch", number(found["epoch"]), found)
        draft.default("epochs", whole(found.get("epochs")), found)


def steps(draft: Draft, span: Span) -> None:
    """The last step that is named beside a loss, and how many are planned."""
    last = span.last(LOSS)
    near = list(span.after(last.offset - BESIDE).before(last.offset + BESIDE).all(STEP)) if last else []
    if near:
        found = near[-1]
        if draft.default("steps", whole(found.get("step") or found.get("in")), found):
            draft.worked(found)
        draft.default("steps_planned", whole(found.get("total") or found.get("of")), found)
    if found := span.last(NUM_UPDATES):
        draft.default("steps", whole(found["step"]), found)
    if found := span.last(OVERALL):
        draft.done = found
        draft.default("train_s", seconds(found["time"]), found)
        take_speed(draft, int(found["steps"]), seconds(found["time"]))
    if found := span.first(PLANNED):
        draft.default("steps_planned", whole(found["total"]), found)


def memory(draft: Draft, span: Span) -> None:
    """The largest peak that is named."""
    if draft.get("peak_mem_bytes") is None:
        for found in [*span.near(MEMORY), *span.near(NAMED_MEMORY)]:
            kind = (found.get("kind") or "allocated").lower()
            draft.peak(f"{found['size']} {found['unit'].upper().replace('I', 'i')}", KIND.get(kind, "allocated"), found)


def _spelled(text: str) -> float | None:
    """Seconds of `38.57 seconds`, `2.5 h`."""
    match = re.fullmatch(r"([\d.]+) ?([a-z]+)", text.lower())
    value = number(match.group(1)) if match else None
    return None if not match or value is None else value * {"s": 1, "m": 60, "h": 3600}[match.group(2)[0]]
