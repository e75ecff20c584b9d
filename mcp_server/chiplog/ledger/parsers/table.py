"""A table with a header, as Keras' and Lightning's CSV loggers and many loops write it: `epoch,loss,val_loss`."""

from __future__ import annotations

import re

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import Found, LogReader, pattern
from chiplog.ledger.units import number, whole

HEADER = re.compile(rb"\s*(?P<names>[A-Za-z_][\w/ .-]{0,60}(?:[,\t][\w/ .-]{1,60}){1,60})\r?\n")
ROW = pattern(rb"^(?:[-+\w.]{0,40}[,\t]){1,60}[-+\w.]{0,40}$", b",", b"\t")
STEPS = ("global_step", "step", "steps", "iteration", "iter", "current_steps")
LOSSES = ("loss", "train_loss", "train/loss", "training_loss", "train_loss_epoch", "train_loss_step", "train loss")
VALIDATION = ("val_loss", "valid_loss", "eval_loss", "validation_loss", "val/loss", "test_loss", "val loss")


def sniff(head: bytes, tail: bytes) -> float:
    return 0.8 if _names(head) else 0.0


def parse(log: LogReader) -> list[Draft]:
    draft, names = Draft(log.whole, None), _names(log.head)
    rows = [(found, _cells(names, found)) for found in log.whole.near(ROW)]
    for key, wanted in (("epoch", ("epoch",)), ("steps", STEPS)):
        if counted := _column(rows, wanted):
            draft.set(key, number(counted[-1][1]) if key == "epoch" else whole(counted[-1][1]), counted[-1][0])
    if losses := _column(rows, LOSSES):
        draft.set("loss_first", number(losses[0][1]), losses[0][0])
        draft.set("loss_last", number(losses[-1][1]), losses[-1][0])
        draft.worked(losses[-1][0])
    values = [value for _, text in _column(rows, VALIDATION) if (value := number(text)) is not None]
    draft.set("val_losses", values or None)
    return [draft]


def _names(head: bytes) -> list[str]:
    """The names of the columns, if a loss and a count are among them."""
    match = HEADER.match(head)
    names = re.split(r"[,\t]", match["names"].decode().strip().lower()) if match else []
    counts = any(name in names for name in ("epoch", *STEPS))
    return names if counts and any(name in names for name in LOSSES) else []


def _cells(names: list[str], found: Found) -> dict[str, str]:
    return dict(zip(names, re.split(r"[,\t]", found.line.strip("\r")), strict=False))


def _column(rows: list[tuple[Found, dict[str, str]]], names: tuple[str, ...]) -> list[tuple[Found, str]]:
    """The cells of the first of these columns that has a number."""
    for name in names:
        cells = [(found, row[name]) for found, row in rows if number(row.get(name)) is not None]
        if cells:
            return cells
    return []
