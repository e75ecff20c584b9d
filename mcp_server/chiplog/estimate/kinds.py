"""How architectures and programs write a layer otherwise than Llama's: what it keeps for its backward pass."""

from __future__ import annotations

from typing import NamedTuple

from chiplog.estimate.job import Job, style


class Kind(NamedTuple):
    """What a layer of an architecture keeps otherwise than Llama's, in bytes a value."""

    norms: int = 2  # inputs that are normed; two norms of one input count once
    norm: int = 4  # of a norm's input: in fp32 for RMS norms, in 16 bits for layer norms
    scale: int = 2  # more of it where the norm's weight is trained
    qk_norm: int = 0  # as scale, where queries and keys are normed too
    act: tuple[int, int] = (2, 6)  # of the MLP's width: plain, gated
    down: int = 2  # of the MLP's width where its last matrix reads it for its own gradient
    more: int = 0  # of the width: masks of dropout after attention and MLP, or the gate of a shared expert
    logit: int = 0  # of a logit, more than others: a soft cap keeps its own, T5 takes the loss in 16 bits
    fused: bool = False  # values are a view of queries, keys and values, which all stay
    copies: bool = False  # what attention gives is copied before its output layer
    scores: int = 0  # of a score, where no fused kernel can be used


LAYER_NORM = Kind(norm=2, scale=0)
KINDS = {
    "apertus": Kind(qk_norm=2, act=(7, 0), down=4),
    "bloom": LAYER_NORM._replace(scores=6),
    "falcon": LAYER_NORM._replace(norms=1),  # but in the first, whose heads all have keys of their own
    "gemma": Kind(scale=4),
    "gemma2": Kind(norms=4, scale=4, scores=8, logit=2),
    "gemma3": Kind(norms=4, scale=4, qk_norm=4),
    "gemma3_text": Kind(norms=4, scale=4, qk_norm=4),
    "gpt2": LAYER_NORM._replace(act=(8, 0), more=2),  # its GELU is written out in Python
    "gpt_bigcode": LAYER_NORM._replace(more=2),
    "gpt_neox": LAYER_NORM._replace(norms=1, fused=True, copies=True),
    "mpt": LAYER_NORM._replace(scores=6),
    "mt5": Kind(norm=6, act=(3, 13), more=2, logit=-6),
    "olmo": Kind(scale=0),
    "olmo2": Kind(scale=4, qk_norm=4),
    "olmo3": Kind(scale=4, qk_norm=4),
    "olmoe": Kind(qk_norm=2),
    "opt": LAYER_NORM._replace(more=2, down=0),  # ReLU keeps what it gives
    "phi": LAYER_NORM._replace(act=(8, 0), copies=True),
    "phi3": Kind(fused=True, copies=True),
    "qwen2_moe": Kind(more=2),
    "qwen3": Kind(qk_norm=2),
    "qwen3_moe": Kind(qk_norm=2),
    "seed_oss": Kind(more=2),
    "stablelm": LAYER_NORM._replace(copies=True),
    "starcoder2": LAYER_NORM,
    "t5": Kind(norm=6, act=(3, 13), more=2, logit=-6),
}
# Programs whose norms, gates and loss are kernels of their own, which keep what they read alone (Transformer Engine).
KERNELS = ("nemo", "megatron")
ONE_MATRIX = {
    "bloom",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "mpt",
    "phi3",
}  # queries, keys and values by one matrix


def kind_of(job: Job) -> Kind:
    """How the framework's code writes the architecture; torchtune and LitGPT write all on one pattern."""
    kind = KINDS.get(job.shape.family, Kind())
    if job.shape.family == "falcon" and job.shape.kv_heads == job.shape.heads:
        kind = kind._replace(norms=2)
    if own_code(job):  # RMS norms that scale in fp32, no dropout, queries, keys and values apart
        plain, scale = Kind(), 4 if kind.norm == 4 else kind.scale
        if has_kernels(job):
            plain, scale = Kind(act=(2, 4)), 0
        logit = kind.logit if style(job.framework) == "litgpt" else 0  # torchtune caps the hidden state instead
        kind = kind._replace(
            norm=2 if has_kernels(job) else kind.norm,
            scale=scale,
            qk_norm=kind.qk_norm and 4,
            act=plain.act,
            down=plain.down,
            more=0,
            logit=logit,
            fused=False,
            copies=False,
            scores=0,
        )
    if job.upcast or job.autocast:  # the stream in fp32, matrices in 16 bits
        kind = kind._replace(norm=4, scale=4 if kind.scale else 0)
    if job.upcast:  # 4-bit layers give fp32, of which attention takes copies in 16 bits
        kind = kind._replace(act=(2 * kind.act[0], 2 * kind.act[1]), fused=False)
    if job.dtype == "fp32":  # which norms need not copy; everything else is twice as large
        kind = kind._replace(norm=2, scale=min(kind.scale, 2))
    return kind


def has_kernels(job: Job) -> bool:
    """Whether norms, gates and loss are kernels of the program's own."""
    return any(name in job.framework.lower() for name in KERNELS)


def own_code(job: Job) -> bool:
    """Whether the program has model code of its own, and not transformers'."""
    return style(job.framework) in ("torchtune", "litgpt", "own")
