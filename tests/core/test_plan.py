"""Plans: what is run, how runs are named, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chiplog.errors import PlanError
from chiplog.expand import expand
from chiplog.plan import NAME, Experiment, Manual, Plan, dump_plan, parse_plan

SETTINGS = {
    "model": None,
    "dataset": None,
    "seed": 0,
    "lora_rank": 64,
    "lr": 1e-4,
    "batch_size": 16,
    "micro_batch_size": None,
    "packed": False,
    "dtype": "bf16",
    "targets": ["q_proj"],
    "dropout": 0.0,
    "alpha": None,
    "prompt": "{input}",
    "eval_limit": None,
}
TAKES: dict[str, Any] = {
    "micro_batch_size": "integer >= 1",
    "eval_limit": "integer >= 1",
    "dtype": ["bf16", "fp32"],
    "targets": ["q_proj", "v_proj"],
    "dropout": "number 0 to 1",
    "alpha": "number > 0",
}
EVALUATION = {key: SETTINGS[key] for key in ("model", "dataset", "eval_limit")}


def manual(recipe: str) -> Manual:
    return Manual(defaults=EVALUATION if recipe == "evaluate" else SETTINGS, takes=TAKES)


def a_plan(**experiment: Any) -> Plan:
    return Plan(
        name="p",
        question="q",
        models={"1B": "/m/1B", "3B": "/m/3B"},
        datasets={"words": "/d/words.json"},
        experiments=[Experiment(recipe="lora", **experiment)],
    )


def names(plan: Plan) -> list[str]:
    return [run.name for run in expand(plan, manual)]


def test_runs_are_the_product_of_the_variables_with_one_control_for_each_model():
    runs = expand(a_plan(variables={"model": ["1B", "3B"], "lora_rank": [4, 64]}), manual)
    assert [(run.name, run.kind) for run in runs] == [
        ("1B_rank4", "finetune"),
        ("1B_rank64", "finetune"),
        ("3B_rank4", "finetune"),
        ("3B_rank64", "finetune"),
        ("1B_base", "control"),
        ("3B_base", "control"),
    ]
    assert runs[0].config == {**SETTINGS, "model": "/m/1B", "dataset": "/d/words.json", "lora_rank": 4}
    assert runs[4].config == {**EVALUATION, "model": "/m/1B", "dataset": "/d/words.json"} and runs[4].recipe is None


def test_what_is_no_product_is_a_list_of_runs():
    cells = [{"model": "1B", "batch_size": 16}, {"model": "3B", "batch_size": 8}]
    runs = expand(a_plan(runs=cells, control="none"), manual)
    assert [(run.name, run.config["batch_size"]) for run in runs] == [("1B_batch16", 16), ("3B_batch8", 8)]


def test_replicates_have_their_seed_in_the_name_and_share_a_control():
    plan = a_plan(variables={"model": ["1B"]}, seeds=[0, 1])
    assert names(plan) == ["1B_seed0", "1B_seed1", "1B_base"]


def test_runs_that_a_plan_names_as_control_are_that_of_the_run_nearest_to_them_with_their_seed():
    variables = {"lora_rank": [4, 8], "lr": [1e-4, 3e-4]}
    plan = a_plan(controls={"model": "1B"}, variables=variables, seeds=[0, 1], control={"lora_rank": 4})
    runs = expand(plan, manual)
    assert len(runs) == 8  # no base model is evaluated
    assert {run.name: run.control for run in runs if run.seed == 1} == {
        "1B_rank4_lr1e-4_seed1": None,
        "1B_rank4_lr3e-4_seed1": None,
        "1B_rank8_lr1e-4_seed1": "1B_rank4_lr1e-4_seed1",
        "1B_rank8_lr3e-4_seed1": "1B_rank4_lr3e-4_seed1",
    }
    of_models = expand(a_plan(variables={"model": ["1B", "3B"]}, control={"model": "1B"}), manual)
    assert [run.control for run in of_models] == [None, "1B"]
    of_words = expand(
        a_plan(controls={"model": "1B"}, variables={"lr": ["1e-3", 0.01]}, control={"lr": "1e-3"}), manual
    )
    assert [run.control for run in of_words] == [None, "1B_lr-1e-3"]  # which YAML reads as a word
    assert parse_plan(yaml.safe_load(dump_plan(plan)), "it") == plan


def test_a_plan_without_controls_has_none():
    assert names(a_plan(variables={"model": ["1B"]}, control="none")) == ["1B"]


def test_the_learning_rate_reads_as_a_person_would_write_it():
    plan = a_plan(controls={"model": "1B"}, variables={"lr": [1e-4, "3e-4", 0.01, 2]}, control="none")
    runs = expand(plan, manual)
    assert [run.config["lr"] for run in runs] == [1e-4, 3e-4, 0.01, 2.0]
    assert names(a_plan(controls={"model": "1B"}, variables={"lr": [1e-4, 2.5e-5, 0.01]}, control="none")) == [
        "1B_lr1e-4",
        "1B_lr2.5e-5",
        "1B_lr0.01",
    ]


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ({"variables": {"model": ["1B"]}, "controls": {"lora_rnak": 4}}, "did you mean 'lora_rank'"),
        ({"variables": {"model": ["1B"]}, "controls": {"frobnicate": 4}}, "there are: alpha, batch_size"),
        ({"variables": {"model": ["1B", "1B"]}}, "two runs are called '1B'"),
        ({"variables": {"model": ["7B"]}}, "say which of 1B, 3B"),
        ({"variables": {"lora_rank": [4]}}, "the model of a run is not said"),
        ({"variables": {"model": []}}, "has no values"),
        ({"variables": {"model": ["1B"]}, "control": {"lora_rnak": 4}}, "did you mean 'lora_rank'"),
        ({"variables": {"model": ["1B", "3B"]}, "control": {"seed": 0}}, "control names a seed"),
        ({"variables": {"model": ["1B", "3B"]}, "control": {"model": "7B"}}, "no run has the settings of control"),
        ({"variables": {"model": ["1B"]}, "control": {"model": "1B"}}, "every run has the settings of control"),
        ({"variables": {"model": ["1B"]}, "runs": [{"model": "1B"}]}, "remove one"),
        ({"variables": {"model": ["1B"]}, "controls": {"batch_size": "16"}}, "give a whole number"),
        ({"variables": {"model": ["1B"]}, "controls": {"batch_size": -1}}, "at least 1"),
        ({"variables": {"model": ["1B"]}, "controls": {"batch_size": 2**40}}, "at most 4,294,967,295"),
        ({"variables": {"model": ["1B"]}, "controls": {"batch_size": True}}, "give a whole number"),
        ({"variables": {"model": ["1B"]}, "controls": {"dtype": "bfloat"}}, "choose from bf16, fp32"),
        ({"variables": {"model": ["1B"]}, "controls": {"targets": ["q_proj", "x"]}}, "choose from q_proj, v_proj"),
        ({"variables": {"model": ["1B"]}, "controls": {"targets": []}}, "choose from q_proj"),
        ({"variables": {"model": ["1B"]}, "controls": {"targets": "q_proj"}}, "give a list"),
        ({"variables": {"model": ["1B"]}, "controls": {"lr": ["1e-4"]}}, "give one value"),
        ({"variables": {"model": ["1B"]}, "controls": {"dropout": 1.5}}, "at most 1"),
        ({"variables": {"model": ["1B"]}, "controls": {"alpha": 0}}, "above 0"),
        ({"variables": {"model": ["1B"]}, "controls": {"prompt": 7}}, "give a text"),
        ({"variables": {"model": ["1B"]}, "controls": {"prompt": None}}, "give a text"),
        ({"variables": {"model": ["1B"]}, "controls": {"lr": "inf"}}, "at least 0"),
        ({"variables": {"model": ["1B"]}, "seeds": [-1]}, "seed is -1"),
        ({"variables": {"model": ["1B"]}, "controls": {"batch_size": 0}}, "at least 1"),
        ({"variables": {"model": ["1B"]}, "controls": {"lr": "nan"}}, "at least 0"),
        ({"variables": {"model": ["1B"]}, "controls": {"eval_limit": "x"}}, "give a whole number"),
        ({"variables": {"model": ["1B"], "seed": [1, 2]}}, "give seeds=[...]"),
        ({"variables": {"model": ["1B"]}, "controls": {"packed": 1}}, "true or false"),
        ({"variables": {"model": ["1B"]}, "controls": {"batch_size": 12, "micro_batch_size": 5}}, "1, 2, 3, 4, 6, 12"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_in_words(experiment: dict[str, Any], words: str):
    with pytest.raises(PlanError) as refused:
        expand(a_plan(**experiment), manual)
    assert words in str(refused.value)


def test_settings_are_taken_as_their_kind():
    chosen = {"alpha": 8, "targets": ["v_proj"], "eval_limit": 5, "dropout": "1e-1", "dtype": "fp32"}
    (run,) = expand(a_plan(controls={"model": "1B", **chosen}, control="none"), manual)
    assert {key: run.config[key] for key in chosen} == {**chosen, "alpha": 8.0, "dropout": 0.1}
    assert isinstance(run.config["alpha"], float)


def test_experiments_of_one_model_share_its_control_if_it_is_the_same():
    first = Experiment(recipe="lora", variables={"model": ["1B"], "lr": [1e-4, 1e-3]})
    second = Experiment(recipe="lora", variables={"model": ["1B"], "lora_rank": [4, 8]})
    plan = a_plan().model_copy(update={"experiments": [first, second]})
    assert names(plan).count("1B_base") == 1
    other = second.model_copy(update={"controls": {"eval_limit": 5}})
    with pytest.raises(PlanError, match="two runs are called '1B_base'"):
        names(plan.model_copy(update={"experiments": [first, other]}))


@pytest.mark.parametrize("metric", ["", "a b", "a|b", "<b>", "x" * 41, "$x"])
def test_a_metric_has_a_name_that_can_head_a_column(metric: str):
    with pytest.raises(PlanError, match="metrics"):
        parse_plan({**a_plan(variables={"model": ["1B"]}).model_dump(), "metrics": [metric]}, "test")


def test_names_that_differ_only_in_case_collide():
    plan = a_plan(variables={"model": ["1B"]}).model_copy(update={"models": {"a": "/m", "A": "/n"}})
    plan = plan.model_copy(update={"experiments": [Experiment(recipe="lora", variables={"model": ["a", "A"]})]})
    with pytest.raises(PlanError, match="two runs are called"):
        expand(plan, manual)


@given(st.text(min_size=1, max_size=30))
def test_no_short_name_puts_a_character_into_a_run_that_a_shell_would_read(key: str):
    plan = a_plan(variables={"model": ["1B"]}).model_copy(
        update={"models": {key: "/m"}, "experiments": [Experiment(recipe="lora", variables={"model": [key]})]}
    )
    try:
        runs = expand(plan, manual)
    except PlanError:
        return
    assert all(NAME.fullmatch(run.name) for run in runs)


def test_a_plan_is_the_same_after_it_was_written_and_read_and_the_same_bytes_again():
    import yaml

    plan = a_plan(variables={"model": ["1B"], "lr": [1e-4, 0.5]}, controls={"packed": True})
    text = dump_plan(plan)
    again = parse_plan(yaml.safe_load(text), "test")
    assert again == plan and dump_plan(again) == text


def test_a_misspelt_field_of_a_plan_is_named():
    with pytest.raises(PlanError) as refused:
        parse_plan({**a_plan().model_dump(), "hypotesis": "x"}, "plan.yaml")
    assert "plan.yaml" in str(refused.value) and "hypotesis: there is no such field" in str(refused.value)
