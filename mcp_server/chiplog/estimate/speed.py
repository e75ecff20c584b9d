"""How long a job's passes take on a card, from its shape and the card's data sheet alone: seconds in closed form.

One pass takes the longer of what the host needs to launch its kernels and what the card needs to compute them, and
beside that what waits for memory or for other cards. Operations are counted for what a method really computes: no
gradient of a frozen weight, one more forward pass where activations are computed anew (Kaplan et al. 2020, 2.1;
Korthikanti et al. 2022, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from chiplog.estimate.gpus import Gpu, gpu
from chiplog.estimate.job import NODE, Job, style
from chiplog.estimate.memory import score_bytes, trained_params

MATMUL, ATTENTION = 0.5, 0.3  # shares of the peak that matrices and attention reach
LAUNCH_S = 1.5e-3  # seconds of launches of one layer's kernels, forward and backward
EXPERT = 1 / 3  # of a layer's launches, for each expert that is run alone: a dozen kernels, one of which waits
SHARP = 2.0  # how sharply the longer of launching and computing decides
LINK, NETWORK = 200e9, 40e9  # bytes/s that a card exchanges within a node and beyond it
PARTS = ("matrices", "attention", "launches", "exchange", "traffic")


class Pass(NamedTuple):
    """Seconds of one forward and backward pass on one card, by what they grow with."""

    matrices: float
    attention: float
    launches: float  # and what passes must read of the weights, however few the tokens
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
    length = job.mean_tokens / job.micro_batch
    scores = 2.0 * length * shape.heads * shape.head_dim * shape.layers  # half of the square is masked
    attention = scores * (3.5 + again) * (3 if score_bytes(job) else 1)
    layers = shape.layers + shape.encoder_layers
    own = (
        1.0 if style(job.framework) in ("torchtune", "litgpt", "own") or full else 1.6
    )  # adapters as modules of their own
    if job.expert_loop:
        layers += shape.mixture_layers * shape.experts * EXPERT
    launches = LAUNCH_S * layers * (1 + again / 2) * own * (0.6 if job.compile else 1.0)
    reached = MATMUL * (0.8 if job.dtype == "fp8" else 1.0)
    divided, stages = job.spread.sample, job.spread.pipeline
    waits = 1 + (stages - 1) / (2 * NODE)  # stages of a pipeline that wait for the first and the last batches
    return Pass(
        matrices=waits * job.mean_tokens * matrices / card.peak(job.dtype) / reached / divided,
        attention=waits * job.mean_tokens * attention / card.peak(_of_scores(job)) / ATTENTION / divided,
        launches=launches / stages + _reading(job, card, again),
        exchange=_exchange(job),
        traffic=_traffic(job, card, again),
    )


def _reading(job: Job, card: Gpu, again: float) -> float:
    """Seconds of reading the weights once a pass."""
    held = job.shape.n_active * job.weight_bits / 8 * (2 if job.master else 1)
    return held * (2 + again) / card.bandwidth_bytes_s / job.spread.sample


def _of_scores(job: Job) -> str:
    """The type in which attention is computed."""
    return "bf16" if job.dtype == "fp8" else job.dtype


def _exchange(job: Job) -> float:
    """Seconds of gathering shards of weights and spreading gradients, a pass."""
    if job.gpus == 1:
        return 0.0
    shape, spread = job.shape, job.spread
    sent = shape.n_params * 2.0 / (spread.tensor * spread.pipeline)
    if spread.gathers:
        rounds = 3.0 if job.method == "full" else 2.0
    else:
        rounds = 2.0 / job.grad_accum if job.method == "full" else 0.0
    seconds = sent * rounds / (LINK if job.gpus <= NODE else NETWORK)
    if (ways := spread.tensor) > 1:  # hidden states, four times a layer in each direction
        hidden = job.mean_tokens * shape.width * 2.0 * shape.layers / spread.pipeline
        seconds += 8 * hidden * (ways - 1) / ways / ways / LINK
    return seconds


def _traffic(job: Job, card: Gpu, again: float) -> float:
    """Seconds of what waits for memory: unpacking weights of few bits, and the optimiser."""
    unpacked = job.shape.n_params * 3.0 * (2 + again) if job.weight_bits < 16 else 0.0
    stepped = trained_params(job) / job.spread.states * 16.0 / job.grad_accum
    return (unpacked + stepped) / card.bandwidth_bytes_s
