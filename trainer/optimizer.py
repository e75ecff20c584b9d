"""The optimizer of a model, a group for each rule of its parametrisation, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import nn

from trainer.layers import tagged
from trainer.parametrization import Parametrization


def make_optimizer(model: nn.Module, config: SimpleNamespace) -> torch.optim.Optimizer:
    """Every parameter in exactly one group, with what its role says of lr, weight decay and eps.

    Each group keeps its learning rate before warm-up and decay as `base_lr`. Biases, gains and positions do not decay.
    """
    rules: Parametrization = model.rules  # pyright: ignore[reportAssignmentType]
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = defaultdict(list)
    for _, parameter, tag in tagged(model):
        lr = config.lr * rules.lr(tag.role, "sgd" if config.optimizer == "sgd" else "adam")
        by_role = rules.weight_decay(tag.role, decoupled=config.optimizer == "adamw")
        decay = 0.0 if tag.role == "vector" else config.weight_decay * by_role
        groups[lr, decay, config.eps * rules.eps(tag.in_block)].append(parameter)
    rows = [
        {"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay, "eps": eps}
        for (lr, decay, eps), params in groups.items()
    ]
    if config.optimizer == "sgd":
        for row in rows:
            del row["eps"]
        # Where the scaler of fp16 skips the first step, the fused one begins with a momentum that nobody wrote.
        fused = config.dtype != "fp16"
        return torch.optim.SGD(rows, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(rows, betas=(config.beta1, config.beta2), fused=True)


def schedule(config: SimpleNamespace, step: int) -> float:
    """The share of the learning rate that the step after `step` steps takes: a linear rise, then the schedule.

    inverse_sqrt is 1 at the end of the warm-up and falls with the square root of the steps (arXiv:1706.03762).
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.lr_schedule == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / max(step, 1))
    done = (step - warmup) / max(config.max_steps - 1 - warmup, 1)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))), "linear": 1 - min(done, 1.0)}
    return config.final_lr + (1 - config.final_lr) * left[config.lr_schedule] if config.lr_schedule in left else 1.0
