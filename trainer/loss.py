"""The cross-entropy of logits that are never all in memory: a readout and its loss, a block of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 25  # logits at once, 128 MiB in float32: of 50,257 words, 667 tokens


def readout_loss(hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float = 1.0) -> Tensor:
    """The sum over all tokens of the cross-entropy, in nats, of the logits `multiplier * hidden @ weight.T`.

    `hidden` "token width", `weight` "vocab width", `targets` "token" of int64. The gradients come with the forward
    pass, so that each block of logits is made once and dropped: three matrix products instead of four, and no
    memory of vocab x tokens.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ReadoutLoss.apply(hidden, weight, targets, multiplier)  # pyright: ignore[reportReturnType]
    blocks = _blocks(hidden, weight)
    losses = [_block_loss(hidden[rows], weight, targets[rows], multiplier)[0] for rows in blocks]
    return torch.stack(losses).sum()


class _ReadoutLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float) -> Tensor:
        kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        used = weight.to(kind) if kind else weight
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight)
        for rows in _blocks(hidden, weight):
            part = hidden[rows].to(used.dtype)
            loss, logits = _block_loss(part, used, targets[rows], multiplier)
            total += loss
            gradient = logits.to(used.dtype)  # by now that of the loss by the logits
            to_hidden[rows] = gradient @ used
            if to_weight.dtype == used.dtype:
                to_weight.addmm_(gradient.T, part)
            else:
                to_weight += gradient.T @ part
        ctx.save_for_backward(to_hidden, to_weight)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * gradient, to_weight * gradient, None, None


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, BLOCK // weight.shape[0])
    return [slice(first, first + size) for first in range(0, hidden.shape[0], size)]


def _block_loss(hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
    """The summed loss of a block of tokens, and its gradient by `hidden @ weight.T`, in float32."""
    logits = (hidden @ weight.T).float()
    if multiplier != 1.0:
        logits *= multiplier
    right = logits.gather(1, targets[:, None]).squeeze(1)
    top = logits.amax(1, keepdim=True)
    logits.sub_(top).exp_()
    sums = logits.sum(1, keepdim=True)
    loss = (sums.log() + top).squeeze(1) - right
    logits.div_(sums)
    logits[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    if multiplier != 1.0:
        logits *= multiplier
    return loss.sum(), logits
