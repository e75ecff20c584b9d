"""From token ids to the tensors of a batch, and the order in which samples come."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.chat import Example

IGNORED = -100  # the label that torch's cross entropy leaves out


class Batch(NamedTuple):
    """Both int64, "batch seq", padded on the right; the label of a position is the token after it, where learnt."""

    tokens: Tensor
    labels: Tensor

    @property
    def label_tokens(self) -> int:
        """How many positions the loss counts."""
        return int((self.labels != IGNORED).sum())


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Padding comes after all that a causal model may see, so it needs no mask."""
    tokens = [torch.tensor(example.ids) for example in examples]
    labels = [torch.tensor(_labels(example)) for example in examples]
    return Batch(pad_sequence(tokens, True, pad_id), pad_sequence(labels, True, IGNORED))


def data_order(n_samples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the samples, its own for each seed below 2^32 and epoch below 2^24."""
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    return torch.randperm(n_samples, generator=generator).tolist()


def _labels(example: Example) -> list[int]:
    learnt = [token if i >= example.n_prompt else IGNORED for i, token in enumerate(example.ids)]
    return [*learnt[1:], IGNORED]
