"""Estimates from the ledger's own runs, by numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chiplog.estimate import Workload
from chiplog.estimate.estimator import estimate_run
from chiplog.ledger.metrics import Start, Step, of_job, train_usage
from chiplog.plan import Resources, Run
from chiplog.record import Record, State, Usage

CONFIG = {"model": "/m", "dataset": "/d", "prompt": "{input}", "lr": 1e-4, "epochs": 1, "lora_rank": 4, "batch_size": 8}
WORK = Workload(steps=100, tokens=10_000, eval_samples=50)


def a_run(**config: Any) -> Run:
    return Run(
        name="r", kind="finetune", recipe="lora", model="M", dataset="d", seed=0, varied={},
        config=CONFIG | config, resources=Resources(cpus=1),
    )  # fmt: skip


def a_record(key: str = "local:1", config: dict[str, Any] | None = None, **usage: Any) -> Record:
    used = {
        "device": "cpu", "cpus": 1, "gpus": 0, "elapsed_s": 40.0, "setup_s": 4.0, "train_s": 20.0, "checkpoint_s": 1.0,
        "eval_setup_s": 5.0, "eval_s": 10.0, "eval_samples": 50, "steps": 100, "tokens": 10_000,
        "peak_mem_bytes": 1000, "mem_kind": "host_rss",
    }  # fmt: skip
    return Record(
        key=key, experiment="e", run=key, kind="finetune", recipe="lora", state=State.COMPLETED,
        config=CONFIG | (config or {}), usage=Usage.model_validate(used | usage),
    )  # fmt: skip


def elapsed(run: Run, work: Workload, *records: Record) -> tuple[float, str] | None:
    found = estimate_run(run, work, records).elapsed
    return (found.value, found.basis) if found else None


def test_the_same_configuration_is_taken_as_it_was():
    found = estimate_run(a_run(), WORK, [a_record()])
    assert found.elapsed and found.peak_mem
    assert (found.elapsed.value, found.elapsed.basis) == (pytest.approx(40.0), "same-configuration")
    assert found.elapsed.low < 40 / 1.4 and found.elapsed.high > 40 * 1.4  # one run says little
    assert (found.peak_mem.value, found.mem_kind) == (pytest.approx(1000), "host_rss")


def test_more_runs_that_agree_narrow_the_interval():
    widths = []
    for n in (1, 3, 10):
        one = estimate_run(a_run(), WORK, [a_record(f"local:{i}", elapsed_s=40.0 + i % 2) for i in range(n)]).elapsed
        assert one
        widths.append(one.high / one.low)
    assert widths[0] > widths[1] > widths[2] > 1


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"seed": 7}])
def test_what_changes_no_speed_leaves_the_configuration_the_same(change: dict[str, Any]):
    assert elapsed(a_run(**change), WORK, a_record()) == (pytest.approx(40.0), "same-configuration")


def test_twice_the_tokens_take_twice_the_training_and_as_much_of_the_rest():
    double = Workload(steps=200, tokens=20_000, eval_samples=50)
    # setup 4 + checkpoint 2 x 1 + eval setup 5 + eval 10 + training 2 x 20
    assert elapsed(a_run(epochs=2), double, a_record()) == (pytest.approx(61.0), "scaled")
    found = estimate_run(a_run(epochs=2), double, [a_record()]).elapsed
    assert found and found.high / found.value > 1.8


def test_an_interval_holds_both_scaling_by_tokens_and_by_steps():
    longer_samples = Workload(steps=100, tokens=100_000, eval_samples=50)
    found = estimate_run(a_run(dataset="/long"), longer_samples, [a_record()]).elapsed
    assert found and found.value == pytest.approx(220.0)  # tokens: 20 + 10 x 20
    assert found.low <= 40.0  # steps: 20 + 20


def test_the_nearest_configuration_speaks_alone():
    far = a_record("local:far", {"lora_rank": 64, "epochs": 2}, train_s=500.0)
    near = a_record("local:near", {"lora_rank": 64})
    found = estimate_run(a_run(), WORK, [far, near])
    training = next(term.elapsed for term in found.terms if term.name == "training")
    assert training and training.evidence == ["e/local:near"] and training.value == pytest.approx(20.0)
    assert found.elapsed and found.elapsed.value == pytest.approx(40.0)


def test_runs_that_differ_in_epochs_alone_tell_the_pace_of_a_step():
    records = [a_record(f"local:{i}", {"epochs": 2}, steps=200, train_s=40.0 + i) for i in range(6)]
    records.append(a_record("local:rank", {"lora_rank": 64}, train_s=90.0))
    training = next(term.elapsed for term in estimate_run(a_run(), WORK, records).terms if term.name == "training")
    assert training and training.n_evidence == 6 and training.value == pytest.approx(21.2, rel=0.01)
    assert training.high / training.low < 2


def test_the_evaluation_and_the_start_are_those_of_any_training_of_the_model():
    other = a_record("local:b16", {"batch_size": 16, "lora_rank": 8}, eval_s=30.0, setup_s=9.0)
    found = {term.name: term.elapsed for term in estimate_run(a_run(), WORK, [a_record(train_s=None), other]).terms}
    assert not found  # nothing tells of the training, so there is no time
    found = estimate_run(a_run(batch_size=16), WORK, [a_record(), other])
    terms = {term.name: term.elapsed for term in found.terms}
    assert terms["evaluation"] and terms["evaluation"].n_evidence == 2
    assert terms["training"] and terms["training"].n_evidence == 1


@pytest.mark.parametrize("odd", [-5.0, float("nan"), float("inf"), 0.0])
def test_a_figure_that_is_none_ends_no_estimate(odd: float):
    for field in ("elapsed_s", "train_s", "eval_s", "setup_s", "checkpoint_s", "eval_setup_s"):
        record = a_record("local:odd", None, **{field: odd})
        found = estimate_run(a_run(epochs=2), WORK, [record, a_record("local:2")])
        assert all(not term.elapsed or term.elapsed.value > 0 for term in found.terms)


@pytest.mark.parametrize(
    "record",
    [
        a_record(config={"model": "/other"}),
        a_record(config={"batch_size": 16}),
        a_record(cpus=8),
        a_record().model_copy(update={"state": State.FAILED}),
        a_record().model_copy(update={"recipe": "other"}),
        a_record().model_copy(update={"kind": "control"}),
    ],
)
def test_what_is_no_evidence_gives_no_number(record: Record):
    found = estimate_run(a_run(), WORK, [record])
    assert (found.elapsed, found.peak_mem, found.basis) == (None, None, "none")


def test_a_resumed_run_is_no_measure_of_a_whole_one():
    # It took 3 s, since it only went on; its terms still tell.
    found = elapsed(a_run(), WORK, a_record(resumed=True, elapsed_s=3.0))
    assert found == (pytest.approx(40.0), "scaled")


def test_memory_after_model_init_is_never_a_peak():
    found = estimate_run(a_run(), WORK, [a_record(mem_kind="after_init")])
    assert found.peak_mem is None and found.elapsed


def test_memory_is_not_taken_from_other_samples():
    assert estimate_run(a_run(dataset="/long"), WORK, [a_record()]).peak_mem is None


def events(*steps: int, start: int = 0, seconds: float = 1.0, begun: str = "2026-01-01T00:00:00+00:00") -> list[Any]:
    about = {"device": "cpu", "n_params": 5, "total_steps": 100, "setup_s": 2.0, "packages": {}, "started": begun}
    memory = {"peak_mem_bytes": 7, "mem_kind": "host_rss"}
    lines = [{"event": "step", "step": n, "loss": 1 / n, "tokens": 10, "seconds": seconds, **memory} for n in steps]
    begin = Start.model_validate_json(json.dumps({"event": "start", "step": start, **about}))
    return [begin, *map(Step.model_validate, lines)]


def test_usage_adds_up_the_steps():
    usage = train_usage(events(1, 2, 3, 4))
    assert (usage.steps, usage.train_s, usage.tokens, usage.tokens_per_s, usage.resumed) == (4, 4.0, 40, 10.0, False)
    assert (usage.loss_first, usage.loss_last) == (1.0, 0.25)


def test_where_every_second_step_is_logged_they_stand_for_all():
    usage = train_usage(events(2, 4))
    assert (usage.steps, usage.train_s, usage.tokens) == (4, 4.0, 40)


def test_a_resumed_run_counts_each_step_once_and_both_set_ups():
    usage = train_usage([*events(1, 2, 3), *events(3, 4, start=2, seconds=2.0)])
    assert (usage.steps, usage.train_s, usage.setup_s, usage.resumed) == (4, 6.0, 4.0, True)


def test_steps_that_an_attempt_lost_are_not_counted():
    usage = train_usage([*events(*range(1, 51)), *events(*range(1, 11))])
    assert (usage.steps, usage.train_s) == (10, 10.0)


def test_an_attempt_does_not_own_what_the_one_before_left():
    left = events(1, 2, begun="2026-01-01T00:00:00+00:00")
    assert of_job(left, "2026-01-01T00:00:00.300+00:00") == left
    assert of_job(left, "2026-01-01T00:00:05.000+00:00") == [] and of_job(left, None) == []


def test_a_run_that_its_limit_ended_says_that_more_is_needed():
    stopped = a_record("local:t", elapsed_s=60.0, steps=50, train_s=50.0, eval_s=None)
    stopped = stopped.model_copy(update={"state": State.TIMEOUT})
    assert elapsed(a_run(), WORK, stopped) is None  # nothing tells of the evaluation
    # 40 s, and 60 s of which 50 were for half of the steps: 110.
    found = estimate_run(a_run(), WORK, [a_record(), stopped]).elapsed
    assert found and found.n_evidence == 2 and found.value == pytest.approx((40 * 110) ** 0.5)
    other = a_record("local:o", {"lora_rank": 64}, train_s=5.0)
    stopped = stopped.model_copy(update={"usage": stopped.usage.model_copy(update={"steps": None})})
    found = estimate_run(a_run(), WORK, [other, stopped]).elapsed
    assert found and found.low == found.value == 60.0 and any("was stopped after" in words for words in found.assumed)


def test_a_run_that_did_not_complete_tells_its_pace_after_twenty_steps():
    for steps, n_evidence in ((19, 1), (20, 2)):
        slow = a_record("local:c", steps=steps, train_s=4.0 * steps).model_copy(update={"state": State.CANCELLED})
        done = a_record(config={"epochs": 2}, steps=200, train_s=40.0)
        terms = {term.name: term.elapsed for term in estimate_run(a_run(), WORK, [done, slow]).terms}
        assert terms["training"] and terms["training"].n_evidence == n_evidence
