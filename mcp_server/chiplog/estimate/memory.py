"""What a job holds on a card, from its shape alone: bytes in closed form.

The terms are those of an eager training step in PyTorch: weights, gradients and states of what is trained, activations
kept for the backward pass, and the output layer with its loss. Bytes a token and layer come from traces of one step on
meta tensors (`python -m benchmarks.memory_trace`), and equal them within a tenth of a per cent, but where experts are
chosen: the router is left out. Four moments can be the peak: the loss, the first and the last layer of the backward
pass, and the optimiser's step.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from chiplog.estimate.job import ALL_LINEAR, Job, style
from chiplog.estimate.kinds import ONE_MATRIX, has_kernels, kind_of, own_code
from chiplog.estimate.shapes import Shape

GIB = 2**30
# What a process holds beside its tensors, and what an allocator holds beside what is asked of it, by kind of figure.
CONTEXT = {"allocated": 0.05 * GIB, "reserved": 0.4 * GIB, "card": 0.9 * GIB}
SLACK = {"allocated": 1.0, "reserved": 1.05, "card": 1.06}
COMPILED = 0.75  # of the activations of eager code
# Of the activations: every second product of matrices, what attention gives and the layer's input, as torchtitan keeps.
SELECTIVE = 0.3
ROPE = 131072  # positions of which torchtune keeps sines and cosines in fp32 for Llama 3
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
    shape, spread, tokens = job.shape, job.spread, job.tokens / job.spread.sample
    held = _bytes_trained(job, trained_params(job))
    weights = at_start(job) + _gathered(job)
    states = held["states"] * _share(job, spread.states)
    gradients = 0.0 if job.in_backward else held["gradient"] * _share(job, spread.gradients)
    scratch = held["scratch"] * _share(job, spread.states)
    layer = layer_bytes(job) * tokens * (COMPILED if job.compile else 1.0)
    # More of an input that tensor parallelism gathers; Megatron gathers it anew.
    whole = 0.0 if has_kernels(job) else (spread.tensor - 1) * 2 * shape.width * tokens
    layer += 2 * whole
    kept = stream_bytes(job) * tokens
    head = head_bytes(job) * tokens + 2 * whole  # and of its gradient
    layers = shape.layers + shape.encoder_layers
    kept_all = layers * {"none": layer, "selective": SELECTIVE * layer, "full": kept}[job.checkpointing]
    if job.offload:  # all but what is on its way to the host and back
        kept_all = min(kept_all, 2 * (layer if job.checkpointing == "none" else kept))
    again = layer if job.checkpointing != "none" else 0.0
    of_head = 0.0  # the gradient of the output matrix, the first that there is
    if job.method == "full":
        of_head = shape.vocab * shape.width / shape.n_params * held["gradient"] / spread.gradients
    by_chunk = job.loss == "cut" or (job.loss == "chunked" and job.compile)
    if _hands_over_late(job) and not job.in_backward:
        gradients = held["gradient"] * _share(job, spread.tensor * spread.pipeline)
    before = gradients if job.grad_accum > 1 or spread.pipeline > 1 else 0.0  # of the step's earlier passes
    context, slack = CONTEXT[job.memory_kind], SLACK[job.memory_kind]
    raw = {
        "loss": (weights, states + max(before, of_head * by_chunk), kept_all, head),
        "first of backward": (weights, states + max(before, of_head * (not job.in_backward)), kept_all + again, 0.0),
        "last of backward": (weights, states + gradients, (kept if again else 0.0) + layer, 0.0),
        "step": (weights, states + gradients + scratch, 0.0, 0.0),
    }
    return {name: Parts(w * slack + context, s * slack, a * slack, h * slack) for name, (w, s, a, h) in raw.items()}


def at_start(job: Job) -> float:
    """Bytes of the weights as they lie on one card before the first step: "memory after model init", and no peak."""
    trained = _adapters(job, trained_params(job)) * _share(job, min(job.spread.weights, job.spread.states))
    return _weights(job) * _share(job, job.spread.weights) + trained + _rope(job)


def peak(job: Job) -> Parts:
    """Bytes on one card when most is held."""
    return max(moments(job).values(), key=lambda parts: parts.total)


def trained_params(job: Job) -> int:
    """Parameters that are trained."""
    shape = job.shape
    if job.method == "full":
        return shape.n_params
    each = sum(a.held * (job.rank * (a.ins + a.outs) + job.dora * a.outs) for a in adapted(job))
    total = round(each * (shape.layers + shape.encoder_layers))
    if "head" in job.targets:
        total += job.rank * (shape.width + shape.vocab) + job.dora * shape.vocab
    return total + (shape.n_embedding + shape.n_head if "embedding" in job.targets else 0)


def layer_bytes(job: Job) -> float:
    """Bytes that one layer keeps of a token for its backward pass, in 16-bit types; a mean over the layers."""
    shape, kind, full = job.shape, kind_of(job), job.method == "full"
    width, q, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ffn, routed, crossed = _active_ffn(shape), _routed(shape), _crossed(shape)
    # Under autocast each matrix reads a 16-bit copy of its own; else one input is kept, once for all that read it.
    copied = 2 if job.upcast or job.autocast else adapter_bytes(job)
    casts = not full and (job.dropout or adapter_bytes(job) == 4)
    read: frozenset[str] = ALL_LINEAR if full else frozenset() if casts else job.targets
    own = 2 * width if full and job.autocast else 0

    per_norm = kind.norm + (kind.scale if full else 0)
    kept = ((1 if shape.parallel else kind.norms) + crossed) * per_norm * width
    kept += (4 + (kind.qk_norm if full else 0)) * (q + kv) if kind.qk_norm else 0
    kept += kind.more * (1 + crossed / 2) * width

    if scores := score_bytes(job):  # keys and values of every query head; what comes out is not kept
        attention = 6 * q + scores * shape.heads * job.seq_len
    else:
        attention = 4 * q + 4 * (kv + _widened(job) * (q - kv)) + 4 * shape.heads
    attention += 2 * (q + kv) if kind.fused else 0
    attention += 2 * q if "o" in read and (scores or kind.copies) else 0
    attention += 2 * width if read & {"q", "k", "v"} else 0
    attention += 0 if shape.family in ONE_MATRIX else 2 * own
    kept += (1 + crossed) * attention

    kept += kind.act[shape.gated] * ffn + 2 * routed * width
    if "mlp" in read:
        kept += kind.down * ffn + 2 * routed * width
        kept += 0 if shape.parallel and "q" in read and not own else 2 * width
        kept += own if shape.gated and shape.family not in ONE_MATRIX else 0
    if not full:
        adapters = adapted(job)
        kept += (copied + job.dropout) * sum(a.used * a.ins for a in adapters) if casts else 0
        kept += copied * job.rank * sum(a.used for a in adapters)
        # What magnitudes scale: what the layer gives, and what its adapter does.
        kept += job.dora * (2 + copied) * sum(a.used * a.outs for a in adapters)
    if job.dtype == "fp32":
        kept *= 2
    return kept


def score_bytes(job: Job) -> int:
    """Bytes that attention keeps of the score of two tokens in a head; none in one kernel."""
    usual = kind_of(job).scores
    return {"usual": usual, "flash": 0, "eager": usual or 6}[job.attention]


def stream_bytes(job: Job) -> float:
    """Bytes of a token's hidden state between two layers."""
    return (4 if job.upcast or job.autocast or job.dtype == "fp32" else 2) * job.shape.width


def head_bytes(job: Job) -> float:
    """Bytes that the logits and the loss hold of a token at most, and the last norm.

    A plain loss holds three copies of the logits in fp32 when its gradient is taken: the softmax, what comes in and
    what goes out.
    """
    shape, kind, full = job.shape, kind_of(job), job.method == "full"
    code = style(job.framework)
    if job.loss == "plain":
        logit = {"litgpt": 6.0, "unsloth": 8.0}.get(code, 8.0 if has_kernels(job) else 12.0) + kind.logit
        logit *= COMPILED if job.compile and code != "own" else 1  # programs of their own compile layers alone
    elif job.loss == "cut":  # a chunk of logits about as large as the hidden state, and the gradient of that
        return 4.0 * shape.width + (kind.norm + kind.scale * full) * shape.width
    elif job.loss == "fused":
        logit = 4.0 if code == "own" else 8.0  # FlashAttention's kernel: logits and their gradient in 16 bits
    else:
        logit = 2.25 if job.compile else 6.5  # compiled, no fp32 copies, and a chunk's gradient takes its place
    if full:
        beside = (kind.norm + kind.scale + 2) * shape.width
    elif job.checkpointing == "full":
        beside = kind.norm * shape.width
    else:
        # No gradient comes to the embedding: the first norm keeps nothing, which makes up for the last, nor a mask.
        beside = -job.dropout * sum(a.used * a.ins for a in adapted(job) if a.reads == "normed")
    return logit * shape.vocab + beside


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
        return (inner + outer) * (4 if job.dtype == "fp32" or (job.master and not _apart(job)) else 2)
    return inner * (FOUR_BIT if job.weight_bits == 4 else 1.0) + outer * (4 if job.upcast else 2)


def _apart(job: Job) -> bool:
    """Whether the optimiser keeps the fp32 weights beside those in 16 bits that layers read."""
    return job.method == "full" and job.master and not (job.autocast or job.spread.gathers)


def _rope(job: Job) -> float:
    """Bytes of torchtune's table of rotary positions."""
    llama_3 = job.shape.family == "llama" and job.shape.vocab == 128_256
    return 4.0 * ROPE * job.shape.head_dim if style(job.framework) == "torchtune" and llama_3 else 0.0


def _gathered(job: Job) -> float:
    """Bytes of weights that are gathered on every card: of two layers, and of what is outside of layers, in 16 bits."""
    shape, spread = job.shape, job.spread
    if not spread.gathers:
        return 0.0
    outer = shape.n_embedding + shape.n_head
    # Those of a pipeline's stage stay through the passes of a step.
    share = 1 / spread.pipeline if spread.pipeline > 1 else 2 / (shape.layers + shape.encoder_layers)
    wide = (FOUR_BIT if job.weight_bits == 4 else 1) if job.weight_bits < 16 else 4 if job.dtype == "fp32" else 2
    experts = _expert_share(job)
    inner = (shape.n_params - outer) * (1 - experts + _divided_again(job) * experts / spread.expert)
    return (inner * share * wide + 2 * outer) / spread.tensor


def _hands_over_late(job: Job) -> bool:
    """Whether each card holds gradients whole until the last pass of a step: FSDP does where it is told to wait for
    that, as Accelerate and Lightning do, and pipelines."""
    if not job.spread.gathers or re.search("zero|deepspeed", job.sharding.lower()):
        return False
    return job.spread.pipeline > 1 or (job.grad_accum > 1 and style(job.framework) in ("transformers", "litgpt"))


def _share(job: Job, over: int) -> float:
    """Share of the parameters that a card holds where those outside of experts are divided over so many cards."""
    experts, spread = _expert_share(job), job.spread
    apart = spread.expert * spread.tensor * spread.pipeline
    return (1 - experts) / over + experts / (max(over, apart) if _divided_again(job) else apart)


def _divided_again(job: Job) -> bool:
    """Whether data parallelism divides a card's experts too, as programs for pretraining do; others leave them out."""
    return style(job.framework) == "own"


def _expert_share(job: Job) -> float:
    """Share of the parameters that expert parallelism divides."""
    shape = job.shape
    if job.spread.expert == 1 or not shape.mixture_layers:
        return 0.0
    return shape.mixture_layers * shape.experts * (2 + shape.gated) * shape.width * shape.expert_ffn / shape.n_params


def _adapters(job: Job, trained: int) -> float:
    """Bytes of what is trained beside the frozen weights: PEFT trains copies of modules in 16 bits."""
    if job.method == "full":
        return 0.0
    copies = _modules(job)
    return (trained - copies) * adapter_bytes(job) + copies * 2


def _modules(job: Job) -> int:
    """Parameters of modules that are trained whole beside adapters."""
    return job.shape.n_embedding + job.shape.n_head if job.method != "full" and "embedding" in job.targets else 0


def _bytes_trained(job: Job, trained: int) -> dict[str, float]:
    """Bytes of all gradients, of the optimiser's states, and of its scratch while it steps."""
    full, modules = job.method == "full", _modules(job)
    size = (4 if job.master or job.dtype == "fp32" else 2) if full else adapter_bytes(job)
    gradient = (trained - modules) * size + modules * 2
    states = {"adamw": 2 * gradient, "adamw8bit": 2 * trained, "paged": 0, "sgd": 0}[job.optimizer]
    states += 4 * trained if _apart(job) else 0
    at_once = style(job.framework) not in ("torchtune", "own") and job.optimizer == "adamw" and not job.in_backward
    return {"gradient": gradient, "states": states, "scratch": gradient if at_once else 0}


def _widened(job: Job) -> float:
    """Share of the layers in which keys and values are repeated for every query head; those of one head never are.

    transformers does so where a mask keeps it from grouped heads: of padding, or of a window that is shorter.
    """
    shape = job.shape
    padded = job.micro_batch > 1 and not job.packed and job.mean_len is not None and job.mean_len < job.seq_len
    if shape.kv_heads == 1:
        return 0.0
    if own_code(job) or padded or shape.family == "falcon":
        return 1.0
    return shape.window_layers / shape.layers if shape.window and job.seq_len >= shape.window else 0.0


def _crossed(shape: Shape) -> float:
    """Share of the layers that attend to an encoder too."""
    return shape.layers / (shape.layers + shape.encoder_layers) if shape.encoder_layers else 0.0


def _routed(shape: Shape) -> float:
    """Experts that a token goes through in a mean layer."""
    return shape.mixture_layers * shape.experts_per_token / shape.layers


def _active_ffn(shape: Shape) -> float:
    """Width of all MLPs that a token goes through in a mean layer."""
    mixtures = shape.mixture_layers / shape.layers
    return _routed(shape) * shape.expert_ffn + mixtures * shape.shared_ffn + (1 - mixtures) * shape.ffn


class Adapter(NamedTuple):
    """Like adapters of a mean layer."""

    held: float  # how many there are
    used: float  # how many of them a token goes through
    ins: int
    outs: int
    reads: Literal["normed", "other"] = "other"  # of the first layer's norm, which keeps no gradient


def adapted(job: Job) -> list[Adapter]:
    """The adapters of a mean layer, but for the output layer's.

    transformers keeps a layer's experts in one tensor, which PEFT's adapters of linear layers pass over.
    """
    shape, own = job.shape, own_code(job)
    fused = shape.family in ONE_MATRIX and not own
    width, q, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    every = 1 + _crossed(shape)
    outs = [out for name, out in (("q", q), ("k", kv), ("v", kv)) if name in job.targets]
    if fused and outs:
        outs = [q + 2 * kv]
    found = [Adapter(every, every, width, out, "normed") for out in outs]
    if "o" in job.targets:
        found.append(Adapter(every, every, q, width))
    if "mlp" in job.targets:
        mixtures = shape.mixture_layers / shape.layers
        mlps = [(1 - mixtures, 1 - mixtures, shape.ffn), (mixtures, mixtures, shape.shared_ffn)]
        if own:
            mlps.append((mixtures * shape.experts, mixtures * shape.experts_per_token, shape.expert_ffn))
        ups, joined = (1, 1 + shape.gated) if fused else (1 + shape.gated, 1)
        for held, used, ffn in mlps:
            if held and ffn:
                found.append(Adapter(held * ups, used * ups, width, joined * ffn))
                found.append(Adapter(held, used, ffn, width))
    return found
