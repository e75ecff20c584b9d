"""How long a job's passes take on a card, from its shape and the card's data sheet alone: seconds in closed form.

One pass takes the longer of what the host needs to launch its kernels and what the card needs to compute them, and
beside that what waits for memory or for other cards. Operations are counted for what a method really computes: no
gradient of a frozen weight, one more forward pass where activations are computed anew (Kaplan et al. 2020, 2.1;
Korthikanti et al. 2022, appendix A).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from chiplog.estimate.gpus import Gpu, gpu
from chiplog.estimate.job import Job, style
from chiplog.estimate.memory import trained_params

MATMUL, ATTENTION = 0.5, 0.3  # shares of the peak that matrices and attention reach
LAUNCH_S = 1e-3  # seconds of launches of one layer's kernels, forward and backward
SHARP = 4.0  # how sharply the longer of launching and computing decides
NODE = 8  # cards that are linked closely
LINK, NETWORK = 200e9, 40e9  # bytes/s that a card exchanges within a node and beyond it
PARTS = ("matrices", "attention", "launches", "exchange", "traffic")


class Pass(NamedTuple):
    """Seconds of one forward and backward pass on one card, by what they grow with."""

    matrices: float
    attention: float
    launches: float
    exchange: float  # with other cards, while it computes
    traffic: float  # reading weights to unpack them, and the optimiser's step

    @property
    def total(self) -> float:
        """Seconds of the pass."""
        return self._busy() + self.traffic

    def shares(self) -> tuple[float, ...]:
        """How much of the total each part makes, to first order."""
        compute = self.matrices + self.attention
        each = [part**SHARP for part in (compute, self.launches, self.exchange)]
        of_compute, launches, exchange = (self._busy() * part / sum(each) / self.total for part in each)
        matrices = of_compute * self.matrices / compute
        return matrices, of_compute - matrices, launches, exchange, self.traffic / self.total

    def times(self, factors: Sequence[float]) -> Pass:
        """The same pass with each part longer by a factor."""
        return Pass(*(part * factor for part, factor in zip(self, factors, strict=True)))

    def _busy(self) -> float:
        parts = (self.matrices + self.attention, self.launches, self.exchange)
        return sum(part**SHARP for part in parts) ** (1 / SHARP)


def one_pass(job: Job) -> Pass:
    """Seconds of one forward and backward pass. Raises NotFoundError for a card that is not known."""
    card, shape = gpu(job.gpu or ""), job.shape
    full, again = job.method == "full", {"none": 0.0, "selective": 0.2, "full": 1.0}[job.checkpointing]
    inner = shape.n_active - shape.n_embedding + (shape.vocab * shape.width if shape.tied else 0)
    matrices = 2.0 * inner * (3 if full else 2) + 2.0 * inner * again
    scores = 2.0 * job.seq_len * shape.heads * shape.head_dim * shape.layers  # half of the square is masked
    attention = scores * (3.5 + again) * (3 if job.attention == "eager" else 1)
    divided = model_parallel(job)
    peak = card.peak(job.dtype)
    layers = shape.layers + shape.encoder_layers
    kernels = LAUNCH_S * layers * (1 + again / 2) * (1.0 if full or style(job.framework) == "torchtune" else 1.6)
    return Pass(
        matrices=job.tokens * matrices / peak / MATMUL / divided,
        attention=job.tokens * attention / peak / ATTENTION / divided,
        launches=kernels * (0.6 if job.compile else 1.0) / divided,
        exchange=_exchange(job),
        traffic=_traffic(job, card, again),
    )


def model_parallel(job: Job) -> float:
    """Cards over which one sample is divided, as `TP4 PP8` says."""
    cards = 1
    for word in job.sharding.replace("+", " ").split():
        if word[:2] in ("TP", "PP", "CP") and word[2:].isdigit():
            cards *= int(word[2:])
    return float(cards)


def _exchange(job: Job) -> float:
    """Seconds of gathering shards of weights and spreading gradients, a pass."""
    if job.gpus == 1:
        return 0.0
    sent = job.shape.n_params * 2.0 / model_parallel(job)
    whole = re.search(r"fsdp|zero-?3|shard", job.sharding, re.IGNORECASE)
    rounds = (3.0 if job.method == "full" else 2.0) if whole else 2.0 / job.grad_accum
    if not whole and job.method != "full":
        return 0.0
    return sent * rounds / (LINK if job.gpus <= NODE else NETWORK)


def _traffic(job: Job, card: Gpu, again: float) -> float:
    """Seconds of what waits for memory: unpacking weights of few bits, and the optimiser."""
    unpacked = job.shape.n_params * 3.0 * (2 + again) if job.weight_bits < 16 else 0.0
    stepped = trained_params(job) / job.shards * 16.0 / job.grad_accum
    return (unpacked + stepped) / card.bandwidth_bytes_s
