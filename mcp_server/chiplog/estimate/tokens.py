"""Tokens and steps of a training split as a recipe counts them: cut, padded or packed, dropped at an epoch's end.

All of it is a function of the lengths of the samples, in tokens and in their order. Where a random sample of them was
counted, `n_rows` says how many there are, and those that were counted stand for all.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from statistics import NormalDist, fmean, stdev

from pydantic import Field

from chiplog.schema import Frozen

COVERAGE = 0.90
RANKS = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}


class Quantiles(Frozen):
    """Tokens a sample, nearest-rank."""

    p5: int = Field(description="5th percentile.")
    p25: int = Field(description="25th percentile.")
    p50: int = Field(description="Median.")
    p75: int = Field(description="75th percentile.")
    p95: int = Field(description="95th percentile.")
    p99: int = Field(description="99th percentile.")
    max: int = Field(description="The longest.")


class TokenStats(Frozen):
    """Tokens of a split, of every sample what is left after it was cut; without padding."""

    rows: int = Field(description="Samples.")
    total: int = Field(description="Tokens of all samples, prompts included.")
    label_total: int = Field(description="Of these, tokens to be learnt.")
    mean: float = Field(description="Tokens a sample, mean.")
    quantiles: Quantiles = Field(description="Tokens a sample.")
    cut: int = Field(description="Samples longer than max_seq_len.")
    sampled: int = Field(description="Samples counted; fewer than rows where the others are taken to be like them.")
    total_low: int = Field(description="Lower end of the 90 % interval of the total; the total where all were counted.")
    total_high: int = Field(description="Upper end.")


class Steps(Frozen):
    """Optimiser steps of a run, and what goes through the model in them."""

    packed: bool = Field(description="Whether a sample of a batch is a pack of several.")
    per_epoch: int = Field(description="Steps of an epoch.")
    total: int = Field(description="Steps of all epochs, at most max_steps.")
    per_epoch_padded: int = Field(description="Steps of an epoch if samples are padded: per_epoch where not packed.")
    per_epoch_packed: int | None = Field(description="Steps of an epoch if they are packed; null without max_seq_len.")
    packs: int | None = Field(description="Packs of max_seq_len that the data make; null without max_seq_len.")
    micro_batch: int = Field(description="Samples, or packs, of a forward pass.")
    grad_accum: int = Field(description="Forward passes a step.")
    samples_per_step: float = Field(description="Samples a step, mean: all that its packs hold.")
    dropped: int = Field(description="Samples, or packs, that an epoch leaves out since they fill no batch.")
    tokens_per_step_mean: float = Field(description="Tokens a step, mean; without padding.")
    tokens_longest_pass: int = Field(description="Tokens of the longest pass that can come; with padding.")
    padding_share: float = Field(description="Share of all tokens of an epoch that is padding, expected of any order.")

    @property
    def tokens(self) -> int:
        """Tokens of all steps, without padding."""
        return round(self.tokens_per_step_mean * self.total)


def token_stats(
    lengths: Sequence[int],
    labels: Sequence[int],
    *,
    max_seq_len: int | None = None,
    n_rows: int | None = None,
    longest: int | None = None,
) -> TokenStats:
    """Counts of a split of which a sample at least was counted; its label tokens are its last ones.

    `longest` is a length known to be there beside those counted. The interval is the normal one of a mean, corrected
    for the number of rows (Cochran, Sampling Techniques, 3rd edition, section 2.8).
    """
    kept = cut(lengths, max_seq_len)
    n, rows, counted = len(kept), n_rows or len(kept), sum(kept)
    removed = [whole - left for whole, left in zip(lengths, kept, strict=True)]
    learnt = sum(max(0, label - gone) for label, gone in zip(labels, removed, strict=True))
    half = 0.0
    if n < rows:
        half = NormalDist().inv_cdf((1 + COVERAGE) / 2) * stdev(kept) / math.sqrt(n) * math.sqrt(1 - n / rows) * rows
    ranked, total = sorted(kept), round(counted * rows / n)
    return TokenStats(
        rows=rows,
        total=total,
        label_total=round(learnt * rows / n),
        mean=fmean(kept),
        quantiles=Quantiles(
            **{name: ranked[math.ceil(share * n) - 1] for name, share in RANKS.items()},
            max=cut([max(longest or 0, ranked[-1])], max_seq_len)[0],
        ),
        cut=round(sum(map(bool, removed)) * rows / n),
        sampled=n,
        total_low=math.floor(total - half),
        total_high=math.ceil(total + half),
    )


def steps(
    lengths: Sequence[int],
    *,
    batch_size: int,
    micro_batch_size: int | None,
    epochs: int,
    max_seq_len: int | None,
    packed: bool,
    max_steps: int | None = None,
    drop_last: bool = True,
    n_rows: int | None = None,
    longest: int | None = None,
) -> Steps:
    """Steps on one device. A batch is of samples, or of packs where they are packed: neither is taken for the other.

    Samples are cut to max_seq_len; a pack is padded to it, and a pass of samples to the longest of them.
    """
    micro = micro_batch_size or batch_size
    assert batch_size % micro == 0, f"micro_batch_size {micro} does not divide batch_size {batch_size}"
    kept = cut(lengths, max_seq_len)
    rows = n_rows or len(kept)
    packs = round(count_packs(kept, max_seq_len) * rows / len(kept)) if max_seq_len else None

    def epoch_steps(n: int) -> int:
        return n // batch_size if drop_last else math.ceil(n / batch_size)

    if packed:
        assert packs and max_seq_len, "packs have max_seq_len"
        n, width, most = packs, lambda _: max_seq_len, max_seq_len
    else:
        n, width, most = rows, lambda n: expected_longest(kept, n), cut([max(longest or 0, *kept)], max_seq_len)[0]
    per_epoch = epoch_steps(n)
    used = min(per_epoch * batch_size, n)
    passes, rest = divmod(used, micro)
    padded = passes * micro * width(micro) + (rest * width(rest) if rest else 0)
    tokens = used * fmean(kept) * rows / n
    return Steps(
        packed=packed,
        per_epoch=per_epoch,
        total=min(per_epoch * epochs, max_steps or per_epoch * epochs),
        per_epoch_padded=epoch_steps(rows),
        per_epoch_packed=epoch_steps(packs) if packs else None,
        packs=packs,
        micro_batch=micro,
        grad_accum=batch_size // micro,
        samples_per_step=used * rows / n / per_epoch if per_epoch else 0.0,
        dropped=n - used,
        tokens_per_step_mean=tokens / per_epoch if per_epoch else 0.0,
        tokens_longest_pass=min(micro, used) * most,
        padding_share=max(0.0, 1 - tokens / padded) if padded else 0.0,
    )


def cut(lengths: Sequence[int], max_seq_len: int | None) -> list[int]:
    """Lengths after all beyond max_seq_len is cut off; null: nothing."""
    return [min(length, max_seq_len) for length in lengths] if max_seq_len else list(lengths)


def count_packs(lengths: Sequence[int], max_seq_len: int, *, split_across_pack: bool = False) -> int:
    """Packs that torchtune 0.6.1's PackedDataset makes of samples in this order, none longer unless they are split.

    A sample that does not fit begins the next pack, or is split over both.
    """
    if split_across_pack:
        return math.ceil(sum(lengths) / max_seq_len)
    ends, packs, start = list(accumulate(lengths, initial=0)), 0, 0
    assert max(lengths, default=0) <= max_seq_len, f"a sample has {max(lengths)} tokens, a pack {max_seq_len}"
    while start < len(lengths):
        start = bisect_right(ends, ends[start] + max_seq_len) - 1
        packs += 1
    return packs


def expected_longest(lengths: Sequence[int], n: int) -> float:
    """Expected tokens of the longest of n samples drawn without replacement: what a pass of them is padded to."""
    n = min(n, len(lengths))
    chance, expected = n / len(lengths), 0.0
    for rank, length in zip(range(len(lengths), n - 1, -1), sorted(lengths, reverse=True), strict=False):
        expected += chance * length
        chance *= (rank - n) / max(rank - 1, 1)  # C(rank - 2, n - 1) / C(rank - 1, n - 1)
    return expected
