"""The settings of the fine-tuning recipes: what they may be."""

from __future__ import annotations

from types import SimpleNamespace

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
