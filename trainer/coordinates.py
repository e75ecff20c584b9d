"""The coordinate check: how the size of every module's output grows with width, in the first steps of training.

A right parametrisation keeps it as it is (Tensor Programs V, arXiv:2203.03466, appendix D.1). `slopes` of a list of
(width, `sizes`) says by how many powers of two it grows a doubling of the width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from torch import Tensor

from trainer.language import LanguageModel
from trainer.models import make
from trainer.optimizer import make_optimizer

Sizes = dict[tuple[int, str], float]  # by step, from 0, and module: the mean of |x| over its output


def sizes(config: SimpleNamespace, vocab_size: int, batch: Tensor, steps: int = 4) -> Sizes:
    """The mean |x| of each module's output, and of the logits, before each of `steps` updates on "row seq+1" tokens."""
    model = make(config, vocab_size)
    optimizer = make_optimizer(model, config)
    found: Sizes = {}
    for step in range(steps + 1):
        with _listening(model, found, step):
            hidden, _ = model(batch[:, :-1])
        found[step, "logits"] = model.logits(hidden).detach().abs().mean().item()
        loss = model.loss(hidden, batch[:, 1:]) / batch[:, 1:].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return found


def slopes(measured: Mapping[int, Sequence[Sizes]]) -> dict[tuple[int, str], float]:
    """For each step and module the slope of log2 of its mean |x| over log2 of the width, over all seeds of a width.

    A module whose output is 0 at some width has none.
    """
    points: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for width, seeds in measured.items():
        for key in seeds[0]:
            mean = sum(one[key] for one in seeds) / len(seeds)
            points[key].append((math.log2(width), math.log2(mean) if mean else -math.inf))
    return {key: _slope(each) for key, each in points.items() if all(y > -math.inf for _, y in each)}


def _slope(points: Sequence[tuple[float, float]]) -> float:
    x0, y0 = (sum(each) / len(points) for each in zip(*points, strict=True))
    return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


class _listening:
    """Notes the mean |x| of what each module of a model returns while the block runs."""

    def __init__(self, model: LanguageModel, found: Sizes, step: int):
        self.model, self.found, self.step = model, found, step

    def __enter__(self) -> None:
        def note(name: str):
            def hook(_module, _inputs, output):
                output = output[0] if isinstance(output, tuple) else output
                self.found[self.step, name] = output.detach().abs().mean().item()

            return hook

        named = [(name, module) for name, module in self.model.named_modules() if name]
        self.handles = [module.register_forward_hook(note(name)) for name, module in named]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
