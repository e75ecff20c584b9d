"""Token files: one flat array a split, read as memory maps, and the order in which training takes them.

A folder holds `train.bin` and `validation.bin` (unsigned, little-endian, 16 or 32 bits) and `meta.json`, which says
how many tokens each has, of which vocabulary, and their hashes. `python -m trainer.prepare` makes one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batches import data_order
from trainer.job import UserError

META = "meta.json"
BLOCK = 1 << 22  # bytes that are read at once: whole tokens of either size


@dataclass(frozen=True)
class TokenFolder:
    """A folder of token files."""

    folder: Path
    vocab_size: int
    dtype: str
    counts: dict[str, int]  # tokens of each split
    sha256: dict[str, str]
    about: dict[str, Any]  # tokenizer and source, as meta.json has them

    def split(self, name: str) -> np.ndarray:
        """The tokens of a split, "token", mapped. Reads it once; raises UserError where meta.json says otherwise."""
        if name not in self.counts:
            raise UserError(f"{self.folder} has no split {name!r}, it has {', '.join(self.counts)}: prepare it anew")
        file = self.folder / f"{name}.bin"
        if not file.is_file() or file.stat().st_size != self.counts[name] * np.dtype(self.dtype).itemsize:
            raise UserError(f"{file} does not hold the {self.counts[name]} tokens of {META}: prepare it anew")
        digest, highest = hashlib.sha256(), 0
        with file.open("rb") as data:  # not the map, whose pages would count as the memory of the process
            while block := data.read(BLOCK):
                digest.update(block)
                highest = max(highest, int(np.frombuffer(block, self.dtype).max()))
        if digest.hexdigest() != self.sha256[name]:
            raise UserError(f"{file} is not what {META} says: prepare it anew")
        if highest >= self.vocab_size:
            raise UserError(
                f"{file} holds token {highest} and the vocabulary ends at {self.vocab_size - 1}: prepare it anew"
            )
        return np.memmap(file, dtype=self.dtype, mode="r")


def open_tokens(folder: Path) -> TokenFolder:
    """What `meta.json` says. Raises UserError for a folder without, or one that cannot be read."""
    file = folder / META
    if not file.is_file():
        raise UserError(f"{file} is missing: data must be a folder that `python -m trainer.prepare` made")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        tokens = TokenFolder(
            folder, meta["vocab_size"], meta["dtype"], meta["tokens"], meta["sha256"],
            {key: value for key, value in meta.items() if key not in ("vocab_size", "dtype", "tokens", "sha256")},
        )  # fmt: skip
        if wrong := _wrong(tokens):
            raise ValueError(wrong)
        return tokens
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): prepare the tokens anew") from error


def _wrong(tokens: TokenFolder) -> str | None:
    """What in meta.json cannot be; null: nothing."""
    counts, sha256 = tokens.counts, tokens.sha256
    if not _is_count(tokens.vocab_size):
        return f"vocab_size is {tokens.vocab_size!r}"
    if tokens.dtype not in ("<u2", "<u4"):
        return f"dtype is {tokens.dtype!r}"
    if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
        return f"tokens is {counts!r}"
    if not isinstance(sha256, dict) or counts.keys() - sha256.keys():
        return "sha256 is not of every split"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0  # True is an int too


class Windows:
    """Batches for a Transformer: windows of `seq_len` tokens that do not overlap, in an order of each epoch's own."""

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int):
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.n_samples = (len(tokens) - 1) // seq_len  # of an epoch
        if self.n_samples < 1:
            raise UserError(f"{len(tokens)} tokens are fewer than one sequence of {seq_len}: lower seq_len")
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int, rows: range) -> Tensor:
        """These rows of the batch after `step` steps: "row seq+1" of int64, targets one place after their tokens."""
        first = step * self.batch_size
        lines = [self._window(first + i) for i in rows]
        return torch.from_numpy(np.stack(lines).astype(np.int64))

    def begins(self, step: int) -> bool:
        """Windows know nothing of what came before."""
        return True

    def epochs(self, step: int) -> float:
        """How often the tokens have been seen after `step` steps."""
        return step * self.batch_size / self.n_samples

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.n_samples)
        if self._order[0] != epoch:
            self._order = (epoch, data_order(self.n_samples, self.seed, epoch))
        start = self._order[1][place] * self.seq_len
        return self.tokens[start : start + self.seq_len + 1]


class Streams:
    """Batches for an LSTM: the text as `batch_size` streams side by side, of which each batch has the next piece.

    A stream carries its state on from batch to batch, and begins anew without one where `begins` says so.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int):
        del seed  # their order is the text's
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.length = (len(tokens) - 1) // batch_size
        self.pieces = self.length // seq_len  # of each stream
        self.n_samples = self.pieces * batch_size
        if self.pieces < 1:
            raise UserError(
                f"{len(tokens)} tokens make no {batch_size} streams of {seq_len}: lower batch_size or seq_len"
            )

    def batch(self, step: int, rows: range) -> Tensor:
        """As of Windows; row i is always of stream i."""
        start = (step % self.pieces) * self.seq_len
        lines = [self.tokens[i * self.length + start :][: self.seq_len + 1] for i in rows]
        return torch.from_numpy(np.stack(lines).astype(np.int64))

    def begins(self, step: int) -> bool:
        """Whether the batch after `step` steps is the first of its streams."""
        return step % self.pieces == 0

    def epochs(self, step: int) -> float:
        """How often the tokens have been seen after `step` steps."""
        return step / self.pieces


@dataclass(frozen=True)
class Validation:
    """The same targets for every model: the first `n` + 1 tokens of a split, each but the first predicted once."""

    tokens: Tensor  # "token", int64
    sha256: str

    @property
    def n_targets(self) -> int:
        """Tokens that are predicted."""
        return len(self.tokens) - 1

    def windows(self, seq_len: int, at_once: int) -> Iterator[Tensor]:
        """ "row seq+1" pieces for a model that carries no state on: as many full ones at once, then what is left."""
        full = self.n_targets // seq_len
        for first in range(0, full, at_once):
            starts = range(first * seq_len, min(first + at_once, full) * seq_len, seq_len)
            yield torch.stack([self.tokens[start : start + seq_len + 1] for start in starts])
        if full * seq_len < self.n_targets:
            yield self.tokens[None, full * seq_len :]

    def streams(self, seq_len: int, n: int) -> Iterator[Tensor]:
        """ "row seq+1" pieces of `n` streams side by side for one that does, then what is left as rows of its own."""
        length = self.n_targets // n
        for start in range(0, length, seq_len):
            end = min(start + seq_len, length) + 1
            yield torch.stack([self.tokens[i * length + start : i * length + end] for i in range(n)])
        if n * length < self.n_targets:
            yield self.tokens[None, n * length :]


def validation_of(tokens: np.ndarray, n: int | None) -> Validation:
    """The first `n` targets, or all. Raises UserError where there are fewer."""
    n = len(tokens) - 1 if n is None else n
    if not 0 < n < len(tokens):
        raise UserError(f"val_tokens is {n} and the validation split has {len(tokens) - 1} targets: lower val_tokens")
    kept = np.ascontiguousarray(tokens[: n + 1].astype(np.int64))
    return Validation(torch.from_numpy(kept), hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest())
