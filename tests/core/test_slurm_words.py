"""Why a job of Slurm's waits or ended so, in words: what no cluster can be made to say at will."""

from __future__ import annotations

import pytest

from chiplog.engines.slurm import Attempt, _reason, _state


@pytest.mark.parametrize(
    ("words", "code", "elapsed", "reason", "said"),
    [
        ("CANCELLED", 0, 0, "Dependency", "Dependency: the job that it waits for did not end well"),
        ("CANCELLED", 0, 0, "None", "Slurm says CANCELLED"),  # accounting does not always hear of it
        ("CANCELLED by 1000", 0, 0, "Dependency", "Slurm says CANCELLED by 1000"),
        ("FAILED", 3, 7, "Dependency", "exit status 3"),
        ("TIMEOUT", 0, 60, "Dependency", "Slurm says TIMEOUT"),
        ("COMPLETED", 0, 7, "Dependency", None),
        ("PENDING", 0, 0, "Dependency", "waits: Dependency"),
    ],
)
def test_a_reason_to_wait_is_no_reason_to_end(words: str, code: int, elapsed: int, reason: str, said: str | None):
    never = None if not elapsed else "2026-01-01T00:00:00+00:00"
    go = Attempt("eval", _state(words), words, code, never, never, never, elapsed, reason)
    assert _reason(go) == said
