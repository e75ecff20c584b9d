"""Keras: `Epoch 3/10`, then a bar of batches, `938/938 [====] - 5s 5ms/step - loss: 0.2`."""

from __future__ import annotations

import re
import statistics

from chiplog.ledger.draft import Draft
from chiplog.ledger.parsers import generic
from chiplog.ledger.reader import LogReader, pattern
from chiplog.ledger.runs import take_losses
from chiplog.ledger.units import number

EPOCH = pattern(rb"^Epoch (?P<epoch>\d+)/(?P<epochs>\d+)", b"Epoch ")
BATCH = pattern(
    rb"(?P<done>\d+)/(?P<total>\d+) +(?:\[[=>.]+\]|[^\x00-\x7f\n]{6,120}) *-? *(?P<elapsed>\d+)s +(?P<step>"
    rb"[\d.]+)(?P<unit>ms|us|s)/(?:step|epoch)"
    rb"(?P<rest>[^\n\x08]*)",
    b"/step",
)
LOSS = pattern(rb"\d+/\d+ [^\n]{0,400}?\bloss: (?P<loss>[\w.+-]+)", b"loss: ")
EXACT = 20  # seconds of an epoch from which their being whole says enough
VALIDATION = pattern(rb"\bval_loss: (?P<loss>[\w.+-]+)", b"val_loss: ")


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    if (
        b"loss: " in both
        and (b"/step" in both or b"ETA: " in both or b"s/epoch" in both)
        and re.search(rb"\d/\d+ +(?:\[[=>.]+\]|\xe2\x94\x81)", both)
    ):
        return 0.9
    return 0.0


def parse(log: LogReader) -> list[Draft]:
    span = log.whole
    draft = Draft(log.whole, "keras")
    epoch, batch = span.last(EPOCH), span.last(BATCH)
    if epoch:
        draft.set("epochs", int(epoch["epochs"]), epoch)
        draft.set("epoch", float(epoch["epoch"]), epoch)
        draft.worked(epoch)
    if batch:
        done, total = int(batch["done"]), int(batch["total"])
        before = int(epoch["epoch"]) - 1 if epoch else 0
        draft.set("steps", before * total + done, batch)
        if epoch:
            draft.set("steps_planned", int(epoch["epochs"]) * total, batch)
        draft.worked(batch)
    paces = [float(f["done"]) / float(f["elapsed"]) for f in span.near(BATCH) if int(f["elapsed"]) >= EXACT]
    if paces:
        draft.set("mean_steps_per_s", statistics.fmean(paces), batch)
    take_losses(draft, span, LOSS)
    generic.times(draft, span, [])
    draft.set("val_losses", [v for f in span.some(VALIDATION) if (v := number(f["loss"])) is not None] or None)
    return [draft]
