"""Steps and tokens that the planner counts are those that torchtune packs and the recipe trains on."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchtune.data import padded_collate_packed
from torchtune.datasets import PackedDataset

from chiplog.checks.dataset import check_dataset
from chiplog.checks.row_index import RowIndex
from chiplog.checks.samples import read_samples
from chiplog.estimate.tokens import count_packs, steps, token_stats
from chiplog.estimate.workload import training_steps
from tests.recipes.helpers import events, finetune
from trainer.batches import collate, data_order
from trainer.chat import ChatTokenizer, Example
from trainer.rows import read_rows


class Samples(Dataset):
    """Samples of these lengths, as torchtune's data sets give them."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        if i >= len(self.lengths):
            raise IndexError(i)
        return {"tokens": [i + 1] * self.lengths[i], "labels": [i + 1] * self.lengths[i]}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_packs_are_as_many_as_torchtune_makes(seed: int, split: bool):
    rng = random.Random(seed)
    max_seq_len = rng.choice([16, 37, 64])
    longest = 3 * max_seq_len if split else max_seq_len
    lengths = [rng.choice([rng.randint(1, longest), rng.randint(1, 6), max_seq_len]) for _ in range(rng.randint(1, 90))]
    packed = PackedDataset(Samples(lengths), max_seq_len=max_seq_len, split_across_pack=split)
    assert count_packs(lengths, max_seq_len, split_across_pack=split) == len(packed)


@pytest.mark.parametrize(("micro", "accum"), [(1, 1), (4, 1), (2, 3)])
def test_packed_steps_and_padding_are_those_of_torchtunes_loader(micro: int, accum: int):
    rng = random.Random(micro)
    lengths = [rng.randint(1, 30) for _ in range(200)]
    packed = PackedDataset(Samples(lengths), max_seq_len=64)
    loader = DataLoader(packed, batch_size=micro, drop_last=True, collate_fn=padded_collate_packed)
    found = steps(lengths, batch_size=micro * accum, micro_batch_size=micro, epochs=1, max_seq_len=64, packed=True)
    assert found.per_epoch == len(loader) // accum  # the line of its recipes: _steps_per_epoch
    assert {batch["tokens"].numel() for batch in loader} == {found.tokens_longest_pass}
    tokens = torch.stack([torch.as_tensor(pack["tokens"]) for pack in packed.packs])
    assert found.padding_share == pytest.approx(float((tokens == 0).float().mean()))


@pytest.mark.parametrize(("batch_size", "micro"), [(8, 8), (8, 2), (6, 3), (4, 1)])
def test_padding_is_what_the_recipe_pads_over_many_orders(batch_size: int, micro: int):
    rng = random.Random(batch_size)
    examples = [Example([1] * min(rng.randint(2, 60), 40), 1) for _ in range(99)]
    lengths = [len(example.ids) for example in examples]
    found = steps(lengths, batch_size=batch_size, micro_batch_size=micro, epochs=1, max_seq_len=40, packed=False)
    shares, widest = [], 0
    for epoch in range(200):
        used = data_order(len(examples), 0, epoch)[: found.per_epoch * batch_size]
        passes = [collate([examples[j] for j in used[i : i + micro]], 0).tokens for i in range(0, len(used), micro)]
        assert len(passes) == found.per_epoch * found.grad_accum
        shares.append(1 - sum(lengths[j] for j in used) / sum(tokens.numel() for tokens in passes))
        widest = max(widest, *(tokens.numel() for tokens in passes))
    assert fmean(shares) == pytest.approx(found.padding_share, abs=0.003)
    assert widest == found.tokens_longest_pass


@pytest.mark.parametrize("change", [{}, {"max_seq_len": 12, "micro_batch_size": 2}, {"max_steps": 13, "batch_size": 5}])
def test_a_run_takes_the_steps_and_the_tokens_that_were_counted(
    change: dict[str, Any], settings: dict[str, Any], words: Path, llama: Path, tmp_path: Path
):
    config = settings | change
    report = check_dataset(words, model=llama).splits["train"]
    assert report.tokens
    if "max_seq_len" in change:  # cuts some answers, and leaves each prompt something to be learnt
        prompts = [ChatTokenizer(llama).row_example(row, None, "{input}").n_prompt for row in read_rows(words, "train")]
        config["max_seq_len"] = max(prompts) + 2
        assert config["max_seq_len"] < report.tokens.max
    counted = training_steps(config, report.tokens.lengths, report.rows, report.tokens.max)
    finetune(config, tmp_path)
    (start,), took = events(tmp_path, "start"), events(tmp_path, "step")
    assert (
        (start["steps_per_epoch"], start["total_steps"])
        == (counted.per_epoch, counted.total)
        == (
            counted.per_epoch,
            len(took),
        )
    )
    assert {step["samples"] for step in took} == {counted.samples_per_step}
    assert max(step["padded_tokens"] for step in took) <= counted.tokens_longest_pass * counted.grad_accum
    stats = statistics_of(words, llama, config["max_seq_len"])
    assert stats.cut == start["n_truncated"]
    if "max_steps" not in change:  # whole epochs, in which every sample comes once
        assert sum(step["tokens"] for step in took) == counted.tokens == config["epochs"] * stats.total
        assert sum(step["label_tokens"] for step in took) == config["epochs"] * stats.label_total


def statistics_of(words: Path, llama: Path, max_seq_len: int):
    tokenizer = ChatTokenizer(llama)
    with RowIndex() as index:
        read = read_samples(
            read_rows(words, "train"), "train", index, lambda r: tokenizer.row_example(r, None, "{input}")
        )
    return token_stats(read.lengths.tokens, read.lengths.labels, max_seq_len=max_seq_len)
