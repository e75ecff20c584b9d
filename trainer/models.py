"""The model that settings describe, by its name: the one place where a new kind of model is added."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from trainer.job import UserError
from trainer.language import LanguageModel
from trainer.layers import initialize
from trainer.lstm import LSTM
from trainer.parametrization import Parametrization
from trainer.shape import ShapeError, default_heads, make_shape
from trainer.transformer import Transformer


def make(config: SimpleNamespace, vocab_size: int) -> LanguageModel:
    """The model on the CPU with its first values, which follow from the seed. Raises UserError as `build` does."""
    torch.manual_seed(config.seed)
    model = build(config, vocab_size)
    initialize(
        model, model.rules, init=config.init, std=config.init_std, depth=config.depth,
        zero_readout=config.zero_readout, zero_query=config.zero_query,
    )  # fmt: skip
    return model


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
