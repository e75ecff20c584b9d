"""The settings of train.yaml: what they may be."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from trainer import job
from trainer.conflicts import conflict
from trainer.job import UserError

# What a run that goes on may change: it reaches the weights by rounding and the masks of dropout alone, or it is what
# going on changes.
FREE = {
    "dataset", "device", "compile", "keep_checkpoints", "log_every_n_steps", "max_steps", "micro_batch_size",
    "run_val_every_n_steps", "save_every_n_steps", "guard_steps", "overfit_steps", "max_epochs",
}  # fmt: skip
WITHOUT_END = ("constant", "inverse_sqrt")  # schedules that do not depend on max_steps


def checked(config: SimpleNamespace) -> SimpleNamespace:
    """The settings, if a model can be trained with them. Raises UserError."""
    counts = ["width", "depth", "heads", "base_width", "base_depth", "base_heads", "seq_len", "max_steps"]
    counts += ["batch_size", "micro_batch_size", "val_tokens", "run_val_every_n_steps", "save_every_n_steps"]
    counts += ["log_every_n_steps", "keep_checkpoints"]
    job.check_numbers(config, counts, int, 1)
    job.check_numbers(config, ["seed", "warmup_steps", "guard_steps", "overfit_steps"], int, 0)
    numbers = ["ffn_ratio", "dropout", "init_std", "lr", "final_lr", "beta1", "beta2", "eps", "momentum", "max_epochs"]
    job.check_numbers(config, [*numbers, "weight_decay", "clip_grad_norm"], float, 0)
    job.check_numbers(config, ["forget_bias"], float, -100)
    if zero := [key for key in ("lr", "init_std") if getattr(config, key) == 0]:
        raise UserError(f"{zero[0]} is 0: give a number above 0")
    for key, choices in {
        "parametrization": ("standard", "mup", "completep"), "init": ("fan_in", "gpt2", "xavier"),
        "optimizer": ("adamw", "adam", "sgd"), "lr_schedule": ("cosine", "linear", "inverse_sqrt", "constant"),
        "dtype": ("fp32", "bf16", "fp16"),
    }.items():  # fmt: skip
        job.check_choice(config, key, choices)
    if wrong := conflict(vars(config)):
        raise UserError(wrong)
    std = {"lstm": 0.2}.get(config.architecture, 0.02) if config.init_std is None else config.init_std
    return SimpleNamespace(**vars(config) | {"init_std": std})


def identity(config: SimpleNamespace) -> dict[str, Any]:
    """The settings that a run which goes on must have in common with what it goes on from."""
    free = FREE if config.lr_schedule in WITHOUT_END else FREE - {"max_steps"}
    return {key: value for key, value in vars(config).items() if key not in free}


def check_same(identity: Mapping[str, Any], made: Mapping[str, Any], what: object, instead: str) -> None:
    """Raises UserError, which ends with `instead`, where `what` was `made` with other settings."""
    changed = [key for key, value in identity.items() if made.get(key) != value]
    if changed:
        why = " (a learning rate that falls towards max_steps cannot be extended)" if "max_steps" in changed else ""
        raise UserError(f"{what} was made with another {', '.join(changed)}{why}: put it back, or {instead}")
