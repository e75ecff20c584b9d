"""How many sequences a device takes at once: as asked, as memory once allowed, or as many as a measured step fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from trainer import job
from trainer.job import UserError
from trainer.ranks import Ranks

DEVIATION = "deviation.json"
SPARE = 0.1  # of the memory that is free, which stays so
TOKENS_ON_CPU = 8192  # at once: more are no faster


class MicroBatch(NamedTuple):
    """Sequences, samples or packs of a process's forward pass."""

    size: int
    asked: int | None  # what the settings say; null: nothing
    deviation: dict[str, Any] | None  # why it is another
    choices: list[int]  # what it may be: all that divides a process's part of the batch

    @property
    def smaller(self) -> int | None:
        """The largest choice of at most half; None where there is none."""
        return max((n for n in self.choices if 2 * n <= self.size), default=None)

    def take_less(self, out: Path, ranks: Ranks, when: str, advice: str) -> str:
        """Notes the smaller one in `deviation.json`, by which the next start takes it; in words what is to be done.

        Raises UserError with `advice` where there is none.
        """
        reason = f"out of memory {when} at micro_batch_size {self.size}"
        if self.smaller is None:
            raise UserError(f"{reason}, the smallest: {advice}")
        if ranks.writes:
            asked = self.asked or (self.deviation or {}).get("asked") or self.size
            values = {"micro_batch_size": self.smaller, "asked": asked, "reason": reason}
            job.write_json(out / DEVIATION, values)
        ranks.wait()
        return f"{reason}: start again to go on with {self.smaller}"


def as_asked(config: SimpleNamespace, ranks: Ranks, out: Path) -> MicroBatch:
    """As `given`; where the settings say nothing, a process's whole part of the batch."""
    whole = divisors(config.batch_size, ranks.world_size)[-1]
    found = given(config.micro_batch_size or whole, config.batch_size, ranks.world_size, out)
    assert found, "one is asked for"
    return found


def given(asked: int | None, batch_size: int, world_size: int, out: Path) -> MicroBatch | None:
    """As `deviation.json` says, which an attempt left that ran out of memory, else as asked; None where neither does.

    Raises UserError for a size that does not divide the batch, and for a deviation to a larger one.
    """
    choices = divisors(batch_size, world_size)
    if asked and asked not in choices:
        each = choices[-1]
        whole = f"batch_size {each}" if world_size == 1 else f"the {each} of batch_size {batch_size} for each of"
        processes = "" if world_size == 1 else f" {world_size} processes"
        raise UserError(
            f"micro_batch_size {asked} does not divide {whole}{processes}: take {', '.join(map(str, choices))}"
        )
    file = out / DEVIATION
    if not file.is_file():
        return MicroBatch(asked, asked, None, choices) if asked else None
    try:
        deviation = json.loads(file.read_text(encoding="utf-8"))
        size = deviation["micro_batch_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} names no micro_batch_size: remove it") from error
    allowed = [n for n in choices if n <= (asked or batch_size)]
    if size not in allowed:
        says = f", the settings {asked}" if asked else ""
        raise UserError(
            f"{file} says micro_batch_size {size!r}{says}: remove it, or let it name one of "
            f"{', '.join(map(str, allowed))}"
        )
    return MicroBatch(size, asked, deviation, choices)


def divisors(batch_size: int, world_size: int) -> list[int]:
    """All that divides a process's part of the batch, the whole part last. Raises UserError where it has none."""
    each, left_over = divmod(batch_size, world_size)
    if left_over:
        raise UserError(f"batch_size {batch_size} cannot be divided by {world_size} processes: choose another")
    small = [n for n in range(1, math.isqrt(each) + 1) if each % n == 0]
    return sorted({*small, *(each // n for n in small)})


def fitted(
    config: SimpleNamespace, ranks: Ranks, out: Path, before: int | None, attempt: Callable[[int], None]
) -> MicroBatch:
    """The micro batch of a run; the batch stays whatever it is.

    Where neither settings nor `deviation.json` say it, it is the one from `before` the run was interrupted, so that it
    goes on to the same bits, else the largest divisor that an estimate lets fit is tried by
    `attempt(size)`, a forward and a backward pass on the device, and the next smaller one until one fits.
    Raises UserError as `given` does, and where not even one fits.
    """
    known = given(config.micro_batch_size, config.batch_size, ranks.world_size, out)
    if known:
        return known
    choices = divisors(config.batch_size, ranks.world_size)
    if before in choices:
        return MicroBatch(before, None, None, choices)
    for size in reversed([n for n in choices if n == 1 or n <= _most(config, ranks.device)]):
        if _fits(size, ranks, attempt):
            return MicroBatch(size, None, None, choices)
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
