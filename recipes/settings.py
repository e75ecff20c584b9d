"""The settings of the fine-tuning recipes: what they may be, and how a batch is divided."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from lora_models import check_targets

from trainer import job
from trainer.job import UserError

# Settings that a resumed run may change: they do not reach the weights but by rounding.
FREE = {
    "activation_checkpointing",
    "device",
    "guard_steps",
    "log_every_n_steps",
    "micro_batch_size",
    "run_val_every_n_steps",
    "save_every_n_steps",
    "shard_model",
    "val_split",
}
# What recipes without validation, or for one device, leave out.
LEFT_OUT = {"val_split": None, "run_val_every_n_steps": None, "shard_model": False}


def checked(config: SimpleNamespace) -> SimpleNamespace:
    """The settings with all that was left open filled in. Raises UserError for what cannot be trained with."""
    config = SimpleNamespace(**LEFT_OUT | vars(config))
    counts = ["lora_rank", "batch_size", "micro_batch_size", "max_seq_len", "epochs", "max_steps"]
    counts += ["log_every_n_steps", "save_every_n_steps", "run_val_every_n_steps"]
    job.check_numbers(config, counts, int, 1)
    job.check_numbers(config, ["seed", "warmup_steps", "guard_steps"], int, 0)
    job.check_numbers(config, ["lora_alpha", "lora_dropout", "lr", "weight_decay", "clip_grad_norm"], float, 0)
    job.check_choice(config, "dtype", ["bf16", "fp32"])
    job.check_choice(config, "lr_schedule", ["cosine", "constant"])
    check_targets(config.lora_targets)
    if config.lora_dropout >= 1:
        raise UserError(f"lora_dropout is {config.lora_dropout}: give a number of at least 0 and below 1")
    if config.run_val_every_n_steps and config.val_split is None:
        raise UserError("run_val_every_n_steps is given and val_split is null: name the split to validate on")
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return SimpleNamespace(**vars(config) | {"lora_alpha": alpha})


class MicroBatch(NamedTuple):
    """Samples, or packs, of a process's forward pass."""

    size: int
    asked: int  # what the settings say
    deviation: dict[str, Any] | None  # why it is another
    choices: list[int]  # what it may be: all that divides a process's part of the batch

    @property
    def smaller(self) -> int | None:
        """The largest choice of at most half; None where there is none."""
        return max((n for n in self.choices if 2 * n <= self.size), default=None)


def micro_batch(config: SimpleNamespace, world_size: int, out: Path) -> MicroBatch:
    """As the settings say, or as `deviation.json` does, which an attempt left that ran out of memory.

    Raises UserError for a size that does not divide the batch, and for a deviation to a larger one.
    """
    each, left_over = divmod(config.batch_size, world_size)
    if left_over:
        raise UserError(f"batch_size {config.batch_size} cannot be divided by {world_size} processes: choose another")
    asked = config.micro_batch_size or each
    choices = [n for n in range(1, each + 1) if each % n == 0]
    if asked not in choices:
        whole = f"batch_size {each}" if world_size == 1 else f"the {each} of batch_size {config.batch_size} for each of"
        processes = "" if world_size == 1 else f" {world_size} processes"
        raise UserError(
            f"micro_batch_size {asked} does not divide {whole}{processes}: take {', '.join(map(str, choices))}"
        )
    file = out / "deviation.json"
    if not file.is_file():
        return MicroBatch(asked, asked, None, choices)
    try:
        deviation = json.loads(file.read_text(encoding="utf-8"))
        size = deviation["micro_batch_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} names no micro_batch_size: remove it") from error
    if size not in choices or size > asked:
        raise UserError(
            f"{file} says micro_batch_size {size!r}, the settings {asked}: remove it, or let it name one of "
            f"{', '.join(str(n) for n in choices if n <= asked)}"
        )
    return MicroBatch(size, asked, deviation, choices)
