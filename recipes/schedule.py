"""The learning rate over the steps of a run."""

from __future__ import annotations

from types import SimpleNamespace

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup


def make_schedule(optimizer: Optimizer, config: SimpleNamespace, total_steps: int, step: int) -> LambdaLR:
    """The learning rate after `step` steps and on: a rise over warmup_steps, then a cosine to 0 or constant."""
    if config.lr_schedule == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, total_steps, last_epoch=step - 1)
    rise = config.warmup_steps
    return LambdaLR(optimizer, lambda done: done / rise if done < rise else 1.0, last_epoch=step - 1)
