"""How a parameter's role decides its first values, learning rate, weight decay and eps as a model grows.

    standard   nothing but the first values follows from the shape
    mup        Tensor Programs V, arXiv:2203.03466, Table 8: what is best at the base width is best at every width
    completep  arXiv:2505.01618, Table 1 with alpha = 1: the same for width and depth

With m = width / base width and, for completep, d = depth / base depth (else 1):

    role       parameters                            init std     Adam lr  SGD lr  AdamW decay  other decay  eps
    embedding  token embedding (tied or not)         as at base   1        m       1            1/m          1/m
    vector     positions, biases, gains of norms     as at base   1        m       none         none         1/m, 1/md
    readout    output matrix of its own              as at base   1        m       1            1/m          1/m
    hidden     matrices from width to width          1/sqrt(m)    1/m      1       m            1            1/md

The logits are multiplied by 1/m, each block's addition to the residual stream by 1/d, and the products of queries and
keys by sqrt(base head size) / head size. eps follows the size of the gradients. AdamW and SGD keep lr x decay; Adam's
decay is a part of the gradient, as SGD's is. At the base shape every factor is exactly 1, and all three are the same
bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["standard", "mup", "completep"]
Role = Literal["embedding", "vector", "readout", "hidden"]
Update = Literal["adam", "sgd"]


@dataclass(frozen=True)
class Parametrization:
    """The rules for one shape; each method gives a factor on what is set at the base shape."""

    kind: Kind
    width: int
    base_width: int
    depth: int = 1
    base_depth: int = 1

    @property
    def m(self) -> float:
        """Width over base width; 1 in the standard parametrisation."""
        return 1.0 if self.kind == "standard" else self.width / self.base_width

    @property
    def d(self) -> float:
        """Depth over base depth; 1 but in completep."""
        return self.depth / self.base_depth if self.kind == "completep" else 1.0

    def init_std(self, role: Role) -> float:
        """On the standard deviation that the matrix of the base shape has."""
        return 1 / math.sqrt(self.m) if role == "hidden" else 1.0

    def lr(self, role: Role, update: Update) -> float:
        """On the learning rate."""
        if update == "sgd":
            return 1.0 if role == "hidden" else self.m
        return 1 / self.m if role == "hidden" else 1.0

    def weight_decay(self, role: Role, *, decoupled: bool) -> float:
        """On the weight decay; `decoupled`: AdamW's, which is no part of the gradient."""
        if decoupled:
            return self.m if role == "hidden" else 1.0
        return 1.0 if role == "hidden" else 1 / self.m

    def eps(self, in_block: bool) -> float:
        """On Adam's eps; `in_block`: of a residual block."""
        return 1 / (self.m * self.d) if in_block else 1 / self.m

    @property
    def output_multiplier(self) -> float:
        """On the logits."""
        return 1 / self.m

    @property
    def residual_multiplier(self) -> float:
        """On what a block adds to the residual stream."""
        return 1 / self.d

    def attention_scale(self, head_dim: int, base_head_dim: int) -> float:
        """On the products of queries and keys; standard: 1 / sqrt(head_dim)."""
        if self.kind == "standard":
            return 1 / math.sqrt(head_dim)
        return math.sqrt(base_head_dim) / head_dim
