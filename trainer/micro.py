"""How many sequences a device takes at once: as asked, as memory once allowed, or as many as a measured step fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from trainer import job
from trainer.job import UserError
from trainer.ranks import Ranks

SPARE = 0.1  # of the memory that is free, which stays so
TOKENS_ON_CPU = 8192  # at once: more are no faster


class MicroBatch(NamedTuple):
    """Sequences of a process's forward pass."""

    size: int
    deviation: dict[str, Any] | None  # why it is not what the settings say
    choices: list[int]  # what it may be: all that divides a process's part of the batch

    @property
    def smaller(self) -> int | None:
        """The largest choice of at most half; None where there is none."""
        return max((n for n in self.choices if 2 * n <= self.size), default=None)


def fitted(config: SimpleNamespace, ranks: Ranks, out: Path, attempt: Callable[[int], None]) -> MicroBatch:
    """The micro batch of a run; the batch stays whatever it is.

    Where neither settings nor `deviation.json` say it, the largest divisor that an estimate lets fit is tried by
    `attempt(size)`, a forward and a backward pass on the device, and the next smaller one until one fits.
    Raises UserError for a size that does not divide the batch.
    """
    each, left_over = divmod(config.batch_size, ranks.world_size)
    if left_over:
        raise UserError(
            f"batch_size {config.batch_size} cannot be divided by {ranks.world_size} processes: choose another"
        )
    choices = [n for n in range(1, each + 1) if each % n == 0]
    file = out / "deviation.json"
    if file.is_file():
        deviation = json.loads(file.read_text(encoding="utf-8"))
        return MicroBatch(deviation["micro_batch_size"], deviation, choices)
    if config.micro_batch_size:
        if config.micro_batch_size not in choices:
            raise UserError(
                f"micro_batch_size {config.micro_batch_size} does not divide a process's {each} sequences: take one of "
                f"{', '.join(map(str, choices))}"
            )
        return MicroBatch(config.micro_batch_size, None, choices)
    for size in reversed([n for n in choices if n == 1 or n <= _most(config, ranks.device)]):
        if _fits(size, ranks, attempt):
            return MicroBatch(size, None, choices)
    raise UserError("not even one sequence fits into memory: lower seq_len or width, or take another device")


def _most(config: SimpleNamespace, device: torch.device) -> int:
    """An estimate of how many sequences fit, on the high side: it is tried."""
    if device.type == "cpu":
        return max(1, TOKENS_ON_CPU // config.seq_len)
    free, _ = torch.cuda.mem_get_info(device)
    bytes_each = 4 if config.dtype == "fp32" else 2
    # What a layer keeps for the backward pass, at the least: 10 widths and two of the feed-forward network a token.
    a_token = bytes_each * config.depth * config.width * (10 + 2 * config.ffn_ratio)
    return max(1, int(free * (1 - SPARE) / (a_token * config.seq_len)))


def _fits(size: int, ranks: Ranks, attempt: Callable[[int], None]) -> bool:
    """Whether every process has the memory for it, with some to spare."""

    def tried() -> float:
        attempt(size)
        return 0.0

    _, failed = job.within_memory(tried)
    if not failed and ranks.device.type == "cuda":
        used = torch.cuda.max_memory_reserved(ranks.device)
        _, whole = torch.cuda.mem_get_info(ranks.device)
        failed = used > whole * (1 - SPARE)
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
    (failures,) = ranks.total(failed)
    return not failures
