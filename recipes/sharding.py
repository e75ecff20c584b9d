"""How processes divide a model's frozen weights: FSDP2, arXiv:2304.11277 and docs.pytorch.org, fully_shard."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torchao.dtypes.nf4tensor import NF4Tensor


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each process its rows of the module's frozen matrices; a pass through the module gathers them.

    What is trained stays whole, since its gradients are added up by the loop; so do vectors, norms and biases, which
    would save nothing.
    """
    whole = {p for p in module.parameters() if p.requires_grad or p.ndim < 2 or not _is_divisible(p, mesh.size())}
    fully_shard(module, mesh=mesh, ignored_params=whole)


def _is_divisible(weight: Tensor, n: int) -> bool:
    """Whether `n` processes can divide it: torchao 0.13 cuts 4-bit weights only into equal parts of whole blocks."""
    if not isinstance(weight, NF4Tensor):
        return True
    inner = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor)
    return len(weight) % n == 0 and all(len(each) % n == 0 for each in inner)
