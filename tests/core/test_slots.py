"""A limit on the jobs of a submission that run at once, where only arrays can be limited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiplog.engines import After, Batch
from chiplog.engines.slots import Turn, turns


def batches(*lengths: int, follows: Sequence[int | None] = ()) -> list[Batch]:
    """Batches of so many jobs; each may follow an earlier one."""
    before = [*follows, *[None] * (len(lengths) - len(follows))]
    return [
        Batch(
            script=Path("s"), folder=Path(), indices=tuple(range(n)) if n > 1 else (),
            after=() if one is None else (After(kind="afterok", batch=one),),
        )
        for n, one in zip(lengths, before, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "at_once", "expected"),
    [
        (batches(9, 9, 2), None, [(None, []), (None, []), (None, [])]),
        # Trainings, their evaluations, controls: one after another where each fills all slots, else side by side.
        (batches(20, 20, 2, follows=[None, 0]), 8, [(8, []), (8, [0]), (2, [1])]),
        (batches(4, 4, 2, follows=[None, 0]), 8, [(4, []), (4, [0]), (2, [])]),
        # Runs of which each asks for something else, each with its evaluation.
        (batches(1, 1, 1, 1, 1, 1, follows=[None, 0, None, 2, None, 4]), 2,
         [(1, []), (1, [0]), (1, []), (1, [2]), (1, [1]), (1, [4])]),
        (batches(3, 1, 2), 1, [(1, []), (1, [0]), (1, [1])]),
    ],
)  # fmt: skip
def test_batches_share_the_slots(made: list[Batch], at_once: int | None, expected: list[tuple[int | None, list[int]]]):
    assert turns(made, at_once) == [Turn(*one) for one in expected]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 5), st.data())
def test_however_long_jobs_run_no_more_than_the_limit_run_at_once(
    lengths: list[int], at_once: int, data: st.DataObject
):
    """Batches start as soon as those that they wait for have ended, which they do in any order."""
    found, ended, running = turns(batches(*lengths), at_once), set[int](), set[int]()
    while len(ended) < len(found):
        running |= {i for i, turn in enumerate(found) if i not in ended and ended.issuperset(turn.after)}
        assert sum(found[i].at_once or 0 for i in running) <= at_once
        last = data.draw(st.sampled_from(sorted(running)))
        running.remove(last)
        ended.add(last)
