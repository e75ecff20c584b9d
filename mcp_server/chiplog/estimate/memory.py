"""What a job holds on a card, from its shape alone: bytes in closed form.

The terms are those of an eager training step in PyTorch: weights, gradients and states of what is trained, activations
kept for the backward pass, and the output layer with its loss. Bytes a token and layer come from traces of one step on
meta tensors (`benchmarks/memory_trace.py`), and equal them within a per cent. Three moments can be the peak: the loss,
the backward pass of a layer, and the optimiser's step.
"""

from __future__ import annotations

from typing import NamedTuple

from chiplog.estimate.job import Job, style

GIB = 2**30
# What a process holds beside its tensors, and what an allocator holds beside what is asked of it, by kind of figure.
CONTEXT = {"allocated": 0.05 * GIB, "reserved": 0.4 * GIB, "card": 0.9 * GIB}
SLACK = {"allocated": 1.0, "reserved": 1.05, "card": 1.06}
COMPILED = 0.75  # of the activations of eager code
FOUR_BIT = 0.54  # bytes a weight in blocks of 64, the scales quantised too
PARTS = ("weights", "states", "layers", "head")


class Parts(NamedTuple):
    """Bytes at one moment, by what they grow with."""

    weights: float  # frozen and trained weights, and the context
    states: float  # gradients and optimiser states
    layers: float  # activations kept of the layers
    head: float  # logits, their gradient and the loss

    @property
    def total(self) -> float:
        return sum(self)


def moments(job: Job) -> dict[str, Parts]:
    """Bytes on one card at each moment that can be the peak."""
    shape, tokens = job.shape, job.tokens / job.divided
    trained, per = trained_params(job), _bytes_trained(job)
    weights = (_weights(job) + _adapters(job, trained)) / job.shards
    states = trained * per["states"] / job.shards
    gradients = 0.0 if job.in_backward else trained * per["gradient"] / job.shards
    scratch = trained * per["scratch"] / job.shards
    layer = layer_bytes(job) * tokens * (COMPILED if job.compile else 1.0)
    kept = stream_bytes(job) * tokens
    head = head_bytes(job) * tokens * (COMPILED if job.compile and job.loss == "plain" else 1.0)
    layers = shape.layers + shape.encoder_layers
    if job.checkpointing == "full":
        kept_all = 0.0 if job.offload else kept * layers
        during = kept_all + layer
    else:
        share = 0.6 if job.checkpointing == "selective" else 1.0
        kept_all = layers * layer * share
        during = kept_all * 0.5
    context, slack = CONTEXT[job.memory_kind], SLACK[job.memory_kind]
    raw = {
        "loss": (weights, states, kept_all, head),
        "backward": (weights, states + gradients, during, 0.0),
        "step": (weights, states + gradients + scratch, 0.0, 0.0),
    }
    return {name: Parts(w * slack + context, s * slack, a * slack, h * slack) for name, (w, s, a, h) in raw.items()}


def peak(job: Job) -> Parts:
    """Bytes on one card when most is held."""
    return max(moments(job).values(), key=lambda parts: parts.total)


def trained_params(job: Job) -> int:
    """Parameters that are trained."""
    shape = job.shape
    if job.method == "full":
        return shape.n_params
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width, rank = shape.width, job.rank
    a_layer = 0
    for name, out in (("q", q), ("k", kv), ("v", kv)):
        a_layer += rank * (width + out) if name in job.targets else 0
    a_layer += rank * (q + width) if "o" in job.targets else 0
    total = a_layer * (shape.layers + shape.encoder_layers)
    if "mlp" in job.targets:
        matrices = 3 if shape.gated else 2
        dense = shape.layers + shape.encoder_layers - shape.mixture_layers
        total += dense * matrices * rank * (width + shape.ffn)
        total += shape.mixture_layers * matrices * rank * shape.experts * (width + shape.expert_ffn)
    if "head" in job.targets:
        total += rank * (width + shape.vocab)
    return total + (shape.n_embedding + shape.n_head if "embedding" in job.targets else 0)


def layer_bytes(job: Job) -> float:
    """Bytes that one layer keeps of a token for its backward pass, in 16-bit types."""
    shape, full, torchtune = job.shape, job.method == "full", style(job.framework) == "torchtune"
    width, kv = shape.width, shape.kv_heads * shape.head_dim
    q = shape.heads * shape.head_dim
    ffn = shape.ffn
    if shape.mixture_layers:
        active = shape.experts_per_token * shape.expert_ffn + shape.shared_ffn
        ffn = (shape.mixture_layers * active + (shape.layers - shape.mixture_layers) * shape.ffn) / shape.layers
    trains_mlp, trains_o = full or "mlp" in job.targets, full or "o" in job.targets
    kept = (9 if torchtune else 7) * (width + q) + (0 if torchtune else 4 * kv) + 4 * shape.heads
    kept += (6 if shape.gated else 2) * ffn + (2 * ffn + 2 * width if trains_mlp else 0) + (2 * q if trains_o else 0)
    if full:
        kept += (8 if torchtune else 4) * width
    if shape.parallel:
        kept -= 4 * width
    if job.upcast:
        kept *= 2
    if not full and job.dropout:
        kept += (7 if adapter_bytes(job) == 4 else 3) * _adapter_inputs(job, ffn)
    if job.attention == "eager":
        kept += 6 * shape.heads * job.seq_len
    return kept


def stream_bytes(job: Job) -> float:
    """Bytes of a token's hidden state between two layers."""
    return (4 if job.upcast else 2) * job.shape.width


def head_bytes(job: Job) -> float:
    """Bytes that the logits and the loss hold of a token at most."""
    of = {"plain": {"litgpt": 6.0, "unsloth": 8.0}.get(style(job.framework), 12.0), "fused": 8.0, "chunked": 6.5}
    return of[job.loss] * job.shape.vocab + 10 * job.shape.width


def adapter_bytes(job: Job) -> int:
    """Bytes of an adapter's weight: PEFT and what is built on it keep them in fp32."""
    return 2 if style(job.framework) in ("torchtune", "litgpt") or job.dtype == "fp32" else 4


def _weights(job: Job) -> float:
    """Bytes of all weights but adapters; 4-bit and 8-bit loading leaves embeddings and output layer in 16 bits."""
    shape = job.shape
    outer = shape.n_embedding + shape.n_head
    inner = shape.n_params - outer
    if shape.tied and style(job.framework) == "litgpt":  # it keeps an output matrix of its own
        outer += shape.vocab * shape.width
    if job.weight_bits == 16:
        return (inner + outer) * (4 if job.master or job.dtype == "fp32" else 2)
    return inner * (FOUR_BIT if job.weight_bits == 4 else 1.0) + outer * (4 if job.upcast else 2)


def _adapters(job: Job, trained: int) -> float:
    if job.method == "full":
        return 0.0
    own = trained - (job.shape.n_embedding + job.shape.n_head if "embedding" in job.targets else 0)
    return own * adapter_bytes(job)


def _bytes_trained(job: Job) -> dict[str, float]:
    """Bytes a trained parameter: its gradient, the optimiser's states, and scratch while it steps."""
    full = job.method == "full"
    size = (4 if job.master or job.dtype == "fp32" else 2) if full else adapter_bytes(job)
    states = {"adamw": 2 * size, "adamw8bit": 2, "paged": 0, "sgd": 0}[job.optimizer]
    at_once = style(job.framework) != "torchtune" and job.optimizer == "adamw" and not job.in_backward
    return {"gradient": size, "states": states, "scratch": size if at_once else 0}


def _adapter_inputs(job: Job, ffn: float) -> float:
    """Widths of what goes into the layers that have adapters, added up."""
    shape = job.shape
    inputs = sum(shape.width for name in ("q", "k", "v") if name in job.targets)
    inputs += shape.heads * shape.head_dim if "o" in job.targets else 0
    return inputs + ((2 if shape.gated else 1) * shape.width + ffn if "mlp" in job.targets else 0)
