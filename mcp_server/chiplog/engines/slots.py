"""A limit on how many jobs of a submission run at once, for a scheduler that knows such a limit of one array only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from chiplog.engines.job import Batch


class Turn(NamedTuple):
    """How many jobs of a batch run at once, and the batches which it waits for, however they end."""

    at_once: int | None
    after: list[int]


class Slot(NamedTuple):
    """A place in which one job runs at a time."""

    rounds: int  # jobs that run in it one after another, so far
    batch: int | None  # the last of them; None: nobody's yet


def turns(batches: Sequence[Batch], at_once: int | None) -> list[Turn]:
    """The turn of each batch, by which no more than `at_once` jobs of them all run at the same time; null: no limit.

    A batch holds as many slots as it has jobs, if there are so many, until all of it has ended: those of the batches
    that it follows first, then those that are free soonest. So an array of more jobs than slots runs by itself, the
    evaluations of an array begin when all its trainings have ended, and short batches run side by side.
    """
    if at_once is None:
        return [Turn(None, []) for _ in batches]
    slots, found = [Slot(0, None)] * at_once, []
    for number, batch in enumerate(batches):
        width, follows = min(len(batch), at_once), {one.batch for one in batch.after}
        slots.sort(key=lambda slot: (slot.batch not in follows, slot.rounds))
        taken, slots = slots[:width], slots[width:]
        rounds = max(slot.rounds for slot in taken) + -(-len(batch) // width)
        slots += [Slot(rounds, number)] * width
        found.append(Turn(width, sorted({slot.batch for slot in taken if slot.batch is not None})))
    return found
