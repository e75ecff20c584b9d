"""The validity guards of a LoRA run: when they look, and what they leave in guards.json.

The frozen base model is looked at in a sample of its entries: hashing all of 8 billion takes minutes. One-batch overfit
is left out, since it trains a copy of the model. Process 0 looks, and writes; of a divided model it has its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from trainer.guards import SAMPLE, Outcome, Watch, budget_met, optimizer_coverage, read, write
from trainer.ranks import Ranks


class Guards:
    """Those of one start of a run, which has made `step` steps before."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: SimpleNamespace, out: Path, ranks: Ranks,
        step: int,
    ):  # fmt: skip
        self.out, self.began_at, self.lines = out, step, 0
        steps = config.guard_steps if ranks.writes else 0
        # What an earlier start judged stands: a later one may have too few steps, or too small ones, to judge by.
        self.known = bool(step) and any(one["guard"] == "weights move" for one in read(out))
        settle = max(0, config.warmup_steps - step)
        self.watch = Watch(model, optimizer, steps=steps, settle=settle, frozen_sample=SAMPLE)

    @contextmanager
    def step(self, number: int, lines: int) -> Iterator[None]:
        """Around the optimizer's step `number`, from 0, on a batch of that many samples or packs."""
        judged = self.watch.judged
        with self.watch.step(number - self.began_at):
            yield
        self.lines += lines
        if self.watch.judged and not (judged or self.known):
            write(self.out, self.watch.of_the_trained())  # now: a kill takes what only this start has seen

    def finish(self, batch_size: int, total_steps: int, epochs: float, config: SimpleNamespace) -> None:
        """Writes what the whole run comes to."""
        done = self.began_at * batch_size + self.lines
        what = "packs" if config.packed else "samples"
        write(self.out, [*self._seen(), budget_met(done, total_steps * batch_size, epochs, config.epochs, what)])

    def _seen(self) -> list[Outcome]:
        watch = self.watch
        if not watch.steps:
            return []
        trained = watch.of_the_trained() if not self.known and (watch.judged or not self.began_at) else []
        return [optimizer_coverage(watch.model, watch.optimizer), *trained, watch.of_the_frozen()]
