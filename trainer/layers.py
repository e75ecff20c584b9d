"""What models are made of: parameters that say their role, and that are given their first values by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.parametrization import Parametrization, Role


@dataclass(frozen=True)
class Tag:
    """What the parametrisation needs to know of a parameter."""

    role: Role
    fan_in: int = 1
    fan_out: int = 1
    in_block: bool = False  # of a residual block
    adds: bool = False  # its product is added to the residual stream
    is_query: int = 0  # how many of its first rows make queries


class Tagged(NamedTuple):
    """A parameter with its name and its tag."""

    name: str
    parameter: nn.Parameter
    tag: Tag


class Matrix(nn.Module):
    """A linear layer; `tag` is its weight's. The weight is "out in", the bias "out"."""

    def __init__(self, tag: Tag, bias: bool):
        super().__init__()
        self.tag = tag
        self.weight = nn.Parameter(torch.empty(tag.fan_out, tag.fan_in))
        self.bias = nn.Parameter(torch.zeros(tag.fan_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """ "... in" to "... out"."""
        return F.linear(x, self.weight, self.bias)

    def tags(self) -> dict[str, Tag]:
        """By the names of its parameters."""
        return {"weight": self.tag, "bias": Tag("vector", in_block=self.tag.in_block)}


class Table(nn.Module):
    """A vector of the width for each of `n` indices: tokens or positions."""

    def __init__(self, n: int, width: int, role: Role):
        super().__init__()
        self.tag = Tag(role, fan_in=1 if role == "vector" else n, fan_out=width)
        self.weight = nn.Parameter(torch.empty(n, width))

    def forward(self, index: Tensor) -> Tensor:
        """ "..." of int64 to "... width"."""
        return F.embedding(index, self.weight)

    def tags(self) -> dict[str, Tag]:
        """By the names of its parameters."""
        return {"weight": self.tag}


class Norm(nn.Module):
    """LayerNorm or RMSNorm (arXiv:1910.07467), in float32 whatever comes in, with gains that begin at 1."""

    def __init__(self, kind: str, width: int, bias: bool, in_block: bool):
        super().__init__()
        self.kind, self.in_block = kind, in_block
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias and kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """ "... width" to the same."""
        with torch.autocast(x.device.type, enabled=False):
            if self.kind == "rmsnorm":
                return F.rms_norm(x.float(), x.shape[-1:], self.weight, 1e-6)
            return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, 1e-5)

    def tags(self) -> dict[str, Tag]:
        """By the names of its parameters."""
        return dict.fromkeys(("weight", "bias"), Tag("vector", in_block=self.in_block))


def tagged(model: nn.Module) -> Iterator[Tagged]:
    """Every parameter of a model once, with its tag; an AssertionError for one whose module does not say it."""
    for name, parameter in model.named_parameters():
        place, _, last = name.rpartition(".")
        tags = getattr(model.get_submodule(place), "tags", dict)()
        assert last in tags, f"{name} has no role: let its module's tags() say it"
        yield Tagged(name, parameter, tags[last])


@torch.no_grad()
def initialize(
    model: nn.Module, rules: Parametrization, *, init: str, std: float, depth: int, zero_readout: bool, zero_query: bool
) -> None:
    """First values of all matrices and tables, in the order of the model, from torch's generator on the CPU.

    | init | standard deviation at the base shape |
    |---|---|
    | fan_in | tables `std`, matrices 1 / sqrt(fan_in) |
    | gpt2 | `std`; of what adds to the residual stream std / sqrt(2 depth) (GPT-2, section 2.3) |
    | xavier | tables `std`, matrices sqrt(2 / (fan_in + fan_out)) |

    The readout is a matrix. Biases begin at 0 and gains at 1.
    """
    for _, parameter, tag in tagged(model):
        if parameter.dim() < 2:
            continue
        base = _base_std(tag, rules, init, std, depth)
        values = torch.empty(parameter.shape).normal_(0.0, base * rules.init_std(tag.role))
        if tag.role == "readout" and zero_readout:
            values.zero_()
        if zero_query:
            values[: tag.is_query] = 0.0
        parameter.copy_(values)


def _base_std(tag: Tag, rules: Parametrization, init: str, std: float, depth: int) -> float:
    """What the same matrix has in the model of the base shape."""
    if init == "gpt2":
        return std / math.sqrt(2 * depth / rules.d) if tag.adds else std
    if tag.role in ("embedding", "vector"):
        return std
    fan_in = tag.fan_in / rules.m
    fan_out = tag.fan_out / rules.m if tag.role == "hidden" else tag.fan_out
    return 1 / math.sqrt(fan_in) if init == "fan_in" else math.sqrt(2 / (fan_in + fan_out))
