"""PyTorch Lightning: a bar an epoch, devices at the top, `Trainer.fit` stopped at the end."""

from __future__ import annotations

import re

from chiplog.ledger.bars import Bar, bars
from chiplog.ledger.draft import Draft
from chiplog.ledger.parsers import generic
from chiplog.ledger.reader import LogReader, Span, pattern
from chiplog.ledger.runs import distinct, steady, take_speed
from chiplog.ledger.units import number, whole

WORLD = pattern(rb"GLOBAL_RANK: \d+, MEMBER: \d+/(?P<n>\d+)", b"MEMBER: ")
DEVICES = pattern(rb"LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES: \[(?P<ids>[\d,]+)\]", b"LOCAL_RANK: ")
STOPPED = pattern(rb"`?Trainer\.fit`? stopped: `?(?P<why>[^`\n]+)`? reached", b"stopped: ")
LIMIT = re.compile(r"max_(?P<what>epochs|steps)=(?P<n>\d+)")
STARTED = pattern(rb"^[^\n]{0,60}\bGPU available: ", b"GPU available: ")
LABEL = re.compile(r"Epoch (?P<epoch>\d+)(?:/(?P<last>\d+))?")
LOSS = re.compile(r"(?:^|[, ])(?P<key>(?:train[_/])?loss(?:_step)?)(?:=|: )(?P<loss>-?[\w.+-]+)")
PARAMS = pattern(rb"^(?P<n>[\d.]+) ?(?P<unit>[KMB]?) +Total params", b"Total params")
RESUMED = pattern(rb"Restor(?:ing|ed) (?:states|all states) from the checkpoint", b"Restor")
UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    if (b"LOCAL_RANK: " in both and b"CUDA_VISIBLE_DEVICES" in both) or b"Trainer.fit` stopped" in both:
        return 0.9
    if b"pytorch_lightning" in both or b"lightning.pytorch" in both or b"lightning_fabric" in both:
        return 0.8
    if b"v_num:" in both and b"it/s" in both:  # rich's bars
        return 0.6
    return 0.6 if b"v_num=" in both and re.search(rb"Epoch \d+: +\d+%\|[^\n]{0,400}v_num=", both) else 0.0


def parse(log: LogReader) -> list[Draft]:
    starts = [found.offset for found in log.whole.some(STARTED)]
    return [_run(span) for span in log.whole.cut(distinct(log.whole, starts))]


def _run(span: Span) -> Draft:
    draft = Draft(span, "lightning")
    if found := span.first(WORLD):
        draft.set("gpus", whole(found["n"]), found)
    elif found := span.first(DEVICES):
        draft.set("gpus", len(found["ids"].split(",")), found)
    if found := span.first(PARAMS):
        draft.set("n_params", round((number(found["n"]) or 0) * UNITS[found["unit"]]), found)
    shown = [one for one in bars(span, lambda one: bool(LABEL.match(one.label))) if LABEL.match(one.label)]
    if shown:
        _epochs(draft, shown)
    if found := span.last(STOPPED):
        draft.done = found
        draft.worked(found)
        if limit := LIMIT.search(found["why"]):
            draft.set("epochs" if limit["what"] == "epochs" else "steps_planned", int(limit["n"]), found)
            if limit["what"] == "steps":
                draft.set("steps", int(limit["n"]), found)
                draft.default("epoch", _epoch(shown), found)
    generic.losses(draft, span)
    if not shown:
        generic.epochs(draft, span)
    return draft


def _epoch(shown: list[Bar]) -> float | None:
    label = LABEL.match(shown[-1].label) if shown else None
    return float(label["epoch"]) if label else None


def _epochs(draft: Draft, shown: list[Bar]) -> None:
    last = shown[-1]
    draft.worked(last.found)
    label = LABEL.match(last.label)
    assert label
    epoch = int(label["epoch"])
    if epoch:  # the first may not be done
        draft.set("epoch", float(epoch), last.found)
    if last.total is None:
        take_speed(draft, last.done, last.elapsed_s)
        return
    if not epoch:
        draft.default("steps_planned", last.total, last.found)
        draft.set("train_s", last.elapsed_s, last.found)
    train = [one for one in shown if one.total == last.total]
    draft.set("steps", epoch * last.total + last.done, last.found)
    if label["last"]:
        draft.set("epochs", int(label["last"]) + 1, last.found)
        draft.set("steps_planned", (int(label["last"]) + 1) * last.total)
    losses = [(one, match) for one in train if (match := LOSS.search(one.after))]
    if losses:
        draft.set("loss_first", number(losses[0][1]["loss"]), losses[0][0].found)
        draft.set("loss_last", number(losses[-1][1]["loss"]), losses[-1][0].found)
    full = [one for one in train if one.complete] or train
    take_speed(draft, full[-1].done, full[-1].elapsed_s)
    steady(draft, train)
