"""The lines of which batches are made: a sample each, or a pack of several."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from torchtune import utils

from trainer.batches import Batch, collate, collate_packs, pack, read_samples
from trainer.chat import ChatTokenizer, Example
from trainer.job import UserError

log = utils.get_logger("DEBUG")


class Lines(NamedTuple):
    """A split as the settings make it."""

    samples: list[Example]
    lines: list[list[Example]]
    n_truncated: int  # samples that were cut


class Data(NamedTuple):
    """What a run trains and validates on, and how many steps that makes."""

    train: Lines
    val_lines: list[list[Example]]  # none without val_split
    steps_per_epoch: int
    total_steps: int


def read_data(dataset: Path, tokenizer: ChatTokenizer, config: SimpleNamespace, vocab_size: int) -> Data:
    """All of it. Raises UserError where the samples do not fill a batch, and as `read_samples` does."""
    train, *validation = (
        read_lines(dataset, split, tokenizer, config, vocab_size) for split in filter(None, ("train", config.val_split))
    )
    per_epoch = len(train.lines) // config.batch_size
    if not per_epoch:
        n, samples = len(train.lines), len(train.samples)
        what = f"{n} packs of the {samples}" if config.packed else str(n)
        raise UserError(f"batch_size {config.batch_size} is more than the {what} samples: lower it")
    total = min(per_epoch * config.epochs, config.max_steps or sys.maxsize)
    if config.warmup_steps >= total:
        log.warning(f"lr stays below its value: warmup_steps {config.warmup_steps} of {total} steps")
    return Data(train, validation[0].lines if validation else [], per_epoch, total)


def validation_hash(dataset_sha256: str, val_split: str | None) -> str | None:
    """A hash that two runs share where they validate on the same rows; null without validation."""
    return hashlib.sha256(f"{dataset_sha256} {val_split}".encode()).hexdigest() if val_split else None


def read_lines(dataset: Path, split: str, tokenizer: ChatTokenizer, config: SimpleNamespace, vocab_size: int) -> Lines:
    """The samples of a split, cut to max_seq_len, and their lines. Raises UserError as `read_samples` does."""
    samples = read_samples(
        dataset,
        split,
        tokenizer,
        system_prompt=config.system_prompt,
        prompt=config.prompt,
        max_seq_len=config.max_seq_len,
        vocab_size=vocab_size,
    )
    n_truncated = sum(len(sample.ids) > config.max_seq_len for sample in samples)
    if n_truncated:
        of = "" if split == "train" else f" of {split}"
        log.warning(f"{n_truncated} of {len(samples)} samples{of} are cut to max_seq_len {config.max_seq_len}")
    samples = [Example(sample.ids[: config.max_seq_len], sample.n_prompt) for sample in samples]
    lines = pack(samples, config.max_seq_len) if config.packed else [[sample] for sample in samples]
    return Lines(samples, lines, n_truncated)


def micro_batches(lines: list[list[Example]], size: int, pad_id: int, config: SimpleNamespace) -> list[Batch]:
    """Batches of `size` lines, the last perhaps of fewer."""
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    if config.packed:
        return [collate_packs(part, pad_id, config.max_seq_len) for part in parts]
    return [collate([sample for line in part for sample in line], pad_id) for part in parts]
