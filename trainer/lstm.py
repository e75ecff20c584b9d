"""An LSTM language model: embedding, layers of the same width, and a readout that may be the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.language import LanguageModel
from trainer.layers import Tag
from trainer.parametrization import Parametrization
from trainer.shape import Shape

State = tuple[Tensor, Tensor]  # hidden and cell state, each "depth batch width"


class LSTM(LanguageModel):
    """Token ids "batch seq" and the state that the text before left to hidden states "batch seq width".

    Dropout (arXiv:1409.2329) is on what goes into each layer and out of the last, never on what is carried on in time.
    """

    def __init__(self, shape: Shape, rules: Parametrization, *, forget_bias: float = 1.0, dropout: float = 0.0):
        """`forget_bias`: what the forget gate begins with (Jozefowicz et al., 2015)."""
        super().__init__(shape, rules, dropout)
        self.layers = nn.ModuleList(Recurrent(shape.width, forget_bias) for _ in range(shape.depth))

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The hidden states of "batch seq" tokens, "batch seq width", and the state after them, without a gradient."""
        x, left = self.embedding(tokens), []
        for i, layer in enumerate(self.layers):
            before = None if state is None else (state[0][i : i + 1], state[1][i : i + 1])
            x, after = layer(F.dropout(x, self.dropout, self.training), before)
            left.append(after)
        hidden, cell = (torch.cat([each[part] for each in left]).detach() for part in (0, 1))
        return F.dropout(x, self.dropout, self.training), (hidden, cell)


class Recurrent(nn.LSTM):
    """One layer of torch's own LSTM, fused on every device, whose parameters say their role.

    Both matrices of a layer are hidden with the width as fan_in; the biases, like all biases, are vectors.
    """

    bias_ih_l0: nn.Parameter
    bias_hh_l0: nn.Parameter

    def __init__(self, width: int, forget_bias: float):
        super().__init__(width, width, batch_first=True)
        with torch.no_grad():
            self.bias_ih_l0.zero_()
            self.bias_hh_l0.zero_()
            self.bias_ih_l0[width : 2 * width] = forget_bias  # gates stand in the order input, forget, cell, output

    def tags(self) -> dict[str, Tag]:
        """By the names of its parameters."""
        matrix = Tag("hidden", self.hidden_size, 4 * self.hidden_size)
        return {"weight_ih_l0": matrix, "weight_hh_l0": matrix} | dict.fromkeys(
            ("bias_ih_l0", "bias_hh_l0"), Tag("vector")
        )
