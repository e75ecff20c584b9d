"""The cross-entropy of logits that are never all in memory: a readout and its loss, a block of tokens at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 1 << 24  # logits at once, 64 MiB in float32: of 50,257 words, 333 tokens


def readout_loss(hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float = 1.0) -> Tensor:
    """The sum over all tokens of the cross-entropy, in nats, of the logits `multiplier * hidden @ weight.T`.

    `hidden` "token width", `weight` "vocab width", `targets` "token" of int64. The gradients come with the forward
    pass, so that each block of logits is made once and dropped: three matrix products instead of four, and no
    memory of vocab x tokens. A second backward pass through it is a RuntimeError of torch's.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ReadoutLoss.apply(hidden, weight, targets, multiplier)  # pyright: ignore[reportReturnType]
    return _by_blocks(hidden, weight, targets, multiplier)


class _ReadoutLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float) -> Tensor:
        gradients = torch.empty_like(hidden), torch.empty_like(weight)
        loss = _by_blocks(hidden, weight, targets, multiplier, gradients)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden.mul_(gradient), to_weight.mul_(gradient), None, None


def _by_blocks(
    hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float, gradients: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The loss; into `gradients` those by `hidden` and `weight`, which need hold nothing yet.

    The logits of all blocks take the same memory: on a CPU memory that is new costs a page fault every 4 KiB.
    """
    kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    used, n = weight.to(kind or weight.dtype), len(hidden)
    size = math.ceil(n / math.ceil(n * len(weight) / BLOCK))  # all blocks alike, none a small rest
    memory = used.new_empty(size, len(weight))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for first in range(0, n, size):
        rows = slice(first, first + size)
        part = hidden[rows].to(used.dtype)
        logits = torch.mm(part, used.T, out=memory[: len(part)]).float()
        total += _softmaxed(logits, targets[rows], multiplier)
        if gradients is None:
            continue
        to_hidden, to_weight = gradients
        logits[torch.arange(len(part), device=part.device), targets[rows]] -= 1.0
        if multiplier != 1.0:
            logits *= multiplier
        gradient = logits.to(used.dtype)
        to_hidden[rows] = gradient @ used
        if to_weight.dtype == used.dtype:
            to_weight.addmm_(gradient.T, part, beta=min(first, 1))
        elif first == 0:
            to_weight.copy_(gradient.T @ part)
        else:
            to_weight += gradient.T @ part
    return total


def _softmaxed(logits: Tensor, targets: Tensor, multiplier: float) -> Tensor:
    """The summed loss of a block of tokens, whose logits become probabilities."""
    if multiplier != 1.0:
        logits *= multiplier
    right = logits.gather(1, targets[:, None]).squeeze(1)
    top = logits.amax(1, keepdim=True)
    logits.sub_(top).exp_()
    sums = logits.sum(1, keepdim=True)
    logits.div_(sums)
    return ((sums.log() + top).squeeze(1) - right).sum()
