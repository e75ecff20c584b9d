"""`metrics.jsonl` of this project's own jobs: an event a line."""

from __future__ import annotations

import json

from chiplog.ledger.draft import Draft
from chiplog.ledger.metrics import Start, read_events, train_usage
from chiplog.ledger.reader import LogReader, pattern

END = pattern(rb'"event": "end"', b'"event": "end"')


def sniff(head: bytes, tail: bytes) -> float:
    try:
        first = json.loads(head.partition(b"\n")[0])
    except ValueError:
        return 0.0
    return 1.0 if isinstance(first, dict) and first.get("event") == "start" else 0.0


def parse(log: LogReader) -> list[Draft]:
    events = read_events(log.path)
    own = any(isinstance(event, Start) and event.flops_per_token for event in events)  # which no recipe states
    draft = Draft(log.whole, "trainer" if own else "torchtune")
    for name, value in train_usage(events).model_dump(exclude_none=True).items():
        draft.set(name, value)
    if any(isinstance(event, Start) for event in events):
        draft.done = log.whole.last(END)
    return [draft]
