"""The coordinate check for an experiment's own settings: how outputs grow with width in the first steps.

Trains small models for a few steps on the experiment's text, under the standard parametrisation and under muP.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer import coordinates
from trainer.settings import checked
from trainer.tokens import Windows, open_tokens

WIDTHS = (64, 128, 256)
STEPS = 4
SEEDS = (0, 1, 2, 3)
HEAD = 16  # of every width: muP keeps the size of heads and grows their number
# As the check is defined: what is added to the readout's first products does not hide the rest.
FIXED = {"architecture": "transformer", "tied": False, "zero_readout": True, "zero_query": False, "base_heads": None}


def check(config: Mapping[str, Any], widths: Sequence[int] = WIDTHS) -> dict[str, Any]:
    """By parametrisation: `widths`, `logits` (by step the mean |x| of each width), `slopes` of modules from step 1 on.

    Needs the text that `config` names, the folder of token files.
    """
    tokens = open_tokens(Path(config["dataset"]))
    batch = Windows(tokens.split("train"), min(config["seq_len"], 64), 8, 0).batch(0, range(8))
    return {kind: _checked(config, kind, widths, batch, tokens.vocab_size) for kind in ("standard", "mup")}


def _checked(
    config: Mapping[str, Any], kind: str, widths: Sequence[int], batch: torch.Tensor, vocab_size: int
) -> dict[str, Any]:
    base = config["base_width"] or widths[0]
    measured = {width: [_sizes(config, kind, width, base, seed, batch, vocab_size) for seed in SEEDS]
                for width in widths}  # fmt: skip
    slopes = {f"step {step} {name}": slope for (step, name), slope in coordinates.slopes(measured).items() if step}
    logits = [[statistics.mean(one[step, "logits"] for one in measured[width]) for width in widths]
              for step in range(STEPS + 1)]  # fmt: skip
    return {"widths": list(widths), "slopes": slopes, "logits": logits}


def _sizes(
    config: Mapping[str, Any], kind: str, width: int, base: int, seed: int, batch: torch.Tensor, vocab_size: int
) -> coordinates.Sizes:
    shape = {"width": width, "heads": width // HEAD, "base_width": base, "depth": 2, "seq_len": batch.shape[1] - 1}
    settings = {**config, **FIXED, **shape, "parametrization": kind, "seed": seed}
    return coordinates.sizes(checked(SimpleNamespace(**settings)), vocab_size, batch, STEPS)
