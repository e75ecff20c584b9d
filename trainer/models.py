"""The model that settings describe, by its name: the one place where a new kind of model is added."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from trainer import job
from trainer.job import UserError
from trainer.language import LanguageModel
from trainer.layers import initialize
from trainer.lstm import LSTM
from trainer.parametrization import Parametrization
from trainer.shape import ShapeError, default_heads, make_shape
from trainer.transformer import Transformer


def make(config: SimpleNamespace, vocab_size: int, device: torch.device | str = "cpu") -> LanguageModel:
    """The model with its first values, which follow from the seed on every device.

    Raises UserError as `build` does, and where memory does not hold it.
    """
    torch.manual_seed(config.seed)
    try:
        model = build(config, vocab_size)
        initialize(
            model, model.rules, init=config.init, std=config.init_std, depth=config.depth,
            zero_readout=config.zero_readout, zero_query=config.zero_query,
        )  # fmt: skip
        return model.to(device)
    except (RuntimeError, MemoryError) as error:
        if not job.is_out_of_memory(error):
            raise
        n = make_shape(config, vocab_size).n_params
        raise UserError(f"no memory for a model of {n:,} parameters: lower width, depth or ffn_ratio") from error


def build(config: SimpleNamespace, vocab_size: int) -> LanguageModel:
    """The model on the CPU, its matrices without values. Raises UserError for a shape that cannot be."""
    try:
        shape = make_shape(config, vocab_size)
    except ShapeError as error:
        raise UserError(str(error)) from error
    rules = Parametrization(
        config.parametrization, shape.width, config.base_width or shape.width, shape.depth,
        config.base_depth or shape.depth,
    )  # fmt: skip
    if shape.architecture == "lstm":
        return LSTM(shape, rules, forget_bias=config.forget_bias, dropout=config.dropout)
    own = None if config.heads else default_heads(rules.base_width)  # which need not be of the same size
    return Transformer(shape, rules, base_heads=config.base_heads or own, dropout=config.dropout)
