"""Keras: `Epoch 3/10`, then a bar of batches, `938/938 [====] - 5s 5ms/step - loss: 0.2`."""

from __future__ import annotations

import re
import statistics

from chiplog.ledger.draft import Draft
from chiplog.ledger.parsers import generic
from chiplog.ledger.reader import Found, LogReader, Pattern, Span, pattern
from chiplog.ledger.units import number

EPOCH = pattern(rb"^Epoch (?P<epoch>\d+)/(?P<epochs>\d+)", b"Epoch ")
BATCH = pattern(
    rb"(?P<done>\d+)/(?P<total>\d+) +(?:\[[=>.]+\]|[^\x00-\x7f\n]{6,120}) *-? *(?P<elapsed>\d+)s +(?P<step>"
    rb"[\d.]+)(?P<unit>ms|us|s)/(?:step|epoch)"
    rb"(?P<rest>[^\n\x08]*)",
    b"/step",
)
LOSS = pattern(rb"\d+/(?P<total>\d+) [^\n]{0,400}?\bloss: (?P<loss>[\w.+-]+)", b"loss: ")
EXACT = 20  # seconds of an epoch from which their being whole says enough
VALIDATION = pattern(rb"\bval_loss: (?P<loss>[\w.+-]+)", b"val_loss: ")


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    if (
        b"loss: " in both
        and (b"/step" in both or b"ETA: " in both or b"s/epoch" in both)
        and re.search(rb"\d/\d+ +(?:\[[=>.]+\]|\xe2\x94\x81)[^\n\r]{0,400}\bloss: ", both)
    ):
        return 0.9
    return 0.0


def parse(log: LogReader) -> list[Draft]:
    span = log.whole
    draft = Draft(log.whole, "keras")
    epoch, batches = span.last(EPOCH), _of_training(span, BATCH)
    if epoch:
        draft.set("epochs", int(epoch["epochs"]), epoch)
        draft.set("epoch", float(epoch["epoch"]), epoch)
        draft.worked(epoch)
    if batches:
        batch = batches[-1]
        done, total = int(batch["done"]), int(batch["total"])
        before = int(epoch["epoch"]) - 1 if epoch else 0
        draft.set("steps", before * total + done, batch)
        if epoch:
            draft.set("steps_planned", int(epoch["epochs"]) * total, batch)
        draft.worked(batch)
    paces = [float(f["done"]) / float(f["elapsed"]) for f in batches if int(f["elapsed"]) >= EXACT]
    if paces:
        draft.set("mean_steps_per_s", statistics.fmean(paces), batches[-1])
    if losses := _of_training(span, LOSS):
        draft.set("loss_first", number(losses[0]["loss"]), losses[0])
        draft.set("loss_last", number(losses[-1]["loss"]), losses[-1])
        draft.worked(losses[-1])
    generic.times(draft, span, [])
    draft.set("val_losses", [v for f in span.some(VALIDATION) if (v := number(f["loss"])) is not None] or None)
    return [draft]


def _of_training(span: Span, wanted: Pattern) -> list[Found]:
    """Bars as long as the first: one of another length is that of an evaluation."""
    found = span.near(wanted)
    return [one for one in found if one["total"] == found[0]["total"]]
