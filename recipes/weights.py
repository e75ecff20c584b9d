"""The weights in a model folder's safetensors files, read one by one: a model need not fit into memory to be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from trainer.job import UserError


class Weights(Mapping[str, Tensor]):
    """The weights of a folder by a model's own names, each read when it is asked for.

    `name` says what the model calls a weight of a file, None where it has no use for it; `turn` changes a weight, by
    the model's name, into what the model has. Raises UserError when a file is missing.
    """

    def __init__(self, folder: Path, name: Callable[[str, Path], str | None], turn: Callable[[str, Tensor], Tensor]):
        self._turn = turn
        self._places = {}
        for file in weight_files(folder):
            opened = safe_open(file, framework="pt")
            names = {theirs: name(theirs, file) for theirs in opened.keys()}  # noqa: SIM118 - it is no dict
            self._places |= {ours: (opened, theirs) for theirs, ours in names.items() if ours}

    def __getitem__(self, name: str) -> Tensor:
        opened, theirs = self._places[name]
        return self._turn(name, opened.get_tensor(theirs))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model folder, shard by shard. Raises UserError when one is missing."""
    index = model_dir / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [model_dir / name for name in sorted(names)]
    if gone := [file for file in files if not file.is_file()]:
        raise UserError(f"{gone[0]} is missing: download the model's safetensors files")
    return files


@torch.no_grad()
def fill(module: nn.Module, prefix: str, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts what is on the meta device of a module onto `device`: frozen parameters as `weights` has them, others empty.

    `prefix` stands before the names of the module's parameters in `weights`. Raises UserError for a weight of another
    shape.
    """
    for name, p in list(module.named_parameters()):
        if not p.is_meta:
            continue
        value = torch.empty_like(p, device=device) if p.requires_grad else _read(weights, prefix + name, p, device)
        owner, _, kind = name.rpartition(".")
        setattr(module.get_submodule(owner), kind, nn.Parameter(value, requires_grad=p.requires_grad))


def _read(weights: Mapping[str, Tensor], name: str, like: Tensor, device: torch.device) -> Tensor:
    weight = weights[name]
    if weight.shape != like.shape:
        raise UserError(
            f"the weight {name} is {tuple(weight.shape)} in the model's files and {tuple(like.shape)} by its "
            "config.json: download the model again"
        )
    if isinstance(like, NF4Tensor):
        return to_nf4(weight.to(device, like.dtype), like.block_size, like.scaler_block_size)
    return weight.to(device, like.dtype, copy=True)  # the file's own pages are not the model's
