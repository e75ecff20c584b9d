"""Validations during training: in the ledger, in estimates, in what is left of a run, and in the summary."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from chiplog.engines import Job
from chiplog.estimate import RunEstimate, Workload
from chiplog.estimate.estimator import Place, estimate_job, estimate_run, learn
from chiplog.estimate.gpus import gpu
from chiplog.estimate.workload import SplitTokens, training_steps, validations, workload
from chiplog.ledger import Ledger
from chiplog.ledger.metrics import Event, Start, Step, Validation, read_events, train_usage
from chiplog.plan import Resources, Run
from chiplog.planning import make_plan, make_request
from chiplog.progress import describe
from chiplog.record import Prediction, Record, State, Usage
from chiplog.settings import load_settings
from chiplog.sizing import PlannedRun
from chiplog.summary import summarize
from chiplog.tables import summary_table
from tests.core.test_estimate import a_record, a_run
from tests.core.test_forecast import job
from tests.core.test_planning import bundled_recipes
from tests.core.test_summary import ended, first, set_up

VAL = {"val_split": "validation", "run_val_every_n_steps": 25}
NO_VAL = {"val_split": None, "run_val_every_n_steps": None}
ONCE = {"val_samples": 10, "val_label_tokens": 100}


def start(step: int = 0) -> Start:
    return Start(event="start", started=datetime.now(UTC), device="cpu", setup_s=1.0, step=step, total_steps=100)


def steps(first: int, last: int) -> list[Event]:
    about = {"event": "step", "loss": 1.0, "tokens": 10, "seconds": 1.0, "peak_mem_bytes": 5, "mem_kind": "host_rss"}
    return [Step.model_validate({**about, "step": number}) for number in range(first, last + 1)]


def validation(step: int, loss: float, seconds: float = 10.0) -> Validation:
    return Validation(event="validation", step=step, loss=loss, samples=10, label_tokens=100, seconds=seconds)


def test_validations_that_a_resumed_run_repeats_count_once_and_are_no_part_of_its_steps():
    before = [start(), *steps(1, 4), validation(2, 0.5), validation(4, 0.1)]
    usage = train_usage([*before, start(step=2), *steps(3, 4), validation(4, 0.4, seconds=30.0)])
    assert (usage.val_losses, usage.val_steps, usage.val_s) == ([0.5, 0.4], [2, 4], 40.0)
    assert (usage.val_samples, usage.val_label_tokens, usage.train_s) == (10, 100, 4.0)
    assert train_usage([start(), *steps(1, 4)]).val_s is None


def test_the_best_validation_is_the_lowest_loss_that_is_a_number():
    usage = train_usage([start(), *(validation(n, loss) for n, loss in ((1, math.nan), (2, 0.25), (3, 0.5)))])
    assert usage.best_validation == (0.25, 2)
    assert Usage(val_losses=[0.5, 0.25]).best_validation == (0.25, None)  # of a log that names no steps
    assert Usage(val_losses=[math.nan]).best_validation is None and Usage().best_validation is None


def test_a_line_of_a_validation_is_read_as_the_recipe_writes_it(tmp_path: Path):
    line = {"event": "validation", "step": 3, "loss": 1.5, "best": True, "label_tokens": 7, "samples": 2, "seconds": 4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    expected = Validation(event="validation", step=3, loss=1.5, label_tokens=7, samples=2, seconds=4.0)
    assert read_events(tmp_path / "metrics.jsonl") == [expected]


@pytest.mark.parametrize(
    ("config", "total", "times"),
    [
        (VAL, 100, 4), (VAL, 101, 5), (VAL, 24, 1), (VAL, 0, 0), ({**VAL, "run_val_every_n_steps": None}, 100, 1),
        ({**VAL, "val_split": None}, 100, 0), ({}, 100, 0),
    ],
)  # fmt: skip
def test_a_run_validates_every_so_many_steps_and_at_its_end(config: dict[str, Any], total: int, times: int):
    assert validations(config, total) == times


def work(times: int, samples: int | None = 10, labels: int | None = 100) -> Workload:
    once = {"val_samples": samples, "val_label_tokens": labels} if times else {}
    plain = Workload(steps=100, tokens=10_000, eval_samples=50, validations=times, validation_passes=3 * times)
    return plain.model_copy(update=once)


def validated(key: str = "local:v", config: dict[str, Any] | None = None, **usage: Any) -> Record:
    """A run of 40 s without its four validations, which took 20 s."""
    seen = {"elapsed_s": 60.0, "val_losses": [1.0, 0.9, 0.8, 0.7], "val_s": 20.0, **ONCE}
    return a_record(key, {**VAL, **(config or {})}, **{**seen, **usage})


def terms(found: RunEstimate) -> dict[str, float | None]:
    return {term.name: term.elapsed and round(term.elapsed.value, 6) for term in found.terms}


def test_validations_take_what_those_of_such_runs_took_each():
    found = estimate_run(a_run(**{**VAL, "run_val_every_n_steps": 10}), work(10), [validated()])
    assert terms(found) == {
        "start-up": 4.0, "training": 20.0, "validation": 50.0, "checkpoints": 1.0, "evaluation start-up": 5.0,
        "evaluation": 10.0,
    }  # fmt: skip
    assert found.elapsed and found.elapsed.value == pytest.approx(90.0) and found.elapsed.basis == "scaled"
    assert found.time_limit_s and found.time_limit_s > 90


@pytest.mark.parametrize(
    ("change", "planned", "seconds"),
    [
        ({"val_split": "other"}, work(4, samples=30, labels=100), 60.0),  # samples alike: by how many
        ({"dataset": "/long"}, work(4, samples=30, labels=200), 40.0),  # other samples: by their tokens
        ({"dataset": "/long"}, work(4, samples=30, labels=None), 60.0),
    ],
)
def test_validations_grow_with_their_split(change: dict[str, Any], planned: Workload, seconds: float):
    assert terms(estimate_run(a_run(**{**VAL, **change}), planned, [validated()]))["validation"] == pytest.approx(
        seconds
    )


def test_the_nearest_validations_are_those_whose_passes_are_most_alike_however_often_they_were_made():
    near = validated("local:near", {"run_val_every_n_steps": 50, "epochs": 2}, val_losses=[1.0, 0.9])  # 10 s each
    found = estimate_run(a_run(**VAL), work(4), [near, validated("local:far", {"lora_rank": 64}, val_s=400.0)])
    assert terms(found)["validation"] == pytest.approx(40.0)


def test_where_nothing_tells_of_a_validation_there_is_no_time():
    plain = a_record(config=NO_VAL)
    found = estimate_run(a_run(**VAL), work(4), [plain])
    assert (found.elapsed, found.terms, found.time_limit_s) == (None, [], None)
    assert found.peak_mem is None  # the samples of the split may be longer
    assert estimate_run(a_run(**NO_VAL), work(0), [plain]).elapsed


def test_runs_that_validate_and_runs_that_do_not_tell_each_other_their_pace_and_not_their_time():
    plain, slow = a_record(config=NO_VAL), validated()
    without = estimate_run(a_run(**NO_VAL), work(0), [slow])
    assert without.elapsed and without.elapsed.value == pytest.approx(40.0) and "validation" not in terms(without)
    # Two that validate, of another rank, tell how long that takes; the pace is that of the run without.
    others = [validated(f"local:v{n}", {"lora_rank": 64}, train_s=90.0) for n in range(2)]
    found = estimate_run(a_run(**VAL), work(4), [plain, *others])
    assert terms(found)["training"] == pytest.approx(20.0) and terms(found)["validation"] == pytest.approx(20.0)
    assert found.peak_mem and "e/local:1" not in found.peak_mem.evidence  # it passed no samples of the split


def test_a_run_whose_split_was_another_is_not_the_same():
    same = estimate_run(a_run(**VAL), work(4), [validated()]).elapsed
    grown = estimate_run(a_run(**VAL), work(4, samples=20), [validated()]).elapsed
    assert same and (same.value, same.basis) == (pytest.approx(60.0), "same-configuration")
    assert grown and (grown.value, grown.basis) == (pytest.approx(80.0), "scaled")


def test_a_run_that_its_limit_ended_would_have_validated_again():
    done = validated(elapsed_s=60.0)
    stopped = validated("local:t", elapsed_s=50.0, steps=50, train_s=10.0, val_losses=[1.0, 0.9], val_s=10.0)
    found = estimate_run(a_run(**VAL), work(4), [done, stopped.model_copy(update={"state": State.TIMEOUT})]).elapsed
    assert found and found.value == pytest.approx(math.sqrt(60 * (50 + 10 + 10)))


def test_the_passes_of_a_validation_are_those_of_its_own_samples():
    lengths = [10, 20, 30, 40, 50]
    config = {"eval_limit": None, "max_steps": None, "max_seq_len": 40, "batch_size": 4, "micro_batch_size": 2}
    run, split = a_run(**{**VAL, **config}), SplitTokens(lengths, rows=5, longest=50, label=9)
    trained = training_steps(run.config, [10] * 400, 400, 10)
    found = workload(run, trained, 50, validated=split)
    assert (found.validations, found.validation_passes, found.val_samples, found.val_label_tokens) == (4, 4 * 3, 5, 9)
    # Cut to 40: 10 20 30 40 40. Of two drawn, the longest is expected to be of 36 tokens; the fifth is of 28.
    assert found.validation_mean_len == pytest.approx((2 * 2 * 36 + 28) / 3 / 2)
    packed = workload(a_run(**{**VAL, **config, "packed": True}), trained, 50, validated=split)
    assert (packed.validation_passes, packed.validation_mean_len) == (4 * 2, 40.0)
    assert workload(run, trained, 50).validations == 0


def test_longer_samples_make_longer_validations():
    one, where = job(), Place(gpu("a100-80gb-sxm"), learn([]))
    times = []
    for length in (None, 2048.0, 1024.0):
        planned = work(4).model_copy(update={"validation_mean_len": length, "eval_samples": 0})
        times.append(terms(estimate_job(one, planned, where, trains=True, gpus=1))["validation"] or 0.0)
    assert times[0] == times[1] and 0.4 < times[2] / times[1] < 0.6


def on_gpu(lab: Path, **change: Any) -> PlannedRun:
    bundled_recipes(lab)
    (lab / "chiplog.toml").write_text("[slurm]\n[[gpus]]\nname = 'a100-80gb-sxm'\n")
    controls = {"batch_size": 4, "warmup_steps": 0, **change.pop("controls", {})}
    ask = {"question": "q", "name": "p", "models": {"S": "small"}, "dataset": "words", "control": "none", "gpus": 1}
    return make_plan(make_request({**ask, "controls": controls, **change}), load_settings(), Ledger()).rows[0]


def test_without_runs_a_validation_is_the_forward_share_of_passes_over_its_split(lab: Path):
    plain, row = on_gpu(lab).estimate, on_gpu(lab, validation=True, controls={"run_val_every_n_steps": 2})
    found = terms(row.estimate)
    # 5 steps of a pass each; after steps 2, 4 and 5 the 10 samples are 3 passes, which go forward only.
    assert row.steps == 5 and found["training"] and found["validation"]
    assert found["validation"] / found["training"] == pytest.approx(3 * 3 / 2 / 5, rel=0.01)
    assert plain.elapsed and row.estimate.elapsed and not row.estimate.elapsed.value < plain.elapsed.value
    assert row.estimate.elapsed.value == pytest.approx(sum(seconds or 0 for seconds in found.values()), rel=1e-4)


def test_several_gpus_share_the_passes_of_a_validation(lab: Path):
    row = on_gpu(lab, gpus=2, validation=True)
    found = terms(row.estimate)
    # 5 steps of a pass of 2 on each; the 10 samples are 5 passes of 2, 3 rounds.
    assert found["training"] and found["validation"]
    assert found["validation"] / found["training"] == pytest.approx(3 / 2 / 5, rel=0.01)


def training(**config: Any) -> Run:
    return a_run(**config).model_copy(update={"resources": Resources(time_limit_s=90)})


def running(events: list[Event], run: Run | None = None, said: Prediction | None = None):
    job = Job(id="1", name="a", state=State.RUNNING, submitted=None, log=Path("a"), ran_s=60.0, attempt_s=60.0)
    return describe("a", job, 1, "1", events, run, said)


def test_what_is_left_holds_the_validations_that_are_still_to_come():
    events: list[Event] = [start(), *steps(1, 25), validation(25, 1.0, 8.0), *steps(26, 50), validation(50, 0.9, 12.0)]
    found = running(events, training(**VAL))
    assert found.training_left_s == pytest.approx(50 + 2 * 10) and found.training_left_interval_s
    assert found.training_left_interval_s[0] < 50 + 2 * 8 and found.training_left_interval_s[1] > 50 + 2 * 12
    assert running(events, training(**NO_VAL)).training_left_s == pytest.approx(50)
    # The one at the end is all that is left, and the checkpoint before lost one that counts as still to come.
    assert running([*events, *steps(51, 100)], training(**VAL)).training_left_s == pytest.approx(20)
    assert running([*events, start(step=40), *steps(41, 50)], training(**VAL)).training_left_s == pytest.approx(
        50 + 3 * 8
    )


def test_before_the_first_validation_what_is_left_has_no_upper_end_and_is_warned_of_all_the_same():
    said = Prediction(elapsed_s=(70.0, 60.0, 80.0), basis="scaled")
    found = running([start(), *steps(1, 50)], training(**{**VAL, "run_val_every_n_steps": None}), said)
    assert found.training_left_s == pytest.approx(50) and found.training_left_interval_s is None
    assert ["slower than predicted" in found.warnings[0], "time limit" in found.warnings[1]] == [True, True]


def test_the_summary_shows_the_best_validation_loss_where_runs_validate(lab: Path):
    folder = set_up(lab, [0])
    plain = [ended(folder, name, first(10)) for name in ("rank4", "rank16", "S_base")]
    assert "val. loss" not in summary_table(summarize(folder, plain).rows, ["exact_match"])
    seen = plain[0].usage.model_copy(update={"val_losses": [0.5, 0.25, 0.375], "val_steps": [10, 20, 30]})
    rows = summarize(folder, [plain[0].model_copy(update={"usage": seen}), *plain[1:]]).rows
    assert [(row.val_loss_best, row.val_loss_best_step) for row in rows] == [(0.25, 20), (None, None), (None, None)]
    head, _, one, other, _ = summary_table(rows, ["exact_match"]).split("\n")
    assert [line.split(" | ")[-2] for line in (head, one, other)] == ["best val. loss (step)", "0.25 (20)", "–"]
