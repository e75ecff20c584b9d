"""What language models of every kind share: an embedding, hidden states from it, and a readout of those."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.layers import Matrix, Table, Tag
from trainer.loss import readout_loss
from trainer.parametrization import Parametrization
from trainer.shape import Shape


class LanguageModel(nn.Module):
    """Token ids "batch seq" to hidden states "batch seq width"; logits and loss follow from those."""

    def __init__(self, shape: Shape, rules: Parametrization, dropout: float):
        super().__init__()
        self.shape, self.rules, self.dropout = shape, rules, dropout
        self.embedding = Table(shape.vocab_size, shape.width, "embedding")
        self.readout = None if shape.tied else Matrix(Tag("readout", shape.width, shape.vocab_size), bias=False)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The hidden states of "batch seq" tokens, "batch seq width", and the state after them, without a gradient."""
        raise NotImplementedError

    @property
    def output_weight(self) -> Tensor:
        """The matrix whose products are the logits, "vocab width"."""
        return self.embedding.weight if self.readout is None else self.readout.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """ "... width" to "... vocab"."""
        return F.linear(hidden, self.output_weight) * self.rules.output_multiplier

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of the cross-entropies of "batch seq" targets, in nats."""
        return readout_loss(hidden.flatten(0, 1), self.output_weight, targets.flatten(), self.rules.output_multiplier)
