"""A decoder-only Transformer (arXiv:1706.03762) with the variants that studies compare."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.language import LanguageModel
from trainer.layers import Matrix, Norm, Table, Tag
from trainer.parametrization import Parametrization
from trainer.shape import GATED, Shape

ROTARY_BASE = 10_000.0  # arXiv:2104.09864, section 3.3


class Transformer(LanguageModel):
    """Token ids "batch seq" to hidden states "batch seq width", each from the tokens up to its own."""

    angles: Tensor  # of each position; no parameter

    def __init__(self, shape: Shape, rules: Parametrization, *, base_heads: int | None = None, dropout: float = 0.0):
        """`base_heads`: heads of the model of the base shape; null: as many as keep their size."""
        super().__init__(shape, rules, dropout)
        width, seq_len = shape.width, shape.seq_len
        self.positions = Table(seq_len, width, "vector") if shape.position == "learned" else None
        base_head_dim = shape.head_dim if base_heads is None else rules.base_width // base_heads
        scale = rules.attention_scale(shape.head_dim, base_head_dim)
        self.blocks = nn.ModuleList(Block(shape, rules, scale, dropout) for _ in range(shape.depth))
        pre = shape.norm_position == "pre"
        self.norm = Norm(shape.norm, width, shape.bias, in_block=False) if pre else nn.Identity()
        self.register_buffer("angles", _angles(shape, rules.base_width), persistent=False)

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        """The hidden states of "batch seq" tokens, "batch seq width". A Transformer carries no state on."""
        x = self.embedding(tokens)
        n = tokens.shape[1]
        if self.positions is not None:
            x = x + self.positions.weight[:n]
        elif self.shape.position == "sinusoidal":
            x = x + self.angles[:n]
        x = F.dropout(x, self.dropout, self.training)
        turns = self.angles[:n] if self.shape.position == "rotary" else None
        for block in self.blocks:
            x = block(x, turns)
        return self.norm(x), None


class Block(nn.Module):
    """Attention, then a feed-forward network, each added to the residual stream."""

    def __init__(self, shape: Shape, rules: Parametrization, scale: float, dropout: float):
        super().__init__()
        self.attention = Attention(shape, scale, dropout)
        self.feed_forward = FeedForward(shape)
        self.norm1, self.norm2 = (Norm(shape.norm, shape.width, shape.bias, in_block=True) for _ in range(2))
        self.is_pre, self.multiplier, self.dropout = shape.norm_position == "pre", rules.residual_multiplier, dropout

    def forward(self, x: Tensor, turns: Tensor | None) -> Tensor:
        """ "batch seq width" to the same."""
        if self.is_pre:
            x = x + self._scaled(self.attention(self.norm1(x), turns))
            return x + self._scaled(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self._scaled(self.attention(x, turns)))
        return self.norm2(x + self._scaled(self.feed_forward(x)))

    def _scaled(self, added: Tensor) -> Tensor:
        added = F.dropout(added, self.dropout, self.training)
        return added if self.multiplier == 1.0 else added * self.multiplier


class Attention(nn.Module):
    """Causal self-attention, the three projections in one matrix."""

    def __init__(self, shape: Shape, scale: float, dropout: float):
        super().__init__()
        width = shape.width
        self.heads, self.scale, self.dropout = shape.heads, scale, dropout
        self.qkv = Matrix(Tag("hidden", width, 3 * width, in_block=True, is_query=width), shape.bias)
        self.out = Matrix(Tag("hidden", width, width, in_block=True, adds=True), shape.bias)

    def forward(self, x: Tensor, turns: Tensor | None) -> Tensor:
        """ "batch seq width" to the same; `turns`: cosines and sines, "seq head_dim"."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each batch head seq head_dim
        if turns is not None:
            q, k = _turned(q, turns), _turned(k, turns)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two matrices with an activation between, or three where it is gated."""

    def __init__(self, shape: Shape):
        super().__init__()
        width, inner = shape.width, shape.ffn_width
        self.activation = shape.activation
        rows = 2 * inner if shape.activation in GATED else inner
        self.up = Matrix(Tag("hidden", width, rows, in_block=True), shape.bias)
        self.down = Matrix(Tag("hidden", inner, width, in_block=True, adds=True), shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """ "batch seq width" to the same."""
        return self.down(_activated(self.up(x), self.activation))


def _activated(x: Tensor, kind: str) -> Tensor:
    match kind:
        case "gelu":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
        case "silu":
            return F.silu(x)
        case "glu":
            return F.glu(x)
        case _:
            gate, value = x.chunk(2, -1)
            return F.silu(gate) * value


def _angles(shape: Shape, base_width: int) -> Tensor:
    """Of "seq ..." positions: cosines then sines for pairs of a head (rotary), or what is added to the embedding."""
    size = shape.head_dim if shape.position == "rotary" else shape.width
    if shape.position == "learned":
        return torch.empty(0)
    steps = ROTARY_BASE ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(shape.seq_len, dtype=torch.float64)[:, None] * steps
    parts = (angles.cos(), angles.sin())
    if shape.position == "sinusoidal":  # arXiv:1706.03762, section 3.5, of length 1 at the base width; then of its size
        return torch.cat(parts[::-1], 1).float() / math.sqrt(base_width / 2)
    return torch.cat(parts, 1).float()


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: the halves of "... seq head_dim" turned against each other."""
    cos, sin = turns.chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
