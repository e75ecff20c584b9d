"""How long a job's passes take on a card, from its shape and the card's data sheet alone: seconds in closed form.

A pass takes as long as its parts together: products of matrices and attention, what is only moved through the card's
memory, kernels that are launched one by one, and what waits for other cards. Operations are counted for what a method
really computes: no gradient of a frozen weight, one more forward pass where activations are computed anew (Kaplan et
al. 2020, 2.1; Korthikanti et al. 2022, appendix A). Constants without a source were fitted on all public runs together
and rounded; least sure are those that one table carries: NARROW, PER_WATT, LAUNCH_S, UNPACK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from chiplog.estimate import memory
from chiplog.estimate.gpus import Gpu, gpu
from chiplog.estimate.job import FUSED, NODE, Job

# Share of the peak that products of large matrices reach: at most what is measured of an A100 (0.86: Bekman, Machine
# Learning Engineering), and less where a card has few watts for its rate, as clocks fall with the root of the power.
REACHED, PER_WATT = 0.85, 0.8  # the latter at one watt a TFLOP/s
FP8 = 0.9  # of that in 8 bits (SemiAnalysis 2024: 0.65 of an H100's peak, and 0.73 in bf16)
ATTENTION = 0.37  # of that in attention
NARROW = 1000  # width of an expert whose matrices take twice as long: few tokens come to each
MOVED = 9  # times that a byte kept for the backward pass is moved: thrice forward, twice that with gradients
LAUNCH_S = 1.4e-3  # seconds of one layer's small kernels, forward and backward
ADAPTER_S = 0.2e-3  # seconds of one adapter's
EXPERT = 1 / 3  # of a layer's small kernels, for each expert that is run alone: a dozen, one of which waits
WELDED = 0.4  # of what is moved and launched, where kernels are fused
UNPACK = 10  # bytes moved to unpack a weight of few bits: it is read, written in 16 bits and read, at half the rate
STEP = 12  # reads and writes of a trained parameter that AdamW takes, kernel by kernel
LINKED, BETWEEN = 0.75, 0.5  # share of a link's rate that is reached; what of it nodes have between them
AGAIN = {"none": 0.0, "selective": 0.5, "full": 1.0}  # of the forward pass's matrices, computed once more
PARTS = ("matrices", "attention", "moves", "launches", "exchange", "traffic")


class Pass(NamedTuple):
    """Seconds of one forward and backward pass on one card, by what they grow with."""

    matrices: float
    attention: float
    moves: float  # of activations and logits, by kernels that compute little
    launches: float  # and what passes must read and write of weights and gradients, however few the tokens
    exchange: float  # with other cards
    traffic: float  # unpacking weights of few bits, and the optimiser's step

    @property
    def total(self) -> float:
        """Seconds of the pass."""
        return sum(self)

    def shares(self) -> tuple[float, ...]:
        """How much of the total each part makes."""
        return tuple(part / self.total for part in self)

    def times(self, factors: Sequence[float]) -> Pass:
        """The same pass with each part longer by a factor."""
        return Pass(*(part * factor for part, factor in zip(self, factors, strict=True)))


def one_pass(job: Job) -> Pass:
    """Seconds of one forward and backward pass. Raises NotFoundError for a card that is not known."""
    card, again = gpu(job.gpu or ""), AGAIN[job.checkpointing]
    rate = reached(card, job.dtype)
    tokens = _waits(job) * job.mean_tokens / job.spread.sample  # as many as would take as long without waiting
    welded = WELDED if job.compile or any(word in job.framework.lower() for word in FUSED) else 1.0
    layers = job.shape.layers + job.shape.encoder_layers
    kept = layers * memory.layer_bytes(job) * (1 + again / 3) + max(memory.head_bytes(job), 0.0)
    return Pass(
        matrices=tokens * _operations(job, again) / rate,
        attention=tokens * _of_scores(job) / reached(card, _in_16(job.dtype)) / ATTENTION,
        moves=tokens * kept * MOVED * welded / card.bandwidth_bytes_s,
        launches=_launches(job, again) * welded + _weights(job, again) / card.bandwidth_bytes_s,
        exchange=_exchange(job, card, again),
        traffic=_traffic(job, again) / card.bandwidth_bytes_s,
    )


def reached(card: Gpu, dtype: str) -> float:
    """FLOP/s that products of large matrices reach; the most where the card's power is not known."""
    rate = card.peak(_in_16(dtype)) / 1e12
    share = min(REACHED, PER_WATT * (card.power_w / rate) ** 0.5) if card.power_w else REACHED
    return card.peak(dtype) * share * (FP8 if dtype == "fp8" else 1.0)


def _operations(job: Job, again: float) -> float:
    """Operations of a token's products of matrices, those of narrow experts counted by the time that they take."""
    shape = job.shape
    inner = shape.n_active - shape.n_embedding + (shape.vocab * shape.width if shape.tied else 0)
    if shape.experts:
        each = shape.experts_per_token * (2 + shape.gated) * shape.width
        inner += shape.mixture_layers * each * NARROW  # expert_ffn * (1 + NARROW / expert_ffn)
    return 2.0 * inner * ((3 if job.method == "full" else 2) + again)


def _of_scores(job: Job) -> float:
    """Operations of a token's attention; half of the square is masked."""
    shape, length = job.shape, job.mean_tokens / job.micro_batch
    scores = 2.0 * length * shape.heads * shape.head_dim * shape.layers
    return scores * (3.5 + (job.checkpointing == "full")) * (3 if memory.score_bytes(job) else 1)


def _in_16(dtype: str) -> str:
    """The type of what jobs in 8 bits leave in 16, attention above all."""
    return "bf16" if dtype == "fp8" else dtype


def _waits(job: Job) -> float:
    """How much longer a pipeline takes because its stages wait for the first and the last pass of a step.

    One whose stages are interleaved has them in halves. A step of one pass is split into as many as there are stages.
    """
    stages = job.spread.pipeline
    passes = max(job.grad_accum, min(job.micro_batch, stages))
    return 1 + (stages - 1) / passes / (2 if "interleav" in job.sharding.lower() else 1)


def _launches(job: Job, again: float) -> float:
    """Seconds of kernels that are so small that each takes as long as any."""
    shape = job.shape
    layers = shape.layers + shape.encoder_layers
    adapters = 0.0 if job.method == "full" else layers * sum(adapter.used for adapter in memory.adapted(job))
    if job.expert_loop:
        layers += shape.mixture_layers * shape.experts * EXPERT
    return (LAUNCH_S * layers + ADAPTER_S * adapters) * (1 + again / 2) / job.spread.pipeline


def _weights(job: Job, again: float) -> float:
    """Bytes of weights that a pass reads, casts to 16 bits, and adds gradients to."""
    shape, wide = job.shape, job.dtype == "fp32"
    moved = shape.n_active * job.weight_bits / 8 * (2 if wide else 1) * (2 + again)
    if job.method == "full":  # a gradient is written, and added to the one before
        moved += shape.n_params * (3 * (4 if wide or job.master else 2) + (6 * (1 + again) if job.autocast else 0))
    return moved / job.spread.sample


def _exchange(job: Job, card: Gpu, again: float) -> float:
    """Seconds of gathering shards of weights, spreading gradients, and joining the parts of hidden states, a pass."""
    if job.gpus == 1:
        return 0.0
    shape, spread = job.shape, job.spread
    link = LINKED * card.link_bytes_s
    experts = shape.mixture_layers * shape.experts * (2 + shape.gated) * shape.width * shape.expert_ffn
    sent = 2.0 * (shape.n_params - experts * (1 - 1 / spread.expert)) / (spread.tensor * spread.pipeline)
    if spread.gathers:
        rounds = 3.0 if job.method == "full" else 2.0
    else:
        rounds = 2.0 / job.grad_accum if job.method == "full" else 0.0
    seconds = sent * rounds / (link if job.gpus <= NODE else BETWEEN * link)
    if (ways := spread.tensor) > 1:  # all-reduced twice a layer in each direction, and once more where computed anew
        hidden = 2.0 * job.mean_tokens * shape.width * shape.layers / spread.pipeline / spread.context
        seconds += _waits(job) * (4 + 2 * again) * 2 * hidden * (ways - 1) / ways / link
    return seconds


def _traffic(job: Job, again: float) -> float:
    """Bytes that unpacking weights of few bits and the optimiser's step move."""
    unpacked = job.shape.n_params * UNPACK * (2 + again) if job.weight_bits < 16 else 0.0
    wide = job.master or job.dtype == "fp32" if job.method == "full" else memory.adapter_bytes(job) == 4
    stepped = memory.trained_params(job) / job.spread.states * STEP * (4 if wide else 2) / job.grad_accum
    return unpacked + stepped
