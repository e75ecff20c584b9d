"""The nouns of estimation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from chiplog.schema import Frozen

NAMED = 8  # runs of the evidence that an estimate names

Basis = Literal["same-configuration", "scaled", "none"]


class Workload(Frozen):
    """How much work a run is, counted on the real data set with the real tokenizer."""

    steps: int = Field(description="Optimiser steps; 0 for a control.")
    tokens: int | None = Field(description="Tokens trained on, padding left out; null where nothing could count them.")
    eval_samples: int = Field(description="Samples that will be scored.")


class Estimate(Frozen):
    """A number that says where it comes from."""

    value: float = Field(description="The estimate, in seconds or bytes.")
    low: float = Field(description="Lower end of the interval.")
    high: float = Field(description="Upper end of the interval.")
    coverage: float | None = Field(description="Share of such intervals that hold; null where that was not measured.")
    basis: Basis = Field(description="What the number rests on.")
    evidence: list[str] = Field(description="The runs it comes from, as experiment/run; the first few if many.")
    n_evidence: int = Field(description="How many runs it comes from.")
    assumed: list[str] = Field(default=[], description="What was taken for granted.")


class RunEstimate(Frozen):
    """What one run will need. A null says that there is no evidence."""

    elapsed: Estimate | None = Field(description="Seconds from start to end of the job.")
    peak_mem: Estimate | None = Field(description="Peak memory in bytes.")
    mem_kind: str | None = Field(description="What the memory figure counts, such as host_rss.")

    @property
    def basis(self) -> Basis:
        return self.elapsed.basis if self.elapsed else "none"
