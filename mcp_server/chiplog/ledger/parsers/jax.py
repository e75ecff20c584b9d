"""JAX loops: `Step 100: grad_norm=..., loss=...`, MaxText's `completed step: 5, seconds: 1.2, ... loss: 3.1`."""

from __future__ import annotations

import re
import statistics

from chiplog.ledger.bars import bars
from chiplog.ledger.draft import Draft
from chiplog.ledger.parsers import generic
from chiplog.ledger.reader import LogReader, Span, pattern
from chiplog.ledger.runs import distinct, take_bars, take_speed, training_bars, trains
from chiplog.ledger.units import number, seconds, whole

STEP = pattern(rb"^[^\n]{0,120}?\bStep (?P<step>\d+): (?P<pairs>[\w/]+=[-\w.+]+(?:, [\w/]+=[-\w.+]+)*)", b"Step ")
COMPLETED = pattern(
    rb"completed step: (?P<step>\d+), seconds: (?P<seconds>[\d.]+)[^\n]{0,1500}?Tokens/s/device: (?P<rate>[\d.]+)"
    rb"[^\n]{0,1500}?loss: (?P<loss>[\w.+-]+)",
    b"completed step: ",
)
PROGRESS = pattern(rb"Progress on: (?P<done>[\d.]+[kMG]?)it/(?P<total>[\d.]+[kMG]?)it rate:(?P<rate>[\d.]+)"
                   rb"(?P<unit>it/s|s/it) "
                   rb"remaining:(?P<left>[\d:?]+) elapsed:(?P<elapsed>[\d:]+)", b"Progress on: ")  # fmt: skip
STARTED = pattern(rb"^[^\n]{0,60}\bRunning on: ", b"Running on: ")
RESTORED = pattern(
    rb"Restoring checkpoint from [^\n]{0,1500}?/(?P<step>\d+)\b|[Rr]estored checkpoint at step (?P<other>\d+)", b"estor"
)


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    if b"completed step: " in both and b"Tokens/s/device" in both:
        return 0.9
    if re.search(rb"Step \d+: [\w/]+=", both):
        return 0.7 if b"jax" in both or b"Progress on: " in both else 0.4
    return 0.0


def parse(log: LogReader) -> list[Draft]:
    starts = [found.offset for found in log.whole.some(STARTED)]
    return [_run(span) for span in log.whole.cut(distinct(log.whole, starts))]


def _run(span: Span) -> Draft:
    draft = Draft(span, "jax")
    done = list(span.near(COMPLETED))
    if done:
        draft.set("loss_first", number(done[0]["loss"]), done[0])
        draft.set("loss_last", number(done[-1]["loss"]), done[-1])
        draft.set("steps", whole(done[-1]["step"]), done[-1])
        draft.set("tokens_per_s", number(done[-1]["rate"]), done[-1])
        draft.set("tokens_scope", "per_gpu")
        times = [time for f in done if (time := number(f["seconds"]))]
        draft.set("steps_per_s", 1 / statistics.median(times[len(times) // 10 :]) if times else None)
        draft.worked(done[-1])
    lines = span.near(STEP)
    if lines:
        first, last = (_pairs(lines[0]), _pairs(lines[-1]))
        draft.set("loss_first", number(first.get("loss")), lines[0])
        draft.set("loss_last", number(last.get("loss")), lines[-1])
        draft.set("steps", whole(lines[-1]["step"]), lines[-1])
        draft.worked(lines[-1])
    if found := span.first(RESTORED):
        draft.set("resumed_from", whole(found.get("step") or found.get("other")), found)
    take_bars(draft, training_bars(bars(span, trains)))
    if last_one := span.last(PROGRESS):
        done, elapsed = whole(last_one["done"]) or 0, seconds(last_one["elapsed"])
        draft.set("steps", max(done, draft.get("steps") or 0), last_one)
        draft.set("steps_planned", whole(last_one["total"]), last_one)
        draft.set("train_s", elapsed, last_one)
        take_speed(draft, done - (draft.get("resumed_from") or 0), elapsed)
        draft.worked(last_one)
    generic.times(draft, span, [])
    return draft


def _pairs(found) -> dict[str, str]:
    return dict(part.split("=", 1) for part in found["pairs"].split(", "))
