"""The lines of which batches are made: a sample each, or a pack of several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from torchtune import utils

from trainer.batches import Batch, collate, collate_packs, pack, read_samples
from trainer.chat import ChatTokenizer, Example

log = utils.get_logger("DEBUG")


class Lines(NamedTuple):
    """A split as the settings make it."""

    samples: list[Example]
    lines: list[list[Example]]
    n_truncated: int  # samples that were cut


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
