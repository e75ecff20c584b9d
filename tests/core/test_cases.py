"""One case at a time: what must hold of any estimate, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from chiplog.cli import app
from chiplog.diagnosis import diagnose
from chiplog.errors import ChiplogError, NotFoundError, OutsideRootsError, PlanError, SettingsError
from chiplog.estimate.case import CaseEstimate, make_case
from chiplog.estimate.estimator import Known, Place, guess, largest_micro_batch, learn
from chiplog.estimate.gpus import gpu, gpus
from chiplog.estimate.guess import Guess, total
from chiplog.estimate.jobs import measured_run, shape_at
from chiplog.estimate.questions import estimate_case, explain, fits, job_of
from chiplog.record import OutOfMemory, Prediction, Record, State, Usage

CASE: dict[str, Any] = {"model": "Llama-3.2-1B", "gpu": "a100-80gb", "batch_size": 8, "seq_len": 1024}
GIB = 2**30


def own_run(key: str, micro: int, peak_gib: float | None, *, state: State = State.COMPLETED) -> Record:
    """A packed LoRA run of 1B on an A100 of 80 GB, its steps of a pass of `micro` x 2,048 tokens."""
    config = {"batch_size": micro, "micro_batch_size": micro, "max_seq_len": 2048, "packed": True, "lora_rank": 64}
    used = Usage(
        device="NVIDIA A100-SXM4-80GB", gpus=1, steps=100, train_s=9.0 * micro, mem_kind="reserved",
        peak_mem_bytes=None if peak_gib is None else round(peak_gib * GIB),
    )  # fmt: skip
    oom = OutOfMemory(kind="gpu", capacity_bytes=79.25 * GIB) if state is State.OUT_OF_MEMORY else None
    return Record(
        key=key, framework="torchtune", model="lora_llama3_2_1b", method="lora", state=state, config=config,
        usage=used, oom=oom,
    )  # fmt: skip


OWN = [own_run("a", 1, 7.0), own_run("b", 2, 12.0), own_run("c", 16, None, state=State.OUT_OF_MEMORY)]


@cache
def known(own: bool = False) -> Known:
    return learn(OWN if own else [])


def place(own: bool = False, card: str = "a100-80gb", price: float | None = None) -> Place:
    return Place(gpu(card), known(own), price)


def told(*, own: bool = False, **change: Any) -> CaseEstimate:
    case = make_case({**CASE, **change})
    return estimate_case(case, place(own, case.gpu), [*gpus().values()], inverse=False)


CASES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["Llama-3.2-1B", "Llama-3.1-8B", "Qwen2.5-7B", "gemma-2-2b", "mixtral-8x7b", "gpt2"]),
        "batch_size": st.integers(1, 64),
        "seq_len": st.integers(1, 8192),
        "lora_rank": st.integers(1, 256),
        "method": st.sampled_from(["full", "lora", "qlora", "dora"]),
        "framework": st.sampled_from(["torchtune", "peft", "litgpt", "unsloth"]),
        "activation_checkpointing": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(CASES, st.sampled_from(["batch_size", "seq_len", "lora_rank"]), st.integers(1, 64), st.booleans())
def test_memory_never_falls_with_batch_length_or_rank(case: dict[str, Any], what: str, more: int, own: bool):
    less = guess("memory", job_of(make_case({**CASE, **case}), place().card), known(own))
    greater = {**CASE, **case, what: case[what] + more}
    much = guess("memory", job_of(make_case(greater), place().card), known(own))
    assert less.value <= much.value


@settings(max_examples=60, deadline=None)
@given(CASES, st.booleans())
def test_intervals_are_nested_and_hold_their_value(case: dict[str, Any], own: bool):
    for quantity in ("memory", "pass"):
        one = guess(quantity, job_of(make_case({**CASE, **case}), place().card), known(own))
        ends = [one.quantile(share) for share in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)]
        assert ends == sorted(ends) and 0 < ends[1] < one.value < ends[-2]
        assert one.risk(ends[-2]) <= 0.05 + 1e-6 and one.risk(ends[-2] * 0.999) >= 0.05 - 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(8, 500))
def test_time_is_additive_over_epochs(first: int, second: int, samples: int):
    def training(epochs: int) -> Any:
        found = told(samples=samples, epochs=epochs)
        return next(term.elapsed for term in found.estimate.terms if term.name == "training")

    both, one, other = (training(epochs) for epochs in (first + second, first, second))
    for field in ("value", "low", "high"):
        assert getattr(both, field) == pytest.approx(getattr(one, field) + getattr(other, field))


def test_what_is_on_record_narrows_moves_and_is_named():
    bare, near = told(batch_size=4, seq_len=2048, packed=True), told(batch_size=4, seq_len=2048, packed=True, own=True)
    assert bare.estimate.basis == "physics" and near.estimate.basis == "scaled"
    one, other = bare.estimate.reserved_mem, near.estimate.reserved_mem
    assert one and other and other.high / other.low < one.high / one.low
    assert {"a", "b"} <= set(other.evidence)
    # Twice measured: 7 GiB for one sample of the batch and 12 for two. Four lie near 22.
    assert 19 * GIB < other.value < 25 * GIB


def test_a_run_that_ran_out_of_memory_is_evidence():
    job = job_of(make_case({**CASE, "batch_size": 16, "seq_len": 2048, "packed": True}), place().card)
    without, with_it = guess("memory", job, learn(OWN[:2])), guess("memory", job, learn(OWN))
    assert with_it.risk(79.25 * GIB) > without.risk(79.25 * GIB)


@pytest.mark.parametrize("state", [State.INCOMPLETE, State.TIMEOUT, State.RUNNING, State.FAILED])
def test_a_run_that_did_not_end_well_tells_its_pace(state: State):
    run = measured_run(own_run("a", 2, 12.0, state=state), None)
    assert run and run.pass_s == pytest.approx(0.18) and run.job.gpu == "a100-80gb-sxm"
    slow = own_run("a", 8, 30.0, state=state)
    slow = slow.model_copy(update={"usage": slow.usage.model_copy(update={"train_s": 400.0})})
    job = job_of(make_case({**CASE, "seq_len": 2048, "packed": True}), place().card)
    assert guess("pass", job, learn([slow])).value > 1.5 * guess("pass", job, known()).value


def test_a_run_whose_lengths_or_card_nobody_knows_is_no_evidence():
    record = own_run("a", 2, 12.0)
    unpacked = record.model_copy(update={"config": {**record.config, "packed": False}})
    nowhere = record.model_copy(update={"usage": record.usage.model_copy(update={"device": None})})
    assert measured_run(unpacked, None) is None and measured_run(nowhere, None) is None
    only = measured_run(nowhere, gpu("h100-80gb"))
    assert only and only.job.gpu == gpu("h100-80gb").key


def test_shards_need_less_of_each_card():
    peaks = [
        told(model="Llama-3.1-8B", method="full", gpus=8, sharding=how).estimate.peak_mem.value  # pyright: ignore[reportOptionalMemberAccess]
        for how in ("FSDP", "ZeRO-2", "ZeRO-1", "DDP")
    ]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1] / 2


def test_the_micro_batch_that_fits_keeps_the_batch():
    found = told(batch_size=48, seq_len=2048, packed=True).estimate
    assert found.micro_batch_size and found.micro_batch_size * (found.grad_accum or 0) == 48
    assert found.out_of_memory and found.out_of_memory > 0.5


def test_the_largest_that_fits_fits_and_one_more_does_not():
    job = job_of(make_case(CASE), place().card)
    found = fits(job, place(), gpus().values())
    capacity = place().card.memory_bytes
    for field, value in (("micro_batch", found.micro_batch), ("seq_len", found.seq_len), ("rank", found.rank)):
        assert value
        for size, holds in ((value, True), (value + 1, False)):
            wanted = job.model_copy(update={field: size, "memory_kind": "reserved"})
            if size <= 4096 or field == "seq_len":
                assert (guess("memory", wanted, known()).quantile(0.95) <= capacity) == holds
    found_card = gpus()[found.gpu or ""]
    smaller = [card for card in gpus().values() if card.memory_bytes < found_card.memory_bytes]
    needs = guess("memory", job.model_copy(update={"memory_kind": "reserved"}), known()).quantile(0.95)
    assert smaller and all(card.memory_bytes < needs for card in smaller)


def test_the_parts_of_an_explanation_add_up():
    job = job_of(make_case({**CASE, "batch_size": 8, "micro_batch_size": 4}), place().card)
    found = explain(job, place())
    reserved = job.model_copy(update={"memory_kind": "reserved"})
    assert sum(found.memory_bytes.values()) == pytest.approx(guess("memory", reserved, known()).value)
    assert sum(found.pass_s.values()) == pytest.approx(guess("pass", job, known()).value)
    assert found.step_s == pytest.approx(2 * sum(found.pass_s.values()))
    changes = {change.change: change for change in found.what_if}
    assert changes["activation checkpointing"].reserved_bytes < sum(found.memory_bytes.values())
    assert changes["activation checkpointing"].step_s > found.step_s


def test_cost_hours_and_budget_follow_from_the_time():
    case = make_case({**CASE, "steps": 1000, "budget_gpu_hours": 2.0})
    found = estimate_case(case, place(price=3.0), [], inverse=False)
    assert found.estimate.elapsed and found.estimate.gpu_hours == pytest.approx(found.estimate.elapsed.value / 3600)
    assert found.estimate.cost == pytest.approx(3 * (found.estimate.gpu_hours or 0))
    assert found.steps_in_budget == int(7200 / found.step_s)
    assert estimate_case(case, place(), [], inverse=False).estimate.cost is None


def test_a_sum_is_as_sure_as_its_terms_together():
    one = Guess(10.0, lambda share: 10.0 * (0.5 + share), "scaled", ("a",))
    both = total([one, one.times(2)._replace(basis="physics", evidence=("b", "a"))])
    assert (both.value, both.basis, both.evidence) == (30.0, "physics", ("a", "b"))
    assert (both.quantile(0.0), both.quantile(1.0)) == (15.0, 45.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "a100"}, "may be any of"),
        ({"gpu": "b300x"}, "no GPU 'b300x' in the catalogue"),
        ({"model": "my-own-7b"}, "not in the catalogue of published shapes: give the folder"),
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1"),
        ({"batch_size": -4}, "batch_size: Input should be greater than or equal to 1"),
        ({"seq_len": -1}, "seq_len"),
        ({"batch_size": 10, "micro_batch_size": 4}, "not divide the 10 samples of each GPU: take one of 1, 2, 5, 10"),
        ({"batch_size": 10, "gpus": 4}, "batch_size 10 cannot be split over 4 GPUs: take a multiple of 4"),
        ({"method": "prefix"}, "method"),
        ({"lora_ranks": 4}, "lora_ranks: there is no such field"),
        ({"lora_targets": ["q_projection"]}, "lora_targets has q_projection: choose from q_proj"),
        ({"seq_len": float("nan")}, "seq_len"),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated_is_refused_with_what_to_do(workspace: Path, change: dict[str, Any], words: str):
    from chiplog.tools import estimate_resources

    with pytest.raises(ChiplogError) as refused:
        estimate_resources(case={**CASE, **change})
    assert words in str(refused.value)


CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model_type": "transformer9"}, NotFoundError, "the architecture 'transformer9' is not known here"),
        ({"hidden_size": -64}, PlanError, "hidden_size"),
        ({"num_hidden_layers": None}, PlanError, "num_hidden_layers"),
        ({"vocab_size": "many"}, PlanError, "vocab_size"),
        ({"model_type": None}, PlanError, "names no model_type"),
    ],
)
def test_a_config_that_is_wrong_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], kind: type, words: str):
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind) as refused:
        shape_at(str(tmp_path))
    assert words in str(refused.value) and "config.json" in str(refused.value)


def test_a_model_folder_is_read_and_its_numbers_are_those_of_its_config(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert shape_at(str(tmp_path)) == shape_at(str(tmp_path / "config.json"))
    with pytest.raises(PlanError, match="is not JSON"):
        (tmp_path / "config.json").write_text("{")
        shape_at(str(tmp_path))
    with pytest.raises(NotFoundError, match="cannot be read"):
        shape_at(str(tmp_path / "none" / "config.json"))


def test_the_command_says_the_same_as_the_tool(workspace: Path):
    arguments = ["estimate", "Llama-3.2-1B", "a100-80gb", "--batch-size", "8", "--seq-len", "1024", "--json"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    answer = json.loads(ran.stdout)
    found = CaseEstimate.model_validate(answer["case"])
    assert found.estimate.peak_mem == told().estimate.peak_mem
    assert "peak reserved" in answer["summary"] and answer["experiment"] is None


def test_equal_runs_narrow_an_interval_to_what_they_spread_by():
    job = job_of(make_case({**CASE, "batch_size": 4, "seq_len": 2048, "packed": True}), place().card)
    same = [own_run(f"r{n}", 4, 25.0) for n in range(5)]
    reserved = job.model_copy(update={"memory_kind": "reserved"})
    one = guess("memory", reserved, learn(same))
    assert one.value == pytest.approx(25 * GIB, rel=0.03)
    assert one.quantile(0.95) / one.quantile(0.05) < 1.35


def test_a_batch_that_ran_out_of_memory_is_never_recommended():
    runs = [own_run("a", 1, 7.0), own_run("b", 2, 12.0), own_run("c", 4, 21.0)]
    job = job_of(make_case({**CASE, "batch_size": 16, "seq_len": 2048, "packed": True, "lora_rank": 64}), place().card)
    card = gpu("a100-80gb")
    most = largest_micro_batch(job, Place(card, learn(runs)), [1, 2, 4, 8, 16])
    out = [*runs, own_run("d", 8, None, state=State.OUT_OF_MEMORY)]
    assert most == 8 and largest_micro_batch(job, Place(card, learn(out)), [1, 2, 4, 8, 16]) == 4


def test_running_out_of_memory_while_evaluating_says_nothing_of_the_training():
    record = own_run("a", 4, None, state=State.OUT_OF_MEMORY)
    assert (run := measured_run(record, None)) and run.above_bytes
    evaluating = record.model_copy(update={"steps": {"train": State.COMPLETED, "eval": State.OUT_OF_MEMORY}})
    assert (run := measured_run(evaluating, None)) and run.above_bytes is None
    advice = diagnose(evaluating, 1)
    assert advice and "lower eval_batch_size" in advice.change


def test_what_a_padded_run_got_through_is_not_what_it_ran_out_at():
    config = {"batch_size": 4, "max_seq_len": 2048, "lora_rank": 64}
    used = Usage(
        device="NVIDIA A100-SXM4-80GB", gpus=1, steps=5, train_s=2.0, longest_pass_tokens=400, padded_tokens=1900
    )
    record = own_run("a", 4, None, state=State.OUT_OF_MEMORY).model_copy(update={"config": config, "usage": used})
    assert measured_run(record, None) is None  # nothing says at which length it ran out
    told_before = Prediction(basis="none", longest_pass_tokens=8000)
    run = measured_run(record.model_copy(update={"predicted": told_before}), None)
    assert run and run.job.seq_len == 2000 and run.above_bytes


@pytest.mark.parametrize("odd", [-3.0, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("field", ["train_s", "mean_steps_per_s", "peak_mem_bytes", "padded_tokens"])
def test_a_record_with_an_odd_figure_ends_no_estimate(field: str, odd: float):
    record = own_run("a", 4, 20.0)
    run = measured_run(record.model_copy(update={"usage": record.usage.model_copy(update={field: odd})}), None)
    assert run is None or all(value is None or value > 0 for value in (run.pass_s, run.peak_bytes))
    assert learn([record.model_copy(update={"usage": record.usage.model_copy(update={field: odd})})])


def test_an_evaluation_takes_longer_with_more_samples_and_tokens_and_never_a_day():
    found = {n: told(eval_samples=n, steps=1).estimate for n in (64, 640)}
    times = [next(t.elapsed for t in found[n].terms if t.name == "evaluation") for n in (64, 640)]
    assert times[0] and times[1] and times[1].value == pytest.approx(10 * times[0].value)
    assert times[0].high < 5 * times[0].value
    eight = told(model="Llama-3.1-8B", gpus=8, eval_samples=64, steps=1)
    one = told(model="Llama-3.1-8B", gpus=1, eval_samples=64, steps=1)
    of = [next(t.elapsed for t in each.estimate.terms if t.name == "evaluation") for each in (eight, one)]
    assert of[0] and of[1] and of[0].value == pytest.approx(of[1].value)  # it runs on one card


def test_what_fits_does_not_hang_on_how_sure_an_estimate_of_less_is():
    # Full fine-tuning: with one sample the optimiser's step is the peak, and less sure than a peak of activations.
    case = {**CASE, "gpu": "rtx-4090", "method": "full", "batch_size": 4, "framework": "transformers"}
    found = estimate_case(make_case(case), place(card="rtx-4090"), [*gpus().values()])
    surely, likely = found.fits
    assert surely.share == 0.95 and likely.share == 0.5
    assert (surely.micro_batch or 0) >= (found.estimate.micro_batch_size or 0)
    assert (likely.micro_batch or 0) >= (surely.micro_batch or 0) and (likely.seq_len or 0) >= (surely.seq_len or 0)
    assert "mi" not in (likely.gpu or "")[:2]


def test_a_case_reads_models_under_the_roots_and_nowhere_else(lab: Path, tmp_path: Path):
    from chiplog.tools import estimate_resources

    found = estimate_resources(case={**CASE, "model": "small", "seq_len": 16}).case
    assert found and found.case.model == str(lab / "models" / "small")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for outside in (str(tmp_path), str(tmp_path / "config.json")):
        with pytest.raises(OutsideRootsError, match="outside the folders that chiplog may touch"):
            estimate_resources(case={**CASE, "model": outside})


def test_a_card_in_chiplog_toml_that_is_none_is_named(workspace: Path):
    from chiplog.tools import estimate_resources

    (workspace / "chiplog.toml").write_text("[[gpus]]\nname = 'a100-80gb'\ncard = 'a10000'\n")
    with pytest.raises(SettingsError, match="card of the GPU a100-80gb: there is no GPU 'a10000' in the catalogue"):
        estimate_resources(case=CASE)
