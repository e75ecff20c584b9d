"""The estimator's physics, and what past runs make of it: worked cases of which the truth is known, and properties."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiplog.errors import NotFoundError, PlanError, RecordError
from chiplog.estimate import evidence, forecast, memory, speed
from chiplog.estimate.backtest import backtest, batches
from chiplog.estimate.batch import largest_batch, micro_batches
from chiplog.estimate.effects import Effects, Observation, Sizes
from chiplog.estimate.gpus import gpu
from chiplog.estimate.job import Job
from chiplog.estimate.shapes import find
from chiplog.estimate.table import Row, as_row, job_of

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


def test_the_first_observations_alone_are_as_if_there_were_no_others():
    drawn = [Observation((n % 2, n % 3), (0.4, 0.6), 0.1 * n, 0.05) for n in range(8)]
    alone = Effects(drawn[:5], SIZES, settled=0).shift((0, 1))
    first = Effects(drawn, SIZES, settled=0).shift((0, 1), first=5)
    assert first.mean == pytest.approx(alone.mean) and first.covariance == pytest.approx(alone.covariance)


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


def row(**given: Any) -> dict[str, Any]:
    return {
        "source": "lab", "suite": "ours", "model": "llama-3.2-1b", "method": "lora", "lora_rank": 8, "dtype": "bf16",
        "micro_batch": 2, "seq_len": 512, "packed": True, "n_gpus": 1, "gpu": "A100 80GB", "gpu_mem_gb": 80,
        "framework": "torchtune", "mem_kind": "peak allocated", "peak_mem_gb": 6.0, "tokens_per_s": 9000.0,
        "tokens_scope": "total=per_gpu", "steps": 100, "runtime_s": 11.4, "oom": False, **given,
    }  # fmt: skip


def test_a_back_test_counts_every_row_and_knows_nothing_of_what_it_is_asked():
    rows = [row(micro_batch=b, peak_mem_gb=4 + b) for b in (1, 2, 4, 8)]
    rows += [row(model="nobody-knows-7b"), row(micro_batch=None, seq_len=None)]
    cold, history = backtest(rows, "cold"), backtest(rows, "history")
    assert cold["memory"]["n"] == history["memory"]["n"] == 4 and cold["runtime"]["n"] == 4
    assert sum(cold["uncovered"].values()) == 2 and any("nobody-knows-7b" in reason for reason in cold["uncovered"])
    assert history["memory"]["mape"] < cold["memory"]["mape"]


def test_what_is_foretold_of_a_row_does_not_depend_on_its_truth(monkeypatch: pytest.MonkeyPatch):
    """Nor on rows behind it; of those before it, it does."""
    rows = [row(micro_batch=b, peak_mem_gb=4 + b) for b in (1, 2, 4, 8)]

    def told(rows: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
        seen: list[tuple[float, float, float]] = []
        ask = forecast.forecast

        def note(*args: Any, **given: Any) -> forecast.Forecast:
            answer = ask(*args, **given)
            if args[0] == "memory" and args[1].memory_kind == "allocated":
                seen.append(answer[:3])
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(forecast, "forecast", note)
            backtest(rows, "history")
        return seen

    honest = told(rows)
    last = told([*rows[:3], {**rows[3], "peak_mem_gb": 1200}])
    first = told([{**rows[0], "peak_mem_gb": 500}, *rows[1:]])
    assert len(honest) == 4 and last == honest
    assert first[0] == honest[0] and all(a[0] > 1.5 * b[0] for a, b in zip(first[1:], honest[1:], strict=True))


def test_a_run_that_ran_out_of_memory_raises_what_is_foretold_behind_it():
    ran_out = row(micro_batch=1, seq_len=64, peak_mem_gb=None, tokens_per_s=None, runtime_s=None, oom=True)
    after = row(micro_batch=1, seq_len=64, peak_mem_gb=90)
    errors = [backtest(rows, "history")["memory"]["mape"] for rows in ([after], [ran_out, after])]
    assert errors[1] < errors[0]


def test_a_card_that_cannot_compute_in_a_type_is_a_reason_and_no_end():
    found = backtest([row(), row(suite="other", dtype="fp8")], "cold")
    assert found["memory"]["n"] == 1 and "fp8" in next(iter(found["uncovered"]))


def test_cold_evidence_leaves_out_what_the_table_itself_is_from():
    shipped = [one.model_dump() for one in evidence.shipped() if one.suite == "fms-a100_80gb_granite"]
    own = backtest(shipped, "cold")["memory"]
    renamed = backtest([{**one, "source": "elsewhere", "suite": "renamed"} for one in shipped], "cold")["memory"]
    assert renamed["mape"] < own["mape"]  # of another source, the shipped rows are evidence
    for name in ("source", "suite"):  # either tells that they are the same
        kept = backtest([{**one, name: "elsewhere"} for one in shipped], "cold")["memory"]
        assert kept["mape"] == pytest.approx(own["mape"], rel=0.05)


@pytest.mark.parametrize(("known", "limit", "batch"), [
    ([(1, 11.0), (2, 12.0), (4, 14.0)], 22.5, 11), ([(1, 11.0), (2, 12.0)], 100.0, 3), ([(4, 14.0)], 100.0, 4),
    ([(4, 14.0), (8, 30.0)], 20.0, 4), ([(4, 14.0)], 10.0, None), ([(16, 30.0), (32, 50.0), (64, 90.0)], 131.0, 88),
])  # fmt: skip
def test_the_largest_batch(known: list[tuple[int, float]], limit: float, batch: int | None):
    assert largest_batch(known, limit) == batch


def test_sweeps_are_asked_for_their_largest_batch():
    rows = [{"bench": "b", "gpu": "g", "batch_size": b, "memory_mib": 1000 + 100 * b} for b in (1, 8, 16, 24)]
    assert batches(rows) == {"groups": 1, "within_limit": 1.0, "share_of_best": pytest.approx(2 / 3)}


@given(batch=st.integers(1, 512), largest=st.integers(1, 512))
def test_the_effective_batch_is_kept(batch: int, largest: int):
    micro, accumulation = micro_batches(batch, largest)
    assert micro * accumulation == batch and micro <= largest


def test_bad_input_is_named():
    with pytest.raises(NotFoundError, match="unknown architecture"):
        job_of(as_row(row(model="nobody-knows-7b"), Row))
    with pytest.raises(RecordError, match="cold, history"):
        backtest([row()], "warm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="fp8"):
        speed.one_pass(job(dtype="fp8"))


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


def test_a_run_that_ran_out_of_memory_counts_in_the_order_of_its_table():
    rows = [row(micro_batch=8, peak_mem_gb=None, tokens_per_s=None, runtime_s=None, oom=True), row(micro_batch=4)]
    rows += [row(micro_batch=16, peak_mem_gb=None, tokens_per_s=None, runtime_s=None, oom=True), row(micro_batch=2)]
    for protocol in ("cold", "history"):
        found = backtest(rows, protocol)
        assert found["oom"]["n"] == 4 and found["oom"]["n_oom"] == 2 and found["memory"]["n"] == 2


# What a table may hold in place of a number: each is named, and the other rows are counted all the same.
ODD = {
    "micro_batch": [0.5, -1, "two", []], "seq_len": [0, "4k", math.inf], "lora_rank": [-4, "x"], "n_gpus": [0, "many"],
    "peak_mem_gb": [math.nan, -3, "5GB"], "tokens_per_s": [-1, "fast", 0], "grad_accum": [0], "runtime_s": [-1],
    "gpu_mem_gb": ["big"], "steps": ["x"], "oom": ["perhaps"], "packed": [7],
}  # fmt: skip


@pytest.mark.parametrize(("column", "value"), [(column, value) for column, values in ODD.items() for value in values])
def test_a_row_that_cannot_be_read_is_counted_with_its_column(column: str, value: Any):
    found = backtest([row(), row(**{column: value})], "history")
    assert found["memory"]["n"] == 1 and list(found["uncovered"].values()) == [1]
    assert column in next(iter(found["uncovered"]))


@pytest.mark.parametrize(
    "odd", [{"notes": 5}, {"gpu": 7}, {"sharding": "TP0"}, {"suite": None}, {"lora_rank": 0}, {"quality": 3}]
)
def test_words_may_be_anything(odd: dict[str, Any]):
    found = backtest([row(**odd)], "cold")
    assert found["memory"]["n"] == 1 and not found["uncovered"]


def test_a_sweep_that_cannot_be_read_is_an_error():
    with pytest.raises(RecordError, match="memory_mib"):
        batches([{"bench": "b", "gpu": "g", "batch_size": 1, "memory_mib": "much"}])
