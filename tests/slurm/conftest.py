"""One real Slurm cluster for all tests of this folder; without Slurm's packages they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import PACKAGES, Cluster, missing_programs

HERE = Path(__file__).parent
# Where CI says that it has Slurm, a skip would hide that it has not.
REQUIRED = "CHIPLOG_REQUIRE_SLURM"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    how = f"these tests start a real Slurm; on Debian or Ubuntu: apt-get install {PACKAGES}"
    missing = missing_programs()
    if ours and missing and os.environ.get(REQUIRED):
        raise pytest.UsageError(f"{REQUIRED} is set, but there is no {', '.join(missing)}: {how}")
    for item in ours:
        item.add_marker("slurm")
        if missing:
            item.add_marker(pytest.mark.skip(reason=how))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of 16 CPUs and two GPUs, shared by all tests: none may ask for all of it, or kill a node."""
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster
