"""The processes that train one model together: who they are, and the sums that they make.

Each takes its part of every batch; what they add up is the gradients of what is trained, at one place of the loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer import job
from trainer.job import UserError
from trainer.watch import Watch


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`; only rank 0 writes files."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    watch: Watch | None = None  # where there are several

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def share(self, parts: list) -> list:
        """Which of a batch's parts this process takes."""
        return parts[self.rank :: self.world_size]

    def total(self, *values: float) -> list[float]:
        """Each value added up over all processes, which wait for each other here."""
        if self.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def mesh(self) -> DeviceMesh | None:
        """All processes, as those that divide a model; None for one alone."""
        return init_device_mesh(self.device.type, (self.world_size,)) if self.world_size > 1 else None

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all processes, of one shape, joined in their order along `dim`, on the CPU."""
        if self.world_size == 1:
            return part.cpu()
        parts = [torch.empty_like(part) for _ in range(self.world_size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim).cpu()

    def wait(self) -> None:
        """Until every process is here."""
        self.total(0.0)

    def add_up(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Adds up the gradients over all processes, in place; one that is not there counts as zeros.

        Raises MemoryError in every process where one has no room for all gradients together.
        """
        if self.world_size == 1:
            return
        parameters = list(parameters)
        together = torch.empty(0)

        def join() -> float:
            nonlocal together
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            together = torch.cat([gradient.flatten().float() for gradient in gradients])
            return 0.0

        _, failed = job.within_memory(join)
        (failures,) = self.total(failed)  # else the others would wait for this one's gradients
        if failures:
            raise MemoryError("no room for all gradients together")
        dist.all_reduce(together)
        for gradient, p in zip(_split(together, parameters), parameters, strict=True):
            p.grad = gradient.to(p.dtype)

    @contextmanager
    def instead_of_all(self) -> Iterator[Ranks]:
        """This process as if it were alone, to act for all while the others wait inside a pass.

        Only the first that asks comes back: the others' states are the same.
        """
        assert self.watch
        self.watch.claim()
        # A gather that not all have begun may hold up the stream of the pass for ever.
        stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        with torch.cuda.stream(stream):
            yield Ranks(self.device, watch=self.watch)

    def end_all(self, code: int) -> NoReturn:
        """Ends every process, wherever it waits, with this exit code."""
        assert self.watch
        self.watch.end_all(code)

    def heed(self) -> None:
        """Ends this process as all were told to, if they were."""
        if self.watch:
            self.watch.heed()

    def leave(self) -> None:
        """Ends the talk between the processes."""
        if self.watch:
            self.watch.stop()
            dist.destroy_process_group()


def join(device: str | None) -> Ranks:
    """This process among those that torchrun or Slurm started: NCCL between GPUs, gloo between CPUs.

    RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them, else SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID; with
    more than one process, MASTER_ADDR and MASTER_PORT too. Raises UserError.
    """
    rank, world_size, local_rank = (
        int(os.environ.get(torchrun) or os.environ.get(slurm) or alone)
        for torchrun, slurm, alone in (
            ("RANK", "SLURM_PROCID", 0),
            ("WORLD_SIZE", "SLURM_NTASKS", 1),
            ("LOCAL_RANK", "SLURM_LOCALID", 0),
        )
    )
    chosen = job.pick_device(device)
    if chosen.type == "cuda":
        if world_size == 1 and torch.cuda.device_count() > 1:
            raise UserError(
                f"{torch.cuda.device_count()} GPUs are here and one process was started: start one for each, by srun "
                "or torchrun, or show it one by CUDA_VISIBLE_DEVICES"
            )
        # Slurm may show each process one GPU, or all of the node to each.
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if world_size > 1:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(
                f"{world_size} processes cannot meet without {' and '.join(missing)}: "
                "set them to the first node's name and a free port, or start the recipe with torchrun"
            )
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size)
        return Ranks(chosen, rank, world_size, Watch(rank, world_size))
    return Ranks(chosen)


def _split(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that were joined, in the shapes of `like`."""
    parts = together.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
