"""muP: acceptance tests 3 and 4 of the study, which train for minutes; benchmarks/README.md has their last result."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.transfer import judged, swept

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_best_learning_rate_stays_under_mup_alone_and_wider_is_never_worse(tmp_path: Path):
    losses = swept("transformer-adamw", tmp_path)
    mup, standard = judged(losses, "mup"), judged(losses, "standard")
    assert all(abs(drift) <= 0.5 for drift in mup.drifts), mup
    assert all(abs(drift) > 0.5 for drift in standard.drifts), standard  # the negative control
    assert mup.worse < 0.0, mup


def test_under_sgd_it_stays_on_the_mean_over_four_seeds(tmp_path: Path):
    """One seed alone says little of SGD's best: its own moves by an octave."""
    losses = swept("transformer-sgd", tmp_path)
    mup, standard = judged(losses, "mup"), judged(losses, "standard")
    assert abs(mup.drift) <= 0.5, mup
    assert abs(standard.drift) > 0.5, standard
    assert mup.worse < 0.0, mup
