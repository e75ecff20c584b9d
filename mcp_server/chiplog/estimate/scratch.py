"""What past runs say of a training that makes its own model ("from scratch"): the same settings, the same steps, or
a model near in size, scaled by FLOPs.

No physics stands behind it: without such a run there is no number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from chiplog.estimate.guess import Guess
from chiplog.estimate.history import COUNT, SCALED, VALIDATING, History, differs, guess_of, is_amount
from chiplog.estimate.history import PACED as PACED_STEPS
from chiplog.estimate.model import Workload
from chiplog.plan import Run
from chiplog.record import Record, State

# Settings that change neither the time nor the memory of a step; `momentum` and `clip_grad_norm` at 0 save a pass over
# the weights, which is nothing beside the matrix products.
NEUTRAL = {
    "seed", "lr", "lr_schedule", "warmup_steps", "final_lr", "beta1", "beta2", "eps", "momentum", "nesterov",
    "weight_decay", "clip_grad_norm", "init", "init_std", "zero_readout", "zero_query", "forget_bias",
    "parametrization", "base_width", "base_depth", "base_heads", "max_epochs", "keep_checkpoints",
}  # fmt: skip
# Settings on which a run validates, and when.
VALIDATES = VALIDATING | {"val_tokens"}
# Settings that move time and memory little: another corpus has another vocabulary at most, which the FLOPs count.
NEAR = {
    "dataset", "optimizer", "norm", "norm_position", "position", "bias", "tied", "activation", "dropout",
    "log_every_n_steps", "save_every_n_steps", "guard_steps", "overfit_steps",
}  # fmt: skip
# Settings that move it as FLOPs move.
SIZE = {"width", "depth", "heads", "ffn_ratio", "seq_len", "batch_size", "micro_batch_size"}
# All else, such as architecture, dtype, device and compile, must be the same.
STARTING = {"architecture", "compile", "device", "dtype"}  # what its start-up depends on most
LARGEST_RATIO = 10.0  # of the FLOPs of a step, beyond which a run is not near: small steps are bound by something else
BY_FLOPS = "training time grows with FLOPs; the interval reaches to what tokens and steps alone would say"


class ScratchHistory(History):
    """The runs of the same recipe and resources, classed by the trainer's settings."""

    def _class(self, every: Sequence[Record]) -> None:
        run = self.run
        apart = {r.key: differs(run.config, r.config) for r in every}
        other = {key: names - NEUTRAL for key, names in apart.items()}
        done = [r for r in every if r.state is State.COMPLETED]
        self.answered = []
        begun = [r for r in done if not apart[r.key] & STARTING]
        # The guard on one batch takes its steps then, which grow with FLOPs.
        self.loaded = self._nearest(begun) or begun
        self.same = [r for r in done if not other[r.key] and self._same_work(r)]
        paced = [r for r in every if other[r.key] <= COUNT | VALIDATES]
        self.paced = [r for r in paced if (r.usage.steps or 0) >= PACED_STEPS]
        self.stopped = [r for r in every if not other[r.key] and r.state is State.TIMEOUT and not r.usage.resumed]
        near = [r for r in done if other[r.key] <= COUNT | VALIDATES | NEAR | SIZE]
        self.near = self._nearest(near)
        self.alike_in_length = [r for r in near if other[r.key] <= COUNT | VALIDATES | NEAR]
        validated = [r for r in near if is_amount(r.usage.val_s) and r.usage.val_losses]
        self.validated = self._nearest(validated)
        self.other_samples = set()

    def _nearest(self, records: Sequence[Record]) -> list[Record]:
        """Those whose steps have the nearest number of FLOPs, if it is near at all."""
        apart = {r.key: abs(math.log(ratio)) for r in records if (ratio := self._ratio(r)) is not None}
        least = min(apart.values(), default=math.inf)
        if least > math.log(LARGEST_RATIO):
            return []
        return [r for r in records if r.key in apart and apart[r.key] <= least + 1e-6]

    def _ratio(self, record: Record) -> float | None:
        """FLOPs of a step of the planned run, as a multiple of that one's; null where one is not known."""
        theirs, work = _flops(record), self.work
        if not theirs or not work.flops or not work.steps or not record.usage.steps:
            return None
        return (work.flops / work.steps) / (theirs / record.usage.steps)

    def _training(self) -> Guess | None:
        """By FLOPs. A small model is bound by its steps or its tokens, a large one by its FLOPs."""
        near = [r for r in self.near if r.usage.train_s and r.usage.steps and r.usage.tokens and _flops(r)]
        times = [(r.usage.train_s or 0.0) * (self.work.flops or 0.0) / (_flops(r) or 1.0) for r in near]
        guess = guess_of(times, *SCALED, near)
        if guess is None:
            return None
        bare = [(r.usage.train_s or 0.0) * self.work.steps / (r.usage.steps or 1) for r in near]
        bare += [(r.usage.train_s or 0.0) * (self.work.tokens or 0) / (r.usage.tokens or 1) for r in near]

        def quantile(share: float) -> float:
            value = guess.quantile(share)
            return min([value, *bare]) if share < 0.5 else max([value, *bare])

        return guess._replace(quantile=quantile, assumed=(BY_FLOPS,))

    def _larger(self, record: Record) -> float:
        """How many times the FLOPs of that run's validation this one's takes."""
        usage, work = record.usage, self.work
        if not (usage.val_label_tokens and work.val_label_tokens and usage.flops_per_token and work.flops):
            return 1.0
        return (work.val_label_tokens * work.flops / (work.tokens or 1)) / (
            usage.val_label_tokens * usage.flops_per_token
        )

    def _same_work(self, record: Record) -> bool:
        usage, work = record.usage, self.work
        return (usage.steps, usage.val_label_tokens) == (work.steps, work.val_label_tokens)


def _flops(record: Record) -> float | None:
    """Of all its training."""
    usage = record.usage
    return usage.flops_per_token * usage.tokens if usage.flops_per_token and usage.tokens else None


def history_of(run: Run, work: Workload, records: Sequence[Record]) -> History:
    """What past runs say of a run of either kind."""
    return (ScratchHistory if run.kind == "train" else History)(run, work, records)
