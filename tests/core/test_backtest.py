"""Tables of measured runs: what a row says, and how its figures are foretold and counted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from chiplog.errors import NotFoundError, PlanError, RecordError
from chiplog.estimate import evidence, forecast, memory, speed
from chiplog.estimate.backtest import Protocol, backtest, batches, covered, foretold, tell
from chiplog.estimate.gpus import gpu
from chiplog.estimate.table import Row, Sweep, as_row, job_of


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
    found = backtest([row(tokens_per_s=100), row(suite="other", dtype="fp8", tokens_per_s=100)], "cold")
    assert (found["memory"]["n"], found["tokens_per_s"]["n"]) == (2, 1)
    assert "tokens/s:" in next(iter(found["uncovered"])) and "fp8" in next(iter(found["uncovered"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"gpu": "RTX 9999", "gpu_mem_gb": None, "oom": False},
            ["tokens/s: unknown GPU: RTX 9999", "oom: unknown GPU"],
        ),
        ({"gpu": None, "runtime_s": 9}, ["runtime: no GPU is stated"]),
        ({"tokens_per_s": 9, "tokens_scope": "per GPU, unmasked labels"}, ["tokens/s: of labels alone"]),
        ({"runtime_s": 9, "steps": None, "samples": None}, ["runtime: steps are not stated"]),
        ({"gpu": "A100", "gpu_mem_gb": None, "oom": True}, ["oom: A100 may have several memories"]),
        (
            dict.fromkeys(("peak_mem_gb", "tokens_per_s", "s_per_step", "runtime_s", "oom")),
            ["nothing was measured"],
        ),
    ],
)
def test_a_figure_that_cannot_be_asked_for_is_counted_with_its_reason(change: dict[str, Any], words: list[str]):
    found = backtest([row(), row(suite="other", **change)], "cold")["uncovered"]
    assert all(any(text in reason for reason in found) for text in words), found


@pytest.mark.parametrize(("scope", "n_gpus"), [("total over GPUs", 4), ("whole job", 4), ("per GPU", 1), ("", 1)])
def test_tokens_a_second_are_of_whom_the_scope_says(scope: str, n_gpus: int):
    told = [
        evidence.measured(as_row(row(tokens_per_s=800, tokens_scope=text, n_gpus=4, sharding="FSDP"), Row)).pass_s
        for text in (scope, "per GPU")
    ]
    assert told[0] == pytest.approx(n_gpus * (told[1] or 0))


def test_a_batch_without_its_passes_is_one_pass():
    stated = [job_of(as_row(row(micro_batch=None, grad_accum=accum, batch_size=16), Row)) for accum in (None, 4)]
    assert [(job.micro_batch, job.grad_accum) for job in stated] == [(16, 1), (4, 4)]


def test_a_count_before_a_gpu_is_no_part_of_its_name():
    assert gpu("8x H100-80GB SXM").key == gpu("H100-80GB SXM x8").key == gpu("h100-80gb-sxm").key


def test_cold_evidence_leaves_out_what_the_table_itself_is_from():
    shipped = [one.model_dump() for one in evidence.shipped() if one.suite == "qwen-profile"]
    own = backtest(shipped, "cold")["memory"]
    renamed = backtest([{**one, "source": "elsewhere", "suite": "renamed"} for one in shipped], "cold")["memory"]
    assert renamed["mape"] < own["mape"]  # of another source, the shipped rows are evidence
    for name in ("source", "suite"):  # either tells that they are the same
        kept = backtest([{**one, name: "elsewhere"} for one in shipped], "cold")["memory"]
        assert kept["mape"] == pytest.approx(own["mape"], rel=0.05)


def test_sweeps_are_asked_for_their_largest_batch():
    rows = [{"bench": "b", "gpu": "g", "batch_size": b, "memory_mib": 1000 + 100 * b} for b in (1, 8, 16, 24)]
    assert batches([as_row(values, Sweep) for values in rows]) == {
        "groups": 1,
        "within_limit": 1.0,
        "share_of_best": pytest.approx(2 / 3),
    }


def test_bad_input_is_named():
    with pytest.raises(NotFoundError, match="unknown architecture"):
        job_of(as_row(row(model="nobody-knows-7b"), Row))
    with pytest.raises(RecordError, match="cold, history"):
        backtest([row()], "warm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="fp8"):
        speed.one_pass(job_of(as_row(row(dtype="fp8"), Row)).model_copy(update={"gpu": "a100-80gb-sxm"}))


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
    assert found["memory"]["n"] == 1 and all("unknown GPU: 7" in reason for reason in found["uncovered"])


def test_a_sweep_that_cannot_be_read_is_counted():
    sweeps = [{"bench": "b", "gpu": "g", "batch_size": b, "memory_mib": 1000 + 100 * b} for b in (1, 8, 16)]
    found = backtest([row()], "cold", [*sweeps, {**sweeps[0], "memory_mib": "much"}])
    assert found["batch"]["groups"] == 1
    assert [n for reason, n in found["uncovered"].items() if "memory_mib" in reason] == [1]


@pytest.mark.parametrize("protocol", ["cold", "history"])
def test_intervals_hold_on_what_is_shipped(protocol: Protocol):
    """As many as they should, of runs that the forecast calls near to evidence and of those that it calls far."""
    runs, _ = covered(evidence.shipped())
    within: dict[bool, list[bool]] = {True: [], False: []}
    for told in foretold("memory", runs, [], protocol):
        if told.figure and told.run.peak_bytes:
            within[told.figure.near].append(told.figure.low <= told.run.peak_bytes <= told.figure.high)
    every = [*within[True], *within[False]]
    assert 0.86 <= sum(every) / len(every) <= 0.97
    assert all(0.8 <= sum(some) / len(some) <= 0.99 for some in within.values() if len(some) > 40)


@pytest.mark.parametrize(("sharding", "passes"), [("DDP", 100), ("ZeRO-1", 100), ("FSDP", 100), ("TP4", 400)])
def test_cards_share_the_samples_but_not_those_that_share_one(sharding: str, passes: float):
    given = row(n_gpus=4, sharding=sharding, steps=None, samples=800, epochs=1, micro_batch=2)
    table_row = as_row(given, Row)
    assert evidence.passes(table_row, job_of(table_row)) == passes


@pytest.mark.parametrize(("given", "field", "value"), [
    ({"method": "LoRA"}, "method", "lora"), ({"method": "QLoRA"}, "weight_bits", 4),
    ({"quant": "NF4"}, "weight_bits", 4), ({"lora_targets": "?"}, "unsure", ("act_ckpt", "lora_targets")),
    ({"quant": "GPTQ"}, "weight_bits", 4), ({"quant": "hqq w8"}, "weight_bits", 8),
    ({"dtype": "half"}, "dtype", "fp16"), ({"dtype": "float"}, "dtype", "fp32"),
    ({"mem_kind": "nvml"}, "memory_kind", "card"),
    ({"dtype": "BF16"}, "dtype", "bf16"), ({"dtype": "Float8"}, "dtype", "fp8"), ({"method": "DoRA"}, "dora", True),
    ({"notes": "compile=False; liger=False"}, "compile", False), ({"notes": "+ Compile"}, "compile", True),
    ({"notes": "compile=False; liger=False"}, "loss", "plain"), ({"notes": "Liger kernel"}, "loss", "cut"),
    ({"notes": "chunked CE"}, "loss", "chunked"), ({"framework": "axolotl"}, "loss", "cut"),
    ({"framework": "axolotl"}, "unsure", ("act_ckpt", "lora_targets", "loss")),
    ({"method": "QLoRA", "framework": "TRL"}, "upcast", True),
    ({"method": "QLoRA", "framework": "litgpt"}, "upcast", True),
    ({"method": "QLoRA", "framework": "TRL", "sharding": "FSDP", "n_gpus": 2}, "upcast", False),
    ({"sharding": "DeepSpeed", "n_gpus": 4}, "sharding", "zero2"),
    ({"method": "full", "sharding": "DeepSpeed", "n_gpus": 4}, "sharding", "DeepSpeed"),
    ({"method": "full", "sharding": "FSDP", "n_gpus": 4, "notes": "scattermoe-ep2",
      "model": "mixtral-8x7b"}, "sharding", "FSDP EP2"),
    ({"lora_targets": "lm_head"}, "targets", {"head"}), ({"lora_targets": "Q_PROJ"}, "targets", {"q"}),
    ({"lora_targets": "self_attn"}, "targets", {"q", "k", "v", "o"}),
    ({"notes": "mean tokens/step 300", "packed": False}, "mean_len", 150),
    ({"act_ckpt": "False"}, "checkpointing", "none"), ({"act_ckpt": "Full"}, "checkpointing", "full"),
    ({"notes": "8xA100, Alpaca", "packed": False}, "data", "alpaca"), ({"notes": "some free text"}, "data", ""),
])  # fmt: skip
def test_what_a_row_says_in_words(given: dict[str, Any], field: str, value: Any):
    assert getattr(job_of(as_row(row(**given), Row)), field) == value


@pytest.mark.parametrize(("memory_gb", "ran_out"), [(8, True), (16, False)])
def test_a_card_of_which_the_memory_alone_is_stated_is_asked_what_it_holds(memory_gb: float, ran_out: bool):
    """A packed 1B model needs 12 GB at batch 2 of 2,048 tokens."""
    given = row(gpu=f"{memory_gb} GB of some card", gpu_mem_gb=memory_gb, oom=ran_out, seq_len=2048, runtime_s=None)
    found = backtest([given], "cold")
    assert found["oom"] == {"n": 1, "n_oom": ran_out, "recall": 1.0 if ran_out else None,
                            "precision": 1.0 if ran_out else None}  # fmt: skip
    assert list(found["uncovered"]) == [f"tokens/s: unknown GPU: {memory_gb} GB of some card"]


def test_what_runs_of_a_table_take_beyond_their_passes_is_learnt():
    """Here half as long again, of which a table that is not known says nothing."""
    rows = [row(steps=100, s_per_step=0.11, tokens_per_s=None, runtime_s=16.5, lora_rank=n) for n in (8, 16, 32, 64)]
    cold, history = (tell(rows, protocol).runtimes for protocol in ("cold", "history"))
    assert [one.value for one in cold] == pytest.approx([cold[0].value] * 4, rel=0.05)
    assert abs(math.log(history[3].value / 16.5)) < 0.05 < abs(math.log(history[0].value / 16.5))
    assert all(one.low < 16.5 < one.high for one in history)
    assert history[3].high / history[3].low < 0.7 * history[0].high / history[0].low


def test_no_method_is_a_reason_and_not_a_guess():
    with pytest.raises(NotFoundError, match="the method is not stated"):
        job_of(as_row(row(method=None), Row))


def test_scores_are_kept_where_the_model_code_has_no_kernel():
    """transformers' own MPT, unless flash attention is stated; never a program's with code of its own."""

    def held(framework: str, attn: str | None) -> float:
        given = row(model="mpt-7b", method="full", seq_len=8192, framework=framework, attn=attn)
        return memory.layer_bytes(job_of(as_row(given, Row)))

    flash = held("HF Trainer", "flash_attention_2")
    assert held("HF Trainer", None) > 5 * flash
    assert held("llm-foundry/Composer", None) == held("llm-foundry/Composer", "flash_attention_2") < 1.5 * flash
