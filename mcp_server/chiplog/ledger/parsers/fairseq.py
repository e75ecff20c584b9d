"""fairseq: `| train | epoch 001 | loss 3.9 | ... | num_updates 500 | ... | wall 120`, or the same as JSON."""

from __future__ import annotations

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import LogReader, pattern
from chiplog.ledger.runs import take_losses, take_speed
from chiplog.ledger.units import number, whole

LOSS = pattern(
    rb"\| (?:train|train_inner) \| (?:[^\n]{0,1500}?\| |\{[^\n]{0,1500}?\"(?:train_)?)?"
    rb"loss[\"']?(?::? |=)[\"']?(?P<loss>[\w.+-]+)",
    b"| train",
)
INNER = pattern(
    rb"\| train_inner \| [^\n]{0,1500}?(?<!\w)loss[\"']?(?::? |=)[\"']?(?P<loss>[\w.+-]+)", b"| train_inner"
)
UPDATES = pattern(rb"\| train[^\n]{0,1500}?num_updates[\"']?(?::? |=)[\"']?(?P<step>\d+)", b"num_updates")
WALL = pattern(rb"\| train[^\n]{0,1500}?\b(?:train_)?wall[\"']?:? [\"']?(?P<s>[\d.]+)[\"'}]*$", b"wall")
EPOCH = pattern(rb"\| train[^\n]{0,1500}?\bepoch[\"']?:? [\"']?(?P<epoch>\d+)", b"epoch")
DONE = pattern(rb"done training in (?P<s>[\d.]+) seconds", b"done training in ")
LIMIT = pattern(rb"\bmax_update['\"]?[=:] ?(?P<n>\d+)", b"max_update")
VALID = pattern(rb"\| valid[^\n]{0,1500}?\b(?:valid_)?loss[\"']?:? [\"']?(?P<loss>[\w.+-]+)", b"| valid")
WORLD = pattern(rb"distributed_world_size['\"]?[=:] ?(?P<n>\d+)", b"distributed_world_size")


def sniff(head: bytes, tail: bytes) -> float:
    return 0.85 if b"fairseq" in head + tail and b"num_updates" in head + tail else 0.0


def parse(log: LogReader) -> list[Draft]:
    span, draft = log.whole, Draft(log.whole, "fairseq")
    take_losses(draft, span, INNER if span.any(INNER) else LOSS)
    if found := span.last(UPDATES):
        draft.set("steps", whole(found["step"]), found)
    if found := span.last(EPOCH):
        draft.set("epoch", number(found["epoch"]), found)
    if found := span.first(LIMIT):
        draft.set("steps_planned", whole(found["n"]) or None, found)
    if found := span.first(WORLD):
        draft.set("gpus", whole(found["n"]), found)
    if done := span.last(DONE):
        draft.done = done
    if (found := done or span.last(WALL)) and draft.set("train_s", number(found["s"]), found):
        take_speed(draft, draft.get("steps") or 0, draft.get("train_s"))
    draft.set("val_losses", [value for f in span.some(VALID) if (value := number(f["loss"])) is not None] or None)
    return [draft]
