"""fastai: a table with a row an epoch, `epoch  train_loss  valid_loss  ...  time`."""

from __future__ import annotations

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import LogReader, pattern
from chiplog.ledger.units import number, seconds

HEADER = pattern(rb"^epoch +train_loss +valid_loss\b", b"train_loss")
ROW = pattern(
    rb"^(?P<epoch>\d+) +(?P<loss>[\d.]+|nan) +(?P<valid>[\d.]+|nan|#na#)(?: +[\d.]+)*(?: +(?P<time>[\d:]+))? *$", b" "
)


def sniff(head: bytes, tail: bytes) -> float:
    return 0.85 if HEADER.regex.search(head) or HEADER.regex.search(tail) else 0.0


def parse(log: LogReader) -> list[Draft]:
    span, draft = log.whole, Draft(log.whole, "fastai")
    header = span.first(HEADER, far=True)
    rows = span.after(header.end).near(ROW) if header else []
    if rows:
        last = rows[-1]
        draft.set("epoch", number(last["epoch"]), last)
        draft.set("loss_first", number(rows[0]["loss"]), rows[0])
        draft.set("loss_last", number(last["loss"]), last)
        draft.set("val_losses", [value for row in rows if (value := number(row["valid"])) is not None] or None)
        times = [time for row in rows if (time := seconds(row.get("time"))) is not None]
        if len(times) == len(rows) == int(last["epoch"]) + 1:
            draft.set("train_s", sum(times), last)
        draft.worked(last)
    return [draft]
