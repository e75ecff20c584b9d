"""spaCy: a table with a row an evaluation, `E    #       LOSS NER  ENTS_F  SCORE`."""

from __future__ import annotations

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import LogReader, pattern
from chiplog.ledger.units import number, whole

HEADER = pattern(rb"^ *E +# +LOSS \w+", b" LOSS ")
ROW = pattern(rb"^ *(?P<epoch>\d+) +(?P<step>\d+)(?: +[\d.]+){3,}$", b" ")
DONE = pattern(rb"Saved pipeline to output directory", b"Saved pipeline to output")


def sniff(head: bytes, tail: bytes) -> float:
    both = head + tail
    return 0.85 if b"Training pipeline" in both or (b"Pipeline: [" in both and HEADER.regex.search(both)) else 0.0


def parse(log: LogReader) -> list[Draft]:
    span, draft = log.whole, Draft(log.whole, "spacy")
    if found := span.last(ROW):
        draft.set("epoch", number(found["epoch"]), found)
        draft.set("steps", whole(found["step"]), found)
        draft.worked(found)
    if found := span.last(DONE):
        draft.done = found
    return [draft]
