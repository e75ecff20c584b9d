"""Validity guards over the runs of an experiment, through the tools: each fires where it should and is silent else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chiplog import tools
from chiplog.answers import SummaryAnswer, VerifyAnswer
from chiplog.folder import ExperimentFolder
from chiplog.guards import Verdict, verdicts
from chiplog.ledger import Ledger
from chiplog.record import Guard, Record, State, Trace, read_records

ASK: dict[str, Any] = {"question": "Which rank?", "name": "ranks", "models": {"S": "small"}, "dataset": "words"}
RANKS: dict[str, Any] = {"variables": {"lora_rank": [4, 16]}}
OF_A_JOB = ["gradient reach", "weights move", "optimizer coverage", "budget met"]
SOUND = [{"guard": guard, "ok": True, "examined": 8, "found": "all of them"} for guard in OF_A_JOB]
OVER_RUNS = ["arms differ", "arms are comparable", "nothing dropped", "seeds are seeds", "control present"]


def ran(**ask: Any) -> VerifyAnswer:
    """What verify_experiment says of an experiment that was planned and run."""
    tools.plan_experiment(**{**ASK, **ask})
    tools.setup_experiment_dirs("ranks")
    tools.submit_experiment("ranks", confirm=True)
    tools.experiment_status("ranks", wait_s=60)
    return tools.verify_experiment("ranks")


def by_name(answer: VerifyAnswer) -> dict[str, Verdict]:
    return {one.guard: one for one in answer.guards}


def summary() -> SummaryAnswer:
    return tools.summarize_experiment("ranks")


def shown(answer: SummaryAnswer) -> dict[tuple[str, str], bool]:
    return {(one.first, one.second): one.shown for one in answer.comparisons}


def test_a_sound_experiment_passes_every_guard(lab: Path):
    found = ran(**RANKS, seeds=[0, 1], controls={"guards": json.dumps(SOUND)})
    assert found.ok and {one.guard: one.ok for one in found.guards} == dict.fromkeys([*OVER_RUNS, *OF_A_JOB], True)
    assert found.summary.startswith("ranks: 9 of 9 guards passed.\n")
    assert found.next == ["summarize_experiment(experiment='ranks')"]
    text = (lab / "experiments" / "ranks" / "summary.md").read_text() if summary() else ""
    assert "## Guards\n\n9 of 9 guards passed.\n" in text
    records = read_records(lab / "experiments" / "ranks" / "records.jsonl")
    of_run = next(record for record in records if record.run == "rank4_seed0")
    assert [guard.model_dump() for guard in of_run.guards] == SOUND
    assert of_run.trace.steps == of_run.trace.steps_planned == 5 and of_run.trace.n_trainable == 40
    assert Ledger().get(of_run.key) == of_run


def test_runs_without_guards_of_their_own_are_not_checked_and_never_passed(lab: Path):
    found = ran(**RANKS)
    silent = by_name(found)["guards of the runs"]
    assert found.ok and silent.ok is None and silent.found == "not checked: rank4, rank16 wrote no guards.json"
    assert by_name(found)["seeds are seeds"].ok is None  # every arm was trained once
    assert "5 of 7 guards passed, 2 not checked" in found.summary
    assert "- guards of the runs: not checked: rank4, rank16 wrote no guards.json" in summary().summary
    assert shown(summary())["rank4", "S_base"]


@pytest.mark.parametrize("same", [True, False])
def test_between_arms_with_the_same_losses_nothing_is_shown(lab: Path, same: bool):
    controls = {"pretend": "same-losses"} if same else {}
    found = ran(runs=[{"right_up_to": 9, "lr": 1e-3}, {"right_up_to": 1, "lr": 1e-3}, {"lr": 1e-2}], controls=controls)
    fired = by_name(found)["arms differ"]
    assert found.ok is not same and fired.ok is not same
    told = summary()
    verdict = shown(told)
    assert verdict["right_up_to9_lr0.001", "right_up_to1_lr0.001"] is not same
    assert verdict["right_up_to9_lr0.001", "S_base"]  # the control has no losses: that conclusion stands
    if same:
        assert found.guards[0] == fired and "does not reach the training" in found.next[0]
        assert any("have the same losses, step for step" in words for words in told.not_shown)


def test_an_ablation_configured_as_its_control_is_seen_before_it_is_believed(lab: Path):
    found = ran(runs=[{"lora_rank": 64}, {"lr": 1e-4}])
    assert by_name(found)["arms differ"].found == "rank64, lr1e-4 have the same configuration"


def test_arms_that_validate_on_other_data_are_not_compared(lab: Path):
    runs = [{"right_up_to": 9}, {"right_up_to": 2, "pretend": "other-validation"}, {"right_up_to": 1}]
    fired = by_name(ran(runs=runs))["arms are comparable"]
    assert fired.ok is False and "validation set differ, and no setting that varies decides that" in fired.found
    assert fired.failures[0].concerns(["right_up_to9"], ["right_up_to2_pretend-other-validation"])
    assert not fired.failures[0].concerns(["right_up_to9"], ["right_up_to1"])


def test_what_a_job_did_not_look_at_is_not_checked(lab: Path):
    found = ran(**RANKS, controls={"guards": json.dumps(SOUND[1:2])})
    assert by_name(found)["weights move"].ok and by_name(found)["budget met"].ok  # the planner sees steps
    for guard in ("gradient reach", "optimizer coverage"):
        assert by_name(found)[guard].ok is None
        assert by_name(found)[guard].found == "not checked: rank4, rank16 did not look"


def test_a_guard_that_one_run_had_is_not_passed_by_the_other(lab: Path):
    names = [f"rank{rank}_seed{seed}" for rank in (4, 16) for seed in (0, 1)]
    all_saw = {name: {"guards": [Guard(**one) for one in SOUND]} for name in names}
    assert all(changed(lab, dict(all_saw))[guard].ok for guard in OF_A_JOB)
    one_did_not = all_saw | {"rank16_seed1": {"guards": [Guard(**SOUND[0])]}}
    moved = changed(lab, one_did_not)["weights move"]
    assert moved.ok is None and moved.found == "not checked: rank16_seed1 did not look"
    assert moved.runs == {name: name != "rank16_seed1" or None for name in names}


def test_a_failed_guard_of_a_run_turns_what_rests_on_it_into_not_shown(lab: Path):
    stuck = [{"guard": "weights move", "ok": False, "examined": 8, "found": "fewer than 1% changed"}]
    found = ran(**RANKS, controls={"guards": json.dumps(stuck)})
    assert by_name(found)["weights move"].failures[0].words == "rank4: fewer than 1% changed"
    assert found.next[0].startswith("weights move: raise lr")
    told = summary()
    assert not any(shown(told).values())
    words = "not shown for one training each, since the guard 'weights move' fired: rank4: fewer than 1% changed"
    assert any(words in line for line in told.not_shown)


def test_a_guard_that_examined_nothing_has_failed(lab: Path):
    empty = [{"guard": "structure", "ok": True, "examined": 0, "found": "all are positive"}]
    found = ran(**RANKS, controls={"guards": json.dumps(empty)})
    assert by_name(found)["structure"].found == "rank4: it examined nothing; rank16: it examined nothing"


def test_a_guards_file_that_cannot_be_read_is_no_pass(lab: Path):
    found = ran(**RANKS, controls={"guards": "[{"})
    assert by_name(found)["guards.json"].ok is False and "it cannot be read" in found.guards[0].found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pretend": "nan"}, "has losses that are no numbers"),
        ({"fail_at_step": 3}, "is FAILED"),
        ({"pretend": "nothing"}, "logged no step"),
    ],
    ids=str,
)
def test_an_arm_that_would_be_left_out_is_named(change: dict, words: str, lab: Path):
    found = ran(runs=[{"lora_rank": 4, **change}, {"lora_rank": 16}])
    (failure,) = by_name(found)["nothing dropped"].failures
    assert failure.words.startswith("rank4") and failure.words.endswith(words)
    assert not failure.concerns(["rank16"], ["S_base"])


def test_a_run_of_fewer_steps_than_planned_is_named(lab: Path):
    found = ran(runs=[{"lora_rank": 4, "pretend": "short"}, {"lora_rank": 16}])
    assert by_name(found)["budget met"].found == "rank4_pretend-short: 4 steps instead of 5"


def test_replicates_with_the_same_losses_are_no_replicates(lab: Path):
    fired = by_name(ran(variables={"lora_rank": [4]}, seeds=[0, 1], controls={"pretend": "same-losses"}))
    assert (
        fired["seeds are seeds"].found == "rank4_seed0, rank4_seed1 are replicates with the same losses, step for step"
    )
    assert not any(shown(summary()).values())


def changed(lab: Path, changes: Mapping[str, dict[str, Any]], **ask: Any) -> dict[str, Verdict]:
    """The guards of two ranks with two seeds and their control, some of their records changed."""
    tools.plan_experiment(**{**ASK, **RANKS, "seeds": [0, 1], **ask})
    tools.setup_experiment_dirs("ranks")
    runs = ExperimentFolder(lab / "experiments" / "ranks").runs()
    records = {}
    for number, run in enumerate(runs):
        told = {"losses_sha256": str(number), "steps": 5, "steps_planned": 5, "tokens": 200, "n_samples": 20}
        trace = Trace(**{**told, "val_sha256": "v", "train_sha256": "t", "batch_size": 4, "finite": True})
        change = dict(changes.get(run.name, {}))
        records[run.name] = Record(
            key=run.name, run=run.name, kind=run.kind, config=run.config, state=change.pop("state", State.COMPLETED),
            guards=change.pop("guards", []), trace=trace.model_copy(update=change),
        )  # fmt: skip
    return {one.guard: one for one in verdicts(runs, records)}


@pytest.mark.parametrize(
    ("trait", "value", "called"),
    [
        ("val_sha256", "w", "validation set"),
        ("train_sha256", "u", "training data"),
        ("n_samples", 19, "data order"),
        ("steps", 4, "steps"),
        ("tokens", 190, "tokens"),
        ("batch_size", 8, "effective batch"),
    ],
)
def test_what_the_plan_did_not_vary_must_not_differ(lab: Path, trait: str, value: Any, called: str):
    both = {f"rank16_seed{seed}": {trait: value} for seed in (0, 1)}
    fired = changed(lab, both)["arms are comparable"]
    assert fired.ok is False and fired.found.startswith(called)
    assert fired.failures[0].concerns(["rank4_seed0"], ["rank16_seed0"])


def test_trainable_parameters_may_differ_where_the_rank_does(lab: Path):
    of_rank = {"rank4_seed0": 40, "rank4_seed1": 40, "rank16_seed0": 160, "rank16_seed1": 160}
    sound = changed(lab, {name: {"n_trainable": n} for name, n in of_rank.items()})
    assert sound["arms are comparable"].ok and sound["seeds are seeds"].ok


def test_replicates_that_differ_in_more_than_the_seed_are_named(lab: Path):
    fired = changed(lab, {"rank4_seed1": {"n_trainable": 41}, "rank4_seed0": {"n_trainable": 40}})["seeds are seeds"]
    assert fired.found == (
        "rank4_seed0, rank4_seed1 are replicates that differ in more than the seed: trainable parameters"
    )


def test_a_control_that_failed_is_missed(lab: Path):
    assert changed(lab, {})["control present"].ok
    fired = changed(lab, {"S_base": {"state": State.FAILED}})["control present"]
    assert fired.found == "S_base, the control of rank4_seed0, rank4_seed1, rank16_seed0, rank16_seed1, is FAILED"


def test_a_trained_control_that_the_plan_names_is_missed_by_the_runs_of_its_seed(lab: Path):
    assert changed(lab, {}, control={"lora_rank": 4})["control present"].ok
    lost = {"rank4_seed1": {"state": State.TIMEOUT}}
    fired = changed(lab, lost, control={"lora_rank": 4}, name="ranks")["control present"]
    assert fired.found == "rank4_seed1, the control of rank16_seed1, is TIMEOUT"


def test_arms_that_differ_in_what_training_does_not_read_may_have_the_same_losses(lab: Path):
    found = ran(variables={"eval_limit": [5, 10]}, controls={"pretend": "same-losses"})
    assert by_name(found)["arms differ"].ok
