"""From rows to the tensors of a batch: samples, packs of samples, and the order in which they come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.chat import ChatTokenizer, Example
from trainer.job import UserError
from trainer.rows import read_rows

IGNORED = -100  # the label that torch's cross entropy leaves out
PADDING = -1  # the sample to which what fills up a pack belongs


class Batch(NamedTuple):
    """All int64, "batch seq", filled up on the right; the label of a position is the token after it, where learnt."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None = None  # of each token in its sample; None where a line is one sample
    samples: Tensor | None = None  # which sample of its pack each token belongs to; None likewise

    @property
    def label_tokens(self) -> int:
        """How many positions the loss counts."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        positions, samples = (None if each is None else each.to(device) for each in self[2:])
        return Batch(self.tokens.to(device), self.labels.to(device), positions, samples)

    @property
    def mask(self) -> Tensor | None:
        """Bool, "batch seq seq": whether a token sees another, which is its own or an earlier one of its sample."""
        if self.samples is None:
            return None
        same = self.samples[:, :, None] == self.samples[:, None, :]
        return same.tril()


def read_samples(
    dataset: Path,
    split: str,
    tokenizer: ChatTokenizer,
    *,
    system_prompt: str | None,
    prompt: str,
    max_seq_len: int,
    vocab_size: int,
) -> list[Example]:
    """The samples of a split at their full length. Raises UserError for one that the model cannot learn from."""
    rows = read_rows(dataset, split)
    samples = [tokenizer.row_example(row, system_prompt, prompt) for row in rows]
    shown = {"train": "training"}.get(split, split)
    for i, sample in enumerate(samples):
        if sample.n_prompt >= max_seq_len:
            raise UserError(
                f"the prompt of {shown} row {i} has {sample.n_prompt} tokens, max_seq_len is {max_seq_len}: "
                "nothing would be left to learn; raise max_seq_len or remove the row"
            )
        if len(sample.ids) < 2:
            raise UserError(f"{shown} row {i} is a single token: there is nothing to learn; remove the row")
        if max(sample.ids) >= vocab_size:
            raise UserError(
                f"{shown} row {i} has token {max(sample.ids)} but the model knows only {vocab_size}: "
                "the tokenizer is another model's; download the model again"
            )
    return samples


def pack(examples: Sequence[Example], max_seq_len: int) -> list[list[Example]]:
    """Packs of samples, in their order, of at most max_seq_len tokens; as torchtune's, no sample is split.

    No sample may be longer than max_seq_len.
    """
    packs: list[list[Example]] = []
    room = 0
    for example in examples:
        assert len(example.ids) <= max_seq_len, f"a sample has {len(example.ids)} tokens, a pack {max_seq_len}"
        if len(example.ids) > room:
            packs.append([])
            room = max_seq_len
        packs[-1].append(example)
        room -= len(example.ids)
    return packs


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """A line for each sample. Padding comes after all that a causal model may see, so it needs no mask."""
    tokens = [torch.tensor(example.ids) for example in examples]
    labels = [torch.tensor(_labels(example)) for example in examples]
    return Batch(pad_sequence(tokens, True, pad_id), pad_sequence(labels, True, IGNORED))


def collate_packs(packs: Sequence[Sequence[Example]], pad_id: int, max_seq_len: int) -> Batch:
    """A line of max_seq_len tokens for each pack."""
    batch = Batch(*(torch.full((len(packs), max_seq_len), value) for value in (pad_id, IGNORED, 0, PADDING)))
    assert batch.positions is not None and batch.samples is not None
    for line, examples in enumerate(packs):
        start = 0
        for number, example in enumerate(examples):
            span = slice(start, start + len(example.ids))
            batch.tokens[line, span] = torch.tensor(example.ids)
            batch.labels[line, span] = torch.tensor(_labels(example))
            batch.positions[line, span] = torch.arange(len(example.ids))
            batch.samples[line, span] = number
            start = span.stop
    return batch


def seed_of(*parts: int) -> int:
    """A seed of its own for each list of whole numbers, of 32 bits: torch's generator on the CPU reads no more."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def data_order(n_samples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the samples, or packs, its own for each seed and epoch."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(n_samples, generator=generator).tolist()


def _labels(example: Example) -> list[int]:
    learnt = [token if i >= example.n_prompt else IGNORED for i, token in enumerate(example.ids)]
    return [*learnt[1:], IGNORED]
