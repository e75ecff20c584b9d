"""The shape of a model that the trainer builds: what it may be, its parameters and its FLOPs, by arithmetic alone.

Needs the standard library only: the planner loads it by its path. That the counts are the built model's is a test.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CHOICES = {
    "architecture": ("transformer", "lstm"),
    "activation": ("gelu", "relu", "silu", "glu", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "position": ("rotary", "learned", "sinusoidal"),
}
WIDEST = 1e9  # of an inner width: more is a slip
GATED = ("glu", "swiglu")  # arXiv:2002.05202: a third matrix, whose product with the activated one goes on


class ShapeError(ValueError):
    """A shape that no model can have; the message says what to do."""


@dataclass(frozen=True)
class Shape:
    """A decoder-only Transformer, or an LSTM language model, which has no use for what stands under `heads`."""

    architecture: str
    vocab_size: int
    width: int
    depth: int
    heads: int = 1
    ffn_width: int = 0
    activation: str = "gelu"
    norm: str = "layernorm"
    norm_position: str = "pre"
    position: str = "rotary"
    seq_len: int = 1
    bias: bool = False
    tied: bool = True

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.width // self.heads

    @property
    def parts(self) -> dict[str, int]:
        """How many parameters each kind of module has; their sum is `n_params`."""
        v, d, b = self.vocab_size, self.width, int(self.bias)
        outside = {"embedding": v * d, "readout": 0 if self.tied else v * d}
        if self.architecture == "lstm":  # two biases for each of four gates, as torch and cuDNN have them
            return outside | {"recurrent": self.depth * (8 * d * d + 8 * d)}
        norm = d * (1 + (b if self.norm == "layernorm" else 0))
        up = 2 if self.activation in GATED else 1
        return outside | {
            "positions": self.seq_len * d if self.position == "learned" else 0,
            "attention": self.depth * (4 * d * d + b * 4 * d),
            "feed-forward": self.depth * ((up + 1) * d * self.ffn_width + b * (up * self.ffn_width + d)),
            "norms": norm * (2 * self.depth + (1 if self.norm_position == "pre" else 0)),
        }

    @property
    def n_params(self) -> int:
        """All parameters; a tied matrix counts once."""
        return sum(self.parts.values())

    @property
    def n_non_embedding(self) -> int:
        """Parameters but for embedding, positions and readout, as in arXiv:2001.08361."""
        return sum(n for part, n in self.parts.items() if part not in ("embedding", "positions", "readout"))

    def forward_flops(self, seq_len: int) -> float:
        """FLOPs of a token's forward pass in a sequence of `seq_len`, two for each multiply-add of a matrix product.

        Attention as far as a causal model needs it: a token sees (seq_len + 1) / 2 on average. Element by element
        work is left out: some 1 % from a width of 512 on.
        """
        v, d = self.vocab_size, self.width
        if self.architecture == "lstm":
            return 2.0 * (8 * d * d * self.depth + v * d)
        up = 2 if self.activation in GATED else 1
        matrices = self.depth * (4 * d * d + (up + 1) * d * self.ffn_width) + v * d
        return 2.0 * matrices + self.depth * 4.0 * d * (seq_len + 1) / 2

    def train_flops(self, seq_len: int) -> float:
        """FLOPs of a token in training: the backward pass computes twice the forward pass."""
        return 3.0 * self.forward_flops(seq_len)

    def as_dict(self) -> dict[str, Any]:
        """The fields, as a checkpoint keeps them."""
        return asdict(self)


def make_shape(settings: Any, vocab_size: int) -> Shape:
    """The shape that settings (an object with the names of train.yaml) describe. Raises ShapeError."""
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            raise ShapeError(f"{name} is {getattr(settings, name)!r}: choose {' or '.join(choices)}")
    width, transformer = settings.width, settings.architecture == "transformer"
    heads = (settings.heads or default_heads(width)) if transformer else 1
    if width % heads:
        raise ShapeError(f"width {width} cannot be divided by {heads} heads: take {_near_divisors(width, heads)}")
    if transformer and settings.position == "rotary" and (width // heads) % 2:
        raise ShapeError(
            f"a head of {width // heads} is odd, and rotary positions turn pairs: take other heads, or position learned"
        )
    if transformer and settings.position == "sinusoidal" and width % 2:
        raise ShapeError(f"width {width} is odd, and sinusoidal positions come in pairs: take an even width")
    if transformer and settings.ffn_ratio * width > WIDEST:
        raise ShapeError(f"ffn_ratio {settings.ffn_ratio} of width {width} is too wide: take a smaller one")
    ffn_width = round(settings.ffn_ratio * width) if transformer else 0
    if transformer and ffn_width < 1:
        raise ShapeError(f"ffn_ratio {settings.ffn_ratio} of width {width} leaves no inner width: take a larger one")
    return Shape(
        architecture=settings.architecture,
        vocab_size=vocab_size,
        width=width,
        depth=settings.depth,
        heads=heads,
        ffn_width=ffn_width,
        activation=settings.activation,
        norm=settings.norm,
        norm_position=settings.norm_position,
        position=settings.position,
        seq_len=settings.seq_len,
        bias=settings.bias,
        tied=settings.tied,
    )


def default_heads(width: int) -> int:
    """As many heads as keep their size at 64 or the next divisor below it, which must be even."""
    sizes = [size for size in range(2, min(width, 64) + 1, 2) if width % size == 0]
    return width // max(sizes, default=width)


def _near_divisors(width: int, heads: int) -> str:
    divisors = sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
    return " or ".join(str(n) for n in sorted(divisors[:3]))
