"""What the settings of a run change, and what they leave as it is: packs, validation, what spares memory or time."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from chiplog.checks.dataset import check_dataset
from chiplog.estimate.workload import training_steps
from tests.recipes.helpers import adapter, begin, events, finetune, make_model, same, start, write_splits
from trainer.batches import collate, collate_packs, data_order, pack, seed_of
from trainer.chat import Example
from trainer.job import UserError


def test_packs_hold_whole_samples_in_their_order():
    samples = [Example([1] * n, 1) for n in (4, 3, 3, 10, 2, 9)]
    packs = pack(samples, 10)
    assert [[len(sample.ids) for sample in each] for each in packs] == [[4, 3, 3], [10], [2], [9]]
    assert [sample for each in packs for sample in each] == samples


def test_a_packed_line_restarts_positions_and_hides_samples_from_each_other():
    batch = collate_packs([[Example([5, 6, 7], 1), Example([8, 9], 0)]], pad_id=0, max_seq_len=7)
    assert batch.positions is not None and batch.samples is not None and batch.mask is not None
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, -100, 9, -100, -100, -100]]
    assert batch.positions.tolist()[0][:5] == [0, 1, 2, 0, 1]
    assert batch.samples.tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert batch.mask[0].int().tolist()[:5] == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_packed_and_padded_samples_have_the_same_loss_and_gradients(family: str, settings: dict, tmp_path: Path):
    shape = {"head_dim": 8, "sliding_window": 8} if family == "gemma2" else {}
    settings |= {"model": str(make_model(tmp_path / "model", family, **shape)), "max_seq_len": 48}
    run = begin(settings, tmp_path / "run")
    for name, weight in run.adapter.items():
        if "lora_b" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    samples = run.samples[:9]
    found = []
    for batch in (
        collate(samples, run.pad_id),
        collate_packs(pack(samples, 48), run.pad_id, 48),
        collate_packs(pack(samples[::-1], 48), run.pad_id, 48),
    ):
        assert batch.label_tokens == sum(len(sample.ids) - sample.n_prompt for sample in samples)
        loss = run._gradients([batch], batch.label_tokens)
        found.append((loss, torch.cat([p.grad.flatten() for p in run.adapter.values()])))
        run.optimizer.zero_grad()
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-5, rtol=1e-4)


def test_packed_steps_are_counted_as_packs_and_as_the_planner_counts_them(
    settings: dict, words: Path, llama: Path, tmp_path: Path
):
    settings |= {"packed": True, "max_seq_len": 48, "batch_size": 2, "micro_batch_size": 1}
    report = check_dataset(words, model=llama).splits["train"]
    assert report.tokens
    counted = training_steps(settings, report.tokens.lengths, report.rows, report.tokens.max)
    assert counted.packs
    finetune(settings, tmp_path)
    (begun,), took = events(tmp_path, "start"), events(tmp_path, "step")
    assert (begun["n_samples"], begun["n_packs"]) == (40, counted.packs)
    assert (
        (begun["steps_per_epoch"], begun["total_steps"])
        == (counted.per_epoch, counted.total)
        == (
            counted.packs // 2,
            len(took),
        )
    )
    assert {step["padded_tokens"] for step in took} == {2 * 48}
    assert {step["longest_pass_tokens"] for step in took} == {counted.tokens_longest_pass} == {48}
    assert fmean(step["samples"] for step in took) == pytest.approx(counted.samples_per_step, rel=0.1)
    assert all(step["samples"] > 2 for step in took)


def test_a_batch_of_more_packs_than_there_are_is_refused(settings: dict, tmp_path: Path):
    with pytest.raises(UserError, match="batch_size 40 is more than the 10 packs of the 40 samples: lower it"):
        begin(settings | {"packed": True, "batch_size": 40}, tmp_path)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile
@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"chunked_loss": False},
        {"deterministic": True},
        {"compile": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_spares_memory_or_time_leaves_the_losses_as_they_are(
    changes: dict, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # no C++ compiler is needed then
    settings |= {"max_steps": 6, "lora_dropout": 0.0 if "compile" in changes else 0.2}
    finetune(settings, tmp_path / "plain")
    try:
        finetune(settings | changes, tmp_path / "changed")
        assert torch.are_deterministic_algorithms_enabled() == ("deterministic" in changes)
    finally:
        torch.use_deterministic_algorithms(False)
    plain, changed = ([e["loss"] for e in events(tmp_path / name, "step")] for name in ("plain", "changed"))
    assert changed == pytest.approx(plain, abs=1e-5)
    if changes.keys() & {"activation_checkpointing", "deterministic"}:
        assert same(adapter(tmp_path / "plain"), adapter(tmp_path / "changed"))


def test_a_validation_is_recorded_and_the_best_adapter_kept_apart(settings: dict, tmp_path: Path):
    data = write_splits(tmp_path / "words.json")
    settings |= {"dataset": str(data), "val_split": "validation", "run_val_every_n_steps": 5, "max_steps": 13}
    settings |= {"lr": 0.05, "lr_schedule": "constant"}  # so much that it gets worse at times
    finetune(settings, tmp_path / "run")
    found = events(tmp_path / "run", "validation")
    assert [e["step"] for e in found] == [5, 10, 13]
    assert {e["samples"] for e in found} == {10}
    assert [e["best"] for e in found] == [
        e["loss"] == min(each["loss"] for each in found[: i + 1]) for i, e in enumerate(found)
    ]
    best = min(found, key=lambda e: e["loss"])
    kept = json.loads((tmp_path / "run" / "best" / "validation.json").read_text())
    assert kept == {"step": best["step"], "loss": best["loss"]}
    # The best adapter is that of its step: a run that ends there has it.
    finetune(settings | {"max_steps": best["step"]}, tmp_path / "shorter")
    assert same(adapter(tmp_path / "run", "best"), adapter(tmp_path / "shorter"))
    # Training goes the same way with and without validation.
    finetune(settings | {"val_split": None, "run_val_every_n_steps": None}, tmp_path / "without")
    assert same(adapter(tmp_path / "run"), adapter(tmp_path / "without"))


def test_the_validation_loss_is_the_mean_over_label_tokens_whatever_the_micro_batch(settings: dict, tmp_path: Path):
    settings |= {"dataset": str(write_splits(tmp_path / "w.json")), "val_split": "validation", "max_steps": 2}
    losses = []
    for i, changes in enumerate(({}, {"micro_batch_size": 1}, {"lora_dropout": 0.5, "lr": 0.0})):
        run = finetune(settings | changes, tmp_path / str(i))
        losses.append(events(tmp_path / str(i), "validation")[0]["loss"])
        batch = collate([sample for line in run.val_lines for sample in line], run.pad_id)
        run.model.eval()
        with torch.no_grad():
            logits = torch.cat(run.model(batch.tokens), dim=1).flatten(0, 1)
        assert losses[-1] == pytest.approx(
            torch.nn.functional.cross_entropy(logits, batch.labels.flatten()).item(), abs=1e-5
        )
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_validation_of_a_split_that_is_not_there_is_refused(settings: dict, tmp_path: Path):
    with pytest.raises(ValueError, match="has no split validation"):
        begin(settings | {"val_split": "validation"}, tmp_path)
    with pytest.raises(UserError, match="run_val_every_n_steps is given and val_split is null: name the split"):
        begin(settings | {"run_val_every_n_steps": 5}, tmp_path)


def test_the_recipe_with_validation_runs_by_its_path(settings: dict, tmp_path: Path):
    settings |= {"dataset": str(write_splits(tmp_path / "words.json")), "max_steps": 4}
    settings |= {"val_split": "validation", "run_val_every_n_steps": 2}
    job = start("recipes/lora_finetune_single_device_val.py", settings, tmp_path / "run")
    _, log = job.communicate(timeout=120)
    assert job.returncode == 0, log
    assert [e["step"] for e in events(tmp_path / "run", "validation")] == [2, 4]
    assert "Validation loss after step 4: " in log
    assert events(tmp_path / "run", "start")[0]["recipe"] == "lora_finetune_single_device_val"


def test_every_line_of_a_step_says_what_the_run_did(settings: dict, tmp_path: Path):
    finetune(settings | {"max_steps": 3}, tmp_path)
    for line in events(tmp_path, "step"):
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
        assert {"loss", "lr", "tokens", "seconds", "peak_mem_bytes", "mem_kind"} <= line.keys()


def test_seeds_beyond_32_bits_and_their_neighbours_have_orders_of_their_own():
    """torch's generator on the CPU reads the low 32 bits of a seed: by shifting, seeds 0 and 256 would be one."""
    orders = {tuple(data_order(40, seed, epoch)) for seed in (0, 1, 256, 2**24, 2**31, 2**32 - 1) for epoch in (0, 1)}
    assert len(orders) == 12
    assert seed_of(0, 1) != seed_of(1, 0) and max(seed_of(n) for n in range(99)) < 2**32


def test_gradients_do_not_depend_on_what_ran_before(settings: dict, tmp_path: Path):
    """Dropout follows from seed and step: a run that draws other numbers in between computes the same."""
    settings |= {"lora_dropout": 0.5, "max_steps": 4}
    finetune(settings, tmp_path / "plain")
    run = begin(settings, tmp_path / "drawn")
    step: Any = run._optimizer_step

    def drawing(*arguments: Any) -> Any:
        torch.rand(7)
        return step(*arguments)

    run._optimizer_step = drawing
    run.train(type("Never", (), {"asked": False}))
    assert same(adapter(tmp_path / "plain"), adapter(tmp_path / "drawn"))
