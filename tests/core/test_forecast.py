"""The estimator's physics, and what past runs make of it: worked cases of which the truth is known, and properties."""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiplog.estimate import evidence, forecast, memory, speed
from chiplog.estimate.batch import largest_batch, micro_batches
from chiplog.estimate.effects import Effects, Observation, Sizes
from chiplog.estimate.gpus import gpu
from chiplog.estimate.job import Job
from chiplog.estimate.shapes import find

GIB = 2**30


SIZES = Sizes(parts=((0.3, 0.3), (0.2, 0.2)), whole=(0.1, 0.1))


def job(model: str = "llama-3.2-1b", **given: Any) -> Job:
    """torchtune's LoRA recipe at rank 64, packed, as its logs state it."""
    shape = find(model)
    assert shape
    usual = {
        "framework": "torchtune", "model": model, "shape": shape, "method": "lora", "rank": 64, "micro_batch": 4,
        "targets": {"q", "v", "o", "mlp"}, "seq_len": 2048, "packed": True, "loss": "chunked", "dropout": False,
        "gpu": "a100-80gb-sxm",
    }  # fmt: skip
    return Job(**{**usual, **given})


def test_memory_after_init_is_weights_and_adapters_and_far_below_the_peak():
    """torchtune's line of 2.41 GiB: what a run holds before its first step, once read as what it needs."""
    one = job(micro_batch=1)
    rope = 32 << 20
    after_init = 2 * (one.shape.n_params + memory.trained_params(one)) + rope
    assert memory.trained_params(one) == 42_467_328
    assert after_init / GIB == pytest.approx(2.412, abs=5e-4)
    assert memory.peak(one).total > 2.5 * after_init


@pytest.mark.parametrize(("batch", "card", "fits"), [(16, "a100-80gb-sxm", False), (8, "a100-40gb-sxm", False),
                                                     (4, "a100-40gb-sxm", True)])  # fmt: skip
def test_a_1b_model_packed_to_2048(batch: int, card: str, fits: bool):
    """Runs that ended out of memory, or did not."""
    held = memory.peak(job(micro_batch=batch, gpu=card, memory_kind="reserved")).total
    assert (held <= gpu(card).memory_bytes) is fits


def test_a_token_of_the_batch_costs_two_and_a_half_megabytes():
    a, b = (memory.peak(job(micro_batch=batch)).total for batch in (8, 16))
    assert (b - a) / (8 * 2048) == pytest.approx(2.55e6, rel=0.05)


sizes = st.integers(1, 64)


@given(batch=sizes, length=st.integers(64, 8192), rank=st.integers(1, 256), more=st.integers(1, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_memory_never_falls(batch: int, length: int, rank: int, more: int, data: st.DataObject):
    """As batch, length or rank rise, whatever the runs on record said of the parts."""
    runs = data.draw(st.lists(st.tuples(sizes, st.floats(0.3, 3)), max_size=6))
    past = [
        forecast.Measured(job(micro_batch=b), "lab", f"run {i}", peak_bytes=memory.peak(job(micro_batch=b)).total * by)
        for i, (b, by) in enumerate(runs)
    ]
    known = forecast.effects("memory", past)
    given = {
        "micro_batch": batch,
        "seq_len": length,
        "rank": rank,
        "checkpointing": data.draw(st.sampled_from(["none", "full"])),
    }
    base = forecast.forecast("memory", job(**given), "lab", known).value
    for key in ("micro_batch", "seq_len", "rank"):
        assert forecast.forecast("memory", job(**{**given, key: given[key] + more}), "lab", known).value >= base * (
            1 - 1e-9
        )


def test_intervals_are_nested_in_coverage():
    known = forecast.effects("memory", [evidence.measured(row) for row in evidence.shipped()[:30]])
    widths = []
    for coverage in (0.5, 0.8, 0.9, 0.95):
        told = forecast.forecast("memory", job(), "lab", known, coverage=coverage)
        widths.append((told.low, told.high))
        assert told.low <= told.high
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(widths))


def test_runs_on_record_are_believed_the_more_the_more_alike_they_are():
    """A run that took twice what was computed: the same recipe follows it, another framework hardly."""
    past = [forecast.Measured(job(micro_batch=b), "lab", str(b), peak_bytes=2 * memory.peak(job(micro_batch=b)).total)
            for b in (2, 8)]  # fmt: skip
    known = forecast.effects("memory", past)

    def factor(other: Job, place: str) -> float:
        return forecast.forecast("memory", other, place, known).value / memory.peak(other).total

    same, elsewhere, foreign = factor(job(), "lab"), factor(job(), "other"), factor(job(framework="peft"), "other")
    assert 1.8 < same < 2.1 and 1.0 < elsewhere < same and 0.9 < foreign < elsewhere
    assert (
        forecast.forecast("memory", job(), "lab", known).spread < forecast.forecast("memory", job(), "x", known).spread
    )


def test_two_batches_tell_what_grows_with_the_batch_from_what_does_not():
    """Weights are as computed and activations half as large again: the largest batch shows it."""

    def truth(batch: int) -> float:
        parts = memory.peak(job(micro_batch=batch))
        return parts.weights + parts.states + 1.5 * (parts.layers + parts.head)

    past = [forecast.Measured(job(micro_batch=b), "lab", str(b), peak_bytes=truth(b)) for b in (1, 2, 4, 8)]
    told = forecast.forecast("memory", job(micro_batch=32), "lab", forecast.effects("memory", past))
    assert told.value == pytest.approx(truth(32), rel=0.06)


def test_more_exchangeable_history_does_not_widen_intervals():
    """Over many draws; by no more than the standard error of the mean width."""
    few, many = [], []
    for seed in range(40):
        dice = random.Random(seed)
        drawn = [
            Observation(("a", n % 3), (share := dice.uniform(0.2, 0.8), 1 - share), dice.gauss(0.2, 0.1), 0.1)
            for n in range(24)
        ]
        widths = [Effects(drawn[:n], SIZES).shift(("a", 1)).spread((0.5, 0.5), 0.1) for n in (6, 24)]
        few.append(widths[0])
        many.append(widths[1])
    mean = sum(b - a for a, b in zip(few, many, strict=True)) / len(few)
    error = math.sqrt(sum((b - a - mean) ** 2 for a, b in zip(few, many, strict=True))) / len(few)
    assert mean <= error


def test_observations_that_come_later_are_as_if_all_had_come_at_once():
    drawn = [Observation((n % 2, n % 3), (0.4, 0.6), 0.1 * n, 0.05) for n in range(8)]
    at_once = Effects(drawn, SIZES, settled=0).shift((0, 1))
    for first in (0, 1, 5):
        later = Effects(drawn[:first], SIZES, settled=0).and_then(drawn[first:7]).and_then(drawn[7:]).shift((0, 1))
        assert later.mean == pytest.approx(at_once.mean) and later.covariance == pytest.approx(at_once.covariance)
        assert later.related == pytest.approx(at_once.related)


def test_an_outlier_counts_less():
    drawn = [Observation(("a", n), (0.5, 0.5), 0.1, 0.02) for n in range(8)]
    wild = Observation(("a", 9), (0.5, 0.5), 4.0, 0.02)
    shift = Effects([*drawn, wild], SIZES).shift(("a", 10))
    assert float(shift.mean @ [0.5, 0.5, 1.0]) == pytest.approx(0.1, abs=0.12)


def test_passes_take_longer_with_more_tokens_and_layers_and_less_on_a_faster_card():
    base = speed.one_pass(job())
    assert speed.one_pass(job(micro_batch=8)).total > base.total
    assert speed.one_pass(job("llama-3.2-3b")).total > base.total
    assert speed.one_pass(job(gpu="h100-80gb-sxm")).total < base.total
    assert sum(base.shares()) == pytest.approx(1.0)


@pytest.mark.parametrize(("known", "limit", "batch"), [
    ([(1, 11.0), (2, 12.0), (4, 14.0)], 22.5, 11), ([(1, 11.0), (2, 12.0)], 100.0, 3), ([(4, 14.0)], 100.0, 4),
    ([(4, 14.0), (8, 30.0)], 20.0, 4), ([(4, 14.0)], 10.0, None),
    ([(1, 11.0), (2, 12.0), *[(4, 14.0)] * 9], 22.5, 12), ([(16, 30.0), (32, 50.0), (64, 90.0)], 131.0, 88),
])  # fmt: skip
def test_the_largest_batch(known: list[tuple[int, float]], limit: float, batch: int | None):
    assert largest_batch(known, limit) == batch


@given(batch=st.integers(1, 512), largest=st.integers(1, 512))
def test_the_effective_batch_is_kept(batch: int, largest: int):
    micro, accumulation = micro_batches(batch, largest)
    assert micro * accumulation == batch and micro <= largest


def test_running_out_of_memory_is_evidence_that_more_was_needed():
    """As much more as the physics had fallen short; a run that was expected to run out tells nothing."""
    one = job(micro_batch=8, memory_kind="reserved")
    held = memory.peak(one).total

    def told(limit: float) -> forecast.Forecast:
        past = [forecast.Measured(one, "lab", "killed", above_bytes=limit)]
        return forecast.forecast("memory", one, "lab", forecast.effects("memory", past))

    unknown = forecast.forecast("memory", one, "lab", forecast.effects("memory", []))
    assert told(held / 20).value == pytest.approx(unknown.value, rel=1e-3)
    assert unknown.value < told(held).value < told(1.5 * held).value
    assert 1.3 * held < told(1.5 * held).value < 2.5 * held
    assert told(1.5 * held).spread < unknown.spread


@pytest.mark.parametrize("quantity", ["memory", "pass"])
def test_intervals_hold_on_made_runs(quantity: forecast.Quantity):
    """Runs that differ from the physics by effects as large as those fitted: nine in ten lie within, whether evidence
    is near or far, and of an interval for three in ten far fewer do."""
    dice, fit = random.Random(7), forecast.fitted(quantity)

    @functools.cache
    def effect(level: int, key: Any) -> list[float]:
        return [dice.gauss(0, size) for size in (*fit.sizes.parts[level], fit.sizes.whole[level])]

    def measured(one: Job, place: str) -> forecast.Measured:
        value, shares = forecast.computed(quantity, one)
        every = [effect(level, key) for level, key in enumerate(forecast.keys(quantity, one, place)) if key is not None]
        log = sum(sum(e * share for e, share in zip(of, (*shares, 1.0), strict=True)) for of in every)
        amount = value * math.exp(log + dice.gauss(0, fit.noise))
        peak, seconds = (amount, None) if quantity == "memory" else (None, amount)
        return forecast.Measured(one, place, place, peak_bytes=peak, pass_s=seconds)

    programs, models = ("peft", "torchtune", "litgpt", "unsloth"), ("llama-3.2-1b", "llama-3-8b", "qwen2.5-7b")
    cards = ("a100-80gb-sxm", "h100-80gb-sxm")
    places = [(f"place {n}", programs[n % 4], models[n % 3], cards[n % 2]) for n in range(24)]
    runs = {(place, program, model, card): [
        measured(job(model, framework=program, gpu=card, micro_batch=b, rank=8), place) for b in (1, 2, 4, 8)
    ] for place, program, model, card in places}  # fmt: skip
    hits: dict[bool, list[bool]] = {True: [], False: []}
    few: list[bool] = []
    for here, own in runs.items():
        foreign = [them for there, them in runs.items() if not set(here) & set(there)]
        others, run, place = [one for them in foreign for one in them], own[3], here[0]
        for past in (others, [*others, *own[:3]]):
            known, actual = forecast.effects(quantity, past), run.peak_bytes or run.pass_s or 0
            told = forecast.forecast(quantity, run.job, place, known)
            hits[told.near].append(told.low <= actual <= told.high)
            told = forecast.forecast(quantity, run.job, place, known, coverage=0.3)
            few.append(told.low <= actual <= told.high)
    assert all(len(some) == len(runs) and sum(some) / len(some) >= 0.85 for some in hits.values())
    assert 0.1 < sum(few) / len(few) < 0.7


@pytest.mark.parametrize(("text", "gpus", "divided", "shared"), [
    ("FSDP", 8, (8, 8, 8), 1), ("fsdp full_shard", 8, (8, 8, 8), 1), ("DeepSpeed ZeRO-3", 4, (4, 4, 4), 1),
    ("zero2", 4, (1, 4, 4), 1), ("SHARD_GRAD_OP", 8, (1, 8, 8), 1), ("ZeRO stage 1", 8, (1, 1, 8), 1),
    ("DDP", 8, (1, 1, 1), 1), ("none", 8, (1, 1, 1), 1), ("", 8, (1, 1, 1), 1), ("TP4 PP8", 64, (32, 32, 32), 32),
    ("tp=2", 8, (2, 2, 2), 2), ("TP2 distributed optimizer", 8, (2, 2, 8), 2), ("FSDP2", 8, (8, 8, 8), 1),
    ("FSDP4 CP2 TP8 PP8", 512, (512, 512, 512), 128), ("HYBRID_SHARD", 32, (8, 8, 8), 1), ("TP0", 1, (1, 1, 1), 1),
    ("model-parallel-size 8", 16, (8, 8, 8), 8), ("device_map='auto'", 2, (2, 2, 2), 2), ("ulysses", 4, (1, 1, 1), 4),
    ("ZeRO-3 SP 4", 16, (16, 16, 16), 4), ("TP8 SP", 8, (8, 8, 8), 8),
    ("FSDP of frozen weights", 8, (8, 1, 1), 1),
    ("tensor model parallel size 4 pipeline-model-parallel-size 2", 8, (8, 8, 8), 8),
])  # fmt: skip
def test_sharding_divides_what_it_says(text: str, gpus: int, divided: tuple[int, ...], shared: int):
    one = job(sharding=text, gpus=gpus)
    assert one.spread[:3] == divided and one.spread.sample == shared and one.copies == gpus // shared


def test_each_stage_of_zero_holds_less_on_a_card():
    stages = [job(method="full", sharding=text, gpus=8) for text in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")]
    held = [memory.moments(one)["step"].total for one in stages]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    assert memory.peak(stages[0]) == memory.peak(job(method="full"))


def test_shards_in_fp32_are_gathered_in_16_bits():
    """FSDP's mixed precision is no autocast: nothing between layers is in fp32."""
    alone, sharded = (job(framework="peft", method="full", master=True, sharding=how, gpus=8) for how in ("", "FSDP"))
    plain = job(framework="peft", method="full", sharding="FSDP", gpus=8)
    assert alone.autocast and not sharded.autocast
    assert memory.layer_bytes(sharded) == memory.layer_bytes(plain) < memory.layer_bytes(alone)
    assert memory.peak(sharded).weights > memory.peak(plain).weights


def test_what_was_not_stated_widens_an_interval():
    sure, unsure = (forecast.forecast("memory", job(unsure=named), "lab", forecast.effects("memory", []))
                    for named in ((), ("act_ckpt",)))  # fmt: skip
    assert sure.value == unsure.value and sure.spread < unsure.spread


def test_offloading_leaves_two_layers_of_activations():
    kept, offloaded = (memory.moments(job(micro_batch=16, offload=off))["loss"].layers for off in (False, True))
    assert offloaded == pytest.approx(kept / 8)


def test_magnitudes_of_dora_are_trained_too():
    plain, dora = job(targets={"q"}, rank=8), job(targets={"q"}, rank=8, dora=True)
    assert memory.trained_params(dora) - memory.trained_params(plain) == 16 * 2048
    assert memory.layer_bytes(dora) > memory.layer_bytes(plain)


def test_gradients_of_earlier_passes_are_held_through_the_loss():
    """Of all that is trained; FSDP hands them over in the last pass where Accelerate is told to wait for it."""
    one, more = (job(method="full", checkpointing="full", grad_accum=n) for n in (1, 4))
    gradient = 2 * one.shape.n_params
    loss = [memory.moments(each)["loss"].states for each in (one, more)]
    assert loss[1] - loss[0] == pytest.approx(gradient)
    assert memory.moments(one)["step"] == memory.moments(more)["step"]
    cards = {"method": "full", "sharding": "FSDP", "gpus": 4, "grad_accum": 4}
    sharded, waiting = (memory.moments(job(framework=name, **cards))["loss"].states for name in ("torchtune", "peft"))
    assert waiting - sharded == pytest.approx(gradient * 3 / 4)


def test_a_stage_of_a_pipeline_keeps_its_weights_and_gradients_whole():
    alone, staged = (
        memory.moments(job("llama-3-8b", framework="torchtitan", method="full", master=True, gpus=64, sharding=how))
        for how in ("FSDP64", "FSDP8 PP8")
    )
    gradients = 4 * job("llama-3-8b").shape.n_params / 8
    assert staged["loss"].states - alone["loss"].states == pytest.approx(gradients)
    assert staged["loss"].weights - alone["loss"].weights > 0.2 * gradients


def test_expert_parallelism_divides_experts_alone():
    full = {"framework": "peft", "method": "full", "gpus": 4}
    held = [
        memory.moments(job("granite-3.0-3b-a800m", sharding=how, **full))["step"].states
        for how in ("FSDP EP2", "FSDP EP4", "FSDP")
    ]
    assert held[0] > 1.8 * held[1] and held[1] == pytest.approx(held[2])
    dense = [memory.peak(job(sharding=how, **full)) for how in ("FSDP EP2", "FSDP")]
    assert dense[0] == dense[1]


def test_programs_for_pretraining_divide_a_cards_experts_further():
    full = {"framework": "torchtitan", "method": "full", "gpus": 8}
    one, two = (memory.moments(job("mixtral-8x7b", sharding=how, **full))["step"] for how in ("FSDP", "FSDP EP2"))
    assert one.states == pytest.approx(two.states) and two.weights < one.weights  # it gathers half as many experts
    whole = memory.moments(job("mixtral-8x7b", sharding="DDP EP2", **full))["step"]
    assert whole.weights > 3 * two.weights


def test_logits_that_are_never_whole_hold_little():
    plain, cut = (memory.head_bytes(job(framework="peft", loss=loss)) for loss in ("plain", "cut"))
    assert cut < plain / 50


def test_modules_that_are_trained_beside_adapters_are_copies_in_16_bits():
    some, more = (job(framework="peft", targets={"q", "v", *also}) for also in ((), ("embedding",)))
    copied = memory.trained_params(more) - memory.trained_params(some)
    added = memory.moments(more)["step"].total - memory.moments(some)["step"].total
    assert added == pytest.approx((2 + 2 + 4 + 2) * copied)  # itself, gradient, states, scratch
