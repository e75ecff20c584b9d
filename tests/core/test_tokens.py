"""Tokens and steps from the lengths of samples, by numbers worked out by hand and by drawing many samples."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiplog.checks import samples
from chiplog.checks.dataset import check_dataset
from chiplog.checks.row_index import RowIndex
from chiplog.checks.samples import Lengths, read_samples
from chiplog.estimate.tokens import Quantiles, TokenStats, count_packs, expected_longest, steps, token_stats
from chiplog.ledger import Ledger
from chiplog.planning import make_plan, make_request
from chiplog.record import Record, State, Usage
from chiplog.settings import load_settings
from chiplog.sizing import PlannedRun
from tests.conftest import make_words

USUAL: dict[str, Any] = {"micro_batch_size": None, "epochs": 1, "max_seq_len": 2048, "packed": False}
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def drawn(rng: random.Random, n: int, spread: float = 1.0) -> list[int]:
    """Lengths with a long tail, as samples of a chat have them: log-normal about 100 tokens."""
    return [max(1, round(100 * math.exp(rng.gauss(0, spread)))) for _ in range(n)]


def test_the_counts_of_a_split_are_of_what_is_left_after_it_is_cut():
    lengths, labels = [10, 40, 20, 30], [4, 25, 5, 9]
    whole = Quantiles(p5=10, p25=10, p50=20, p75=30, p95=40, p99=40, max=40)
    assert token_stats(lengths, labels) == TokenStats(
        rows=4, total=100, label_total=43, mean=25.0, quantiles=whole, cut=0, sampled=4, total_low=100, total_high=100
    )
    # At 20 the second loses 20 of its 25 label tokens and the fourth all 9; what fits to the token is not cut.
    short = Quantiles(p5=10, p25=10, p50=20, p75=20, p95=20, p99=20, max=20)
    assert token_stats(lengths, labels, max_seq_len=20) == TokenStats(
        rows=4, total=70, label_total=14, mean=17.5, quantiles=short, cut=2, sampled=4, total_low=70, total_high=70
    )


def test_a_sample_stands_for_all_rows_with_an_interval_worked_out_by_hand():
    found = token_stats([10, 20] * 5_000, [5, 5] * 5_000, max_seq_len=15, n_rows=40_000, longest=99)
    assert (found.rows, found.sampled, found.total, found.label_total) == (40_000, 10_000, 500_000, 100_000)
    assert (found.cut, found.quantiles.max) == (20_000, 15)
    # Lengths 10 and 15 spread by 2.5; 1.645 x 2.5 / 100 x sqrt(1 - 1/4) x 40,000 = 1,424.
    assert (found.total_low, found.total_high) == (500_000 - 1_425, 500_000 + 1_425)
    assert token_stats([10], [5], n_rows=1, longest=99).quantiles.max == 99


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_nine_of_ten_intervals_hold_the_total_of_all_rows(spread: float):
    lengths, n_seeds, held = drawn(random.Random(1), 10_000, spread), 1_000, 0
    for seed in range(n_seeds):
        some = random.Random(seed).sample(lengths, 2_000)
        found = token_stats(some, some, n_rows=len(lengths))
        held += found.total_low <= sum(lengths) <= found.total_high
    assert 0.87 <= held / n_seeds <= 0.93  # 3 standard deviations of 1,000 draws


def test_of_many_rows_a_random_sample_is_kept_in_their_order():
    kept = [0] * 40
    for seed in range(2_000):
        lengths = Lengths(most=10, seed=seed)
        for number in range(40):
            if lengths.wants():
                lengths.add(SimpleNamespace(ids=[0] * (number + 1), n_prompt=0))
        assert sorted(lengths.tokens) == list(lengths.tokens) and len(lengths.tokens) == len(lengths.labels) == 10
        for number in lengths.tokens:
            kept[number - 1] += 1
    # Each is kept by a quarter of the seeds: 500, give or take 4 standard deviations of 19.4.
    assert all(abs(n - 500) < 78 for n in kept)


def test_of_a_huge_split_the_longest_row_is_found_and_the_total_has_an_interval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "COUNTED", 2_000)
    sizes, counted = drawn(random.Random(2), 20_000, 0.5), []
    rows = [{"text": f"{number:06}" + "x" * size} for number, size in enumerate(sizes)]

    def count(row: dict[str, str]) -> SimpleNamespace:
        counted.append(row)
        return SimpleNamespace(ids=range(len(row["text"])), n_prompt=0)

    with RowIndex() as index:
        found = read_samples(rows, "train", index, count).tokens
    total = sum(sizes) + 6 * len(sizes)
    assert found and found.sampled == 2_000 == len(found.lengths)
    assert found.total_low and found.total_high
    # One draw in ten lies outside its interval, one in a thousand outside twice that.
    assert abs(found.total - total) < found.total_high - found.total_low < 0.05 * total
    assert found.max == max(sizes) + 6
    assert abs(found.label - (found.total - len(sizes))) <= 1  # of a text all is learnt but the first token
    assert len(counted) < 2_000 * (1 + math.log(10)) * 1.1  # the cost grows with the logarithm of the rows


def test_a_split_that_can_be_counted_whole_is(lab: Path):
    found = check_dataset(lab / "data" / "words.json", model=lab / "models" / "small").splits["train"].tokens
    assert found and (found.sampled, found.total_low, found.total_high) == (None, None, None)
    assert sum(found.lengths) == found.total and "lengths" not in json.loads(found.model_dump_json())
    assert samples.COUNTED >= 2_000


def test_padded_steps_by_hand():
    found = steps([2, 4, 6, 8, 10], batch_size=4, micro_batch_size=2, epochs=3, max_seq_len=8, packed=False)
    # Cut to 2 4 6 8 8. Of the ten pairs, four have a 6, 4 or both as their longest: 4 once, 6 twice, 8 seven times.
    width = (4 + 2 * 6 + 7 * 8) / 10
    assert found.model_dump() == dict(
        packed=False, per_epoch=1, total=3, per_epoch_padded=1, per_epoch_packed=1, packs=4, micro_batch=2,
        grad_accum=2, samples_per_step=4.0, dropped=1, tokens_per_step_mean=pytest.approx(4 * 5.6),
        tokens_longest_pass=16, padding_share=pytest.approx(1 - 5.6 / width),
    )  # fmt: skip
    assert found.tokens == round(3 * 4 * 5.6)


def test_packed_steps_by_hand():
    found = steps([3, 3, 3, 5, 2, 1], batch_size=2, micro_batch_size=1, epochs=2, max_seq_len=8, packed=True)
    # 3 3 | 3 5 | 2 1: three packs of 8, of which a step takes two and one is left over.
    assert found.model_dump() == dict(
        packed=True, per_epoch=1, total=2, per_epoch_padded=3, per_epoch_packed=1, packs=3, micro_batch=1,
        grad_accum=2, samples_per_step=pytest.approx(4.0), dropped=1, tokens_per_step_mean=pytest.approx(2 * 17 / 3),
        tokens_longest_pass=8, padding_share=pytest.approx(1 - 17 / 24),
    )  # fmt: skip


def test_where_nothing_is_dropped_the_last_batch_is_smaller():
    found = steps([5] * 10, batch_size=4, drop_last=False, **USUAL)
    assert (found.per_epoch, found.dropped, found.tokens) == (3, 0, 50)
    assert found.tokens_per_step_mean == pytest.approx(50 / 3) and found.padding_share == 0


def test_fewer_samples_than_a_batch_take_no_step():
    found = steps([5] * 3, batch_size=4, **USUAL)
    assert (found.total, found.dropped, found.tokens, found.tokens_longest_pass) == (0, 3, 0, 0)


def test_max_steps_ends_a_run_within_its_epochs():
    assert steps([5] * 100, batch_size=10, max_steps=7, **USUAL).total == 7
    assert steps([5] * 100, batch_size=10, max_steps=70, **USUAL).total == 10


def test_without_a_length_to_cut_to_there_are_no_packs():
    found = steps([5, 9], **{**USUAL, "batch_size": 2, "max_seq_len": None})
    assert (found.packs, found.per_epoch_packed, found.tokens_longest_pass) == (None, None, 18)


def test_steps_of_packed_samples_are_not_steps_of_padded_ones():
    # The prior run on record: 4,000 samples of 55 tokens, 37 of which fill a pack of 2,048, one a step: 109 steps.
    prior = steps([55] * 4_000, batch_size=1, **USUAL | {"packed": True})
    assert (prior.total, prior.packs, prior.per_epoch_padded) == (109, 109, 4_000)
    assert prior.samples_per_step == pytest.approx(4_000 / 109) and prior.tokens == 4_000 * 55
    packed = steps([55] * 4_000, batch_size=4, **USUAL | {"packed": True})
    padded = steps([55] * 4_000, batch_size=4, **USUAL)
    assert (packed.total, padded.total) == (27, 1_000) == (padded.per_epoch_packed, packed.per_epoch_padded)
    # What a pass holds: four full packs against four short samples.
    assert (packed.tokens_longest_pass, padded.tokens_longest_pass) == (4 * 2_048, 4 * 55)


def test_the_plan_of_10_000_words_takes_its_steps_from_samples(lab: Path):
    make_words_of(lab / "data" / "words.json", n_train=8_000)
    one, three = (planned(batch_size=batch, epochs=3) for batch in (16, 8))
    assert (one.steps, three.steps) == (1_500, 3_000)
    assert one.trained and three.trained and not one.trained.packed
    assert one.trained.tokens == three.trained.tokens == 24_000 * 39  # 29 characters about twice a word of 5


def test_seconds_of_packed_steps_are_no_evidence_for_padded_ones(lab: Path):
    make_words_of(lab / "data" / "words.json", n_train=8_000)
    asked = {"batch_size": 16, "epochs": 3}
    run = planned(**asked).run
    times = {"elapsed_s": 25.0, "setup_s": 1.0, "train_s": 20.0, "eval_s": 1.0, "eval_samples": 10}
    used = Usage(device="cpu", cpus=1, gpus=0, steps=109, tokens=4_000 * 55, **times)
    record = Record(
        key="local:1", experiment="before", run="S", kind="finetune", recipe=run.recipe, state=State.COMPLETED,
        model=run.config["model"],
        config=run.config | {"epochs": 1, "packed": True}, usage=used,
    )  # fmt: skip
    Ledger().put([record])
    found = planned(**asked)
    assert found.steps == 1_500 and found.estimate.elapsed is None
    Ledger().put([record.model_copy(update={"key": "local:2", "config": run.config | {"epochs": 1}})])
    assert (padded := planned(**asked).estimate.elapsed) and padded.n_evidence == 1


def make_words_of(file: Path, n_train: int) -> None:
    """Words of five letters, every one different."""
    spelt = [f"{number:05}".translate(str.maketrans("0123456789", "abcdefghij")) for number in range(n_train + 20)]
    rows = [{"input": word, "output": word.capitalize()} for word in spelt]
    file.write_text(json.dumps({"train": rows[:n_train], "validation": rows[-20:-10], "test": rows[-10:]}))


def planned(**controls: Any) -> PlannedRun:
    ask = {"question": "q", "name": "p", "models": {"S": "small"}, "dataset": "words", "controls": controls}
    return make_plan(make_request(ask), load_settings(), Ledger()).rows[0]


def test_a_plan_says_how_its_steps_come_from_the_samples(lab: Path):
    make_words(lab / "data" / "words.json", n_train=22)
    found = planned(batch_size=4, micro_batch_size=2, epochs=2).trained
    assert found and (found.per_epoch, found.total, found.dropped, found.grad_accum) == (5, 10, 2, 2)
    assert found.tokens == 2 * 20 * (29 + 2 * 6) and found.tokens_longest_pass == 2 * 41


@given(LENGTHS, st.integers(1, 60))
def test_the_expected_longest_lies_between_the_mean_and_the_longest(lengths: list[int], n: int):
    found = expected_longest(lengths, n)
    assert sum(lengths) / len(lengths) - 1e-9 <= found <= max(lengths) + 1e-9
    assert n < len(lengths) or found == pytest.approx(max(lengths))
    assert n > 1 or found == pytest.approx(sum(lengths) / len(lengths))


@given(LENGTHS, st.integers(50, 200))
def test_packs_hold_all_tokens_and_splitting_never_needs_more(lengths: list[int], max_seq_len: int):
    least = math.ceil(sum(lengths) / max_seq_len)
    assert count_packs(lengths, max_seq_len, split_across_pack=True) == least
    assert least <= count_packs(lengths, max_seq_len) <= len(lengths)
    assert count_packs(lengths, max_seq_len) <= 2 * least  # two neighbours that share no pack are more than one


@given(LENGTHS, st.integers(1, 8), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(5, 60))
def test_no_sample_is_lost_and_padding_is_a_share(
    lengths: list[int], micro: int, accum: int, packed: bool, drop_last: bool, max_seq_len: int
):
    found = steps(
        lengths, batch_size=micro * accum, micro_batch_size=micro, epochs=1, max_seq_len=max_seq_len, packed=packed,
        drop_last=drop_last,
    )  # fmt: skip
    there = found.packs if packed else len(lengths)
    assert there == pytest.approx(
        found.dropped + found.samples_per_step * found.per_epoch * (there or 0) / len(lengths)
    )
    assert -1e-9 <= found.padding_share < 1 and found.dropped < micro * accum
    assert found.tokens_per_step_mean <= micro * accum * max_seq_len + 1e-9
    assert drop_last or (found.dropped == 0 and found.per_epoch >= 1)


def test_a_sample_of_the_lengths_gives_the_steps_of_all_rows():
    lengths = drawn(random.Random(3), 50_000, 0.8)
    some = [lengths[i] for i in sorted(random.Random(4).sample(range(50_000), 20_000))]
    asked = {"batch_size": 16, **USUAL, "epochs": 2}
    for packed in (False, True):
        all_rows = steps(lengths, **asked | {"packed": packed})
        found = steps(some, **asked | {"packed": packed}, n_rows=50_000, longest=max(lengths))
        assert (found.total, found.tokens_longest_pass) == (
            pytest.approx(all_rows.total, rel=0 if not packed else 0.02),
            all_rows.tokens_longest_pass,
        )
        assert found.tokens == pytest.approx(all_rows.tokens, rel=0.02)
        assert found.padding_share == pytest.approx(all_rows.padding_share, abs=0.02)
