"""What every study keeps: plans that expand and render, data that are the same twice, a scorer that can tell."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chiplog.bundle import study_folder, study_names
from chiplog.expand import expand
from chiplog.inputs import create_dataset
from chiplog.plan import parse_plan
from chiplog.recipes import choose_recipe, manual
from chiplog.render import render
from chiplog.settings import Settings
from chiplog.studies import list_studies, run_command
from chiplog.trainer_files import load_trainer_file

STUDIES = study_names()
PLANS = [(study.name, plan) for study in list_studies() for plan in study.plans]


def test_there_are_studies():
    assert {"capitalization", "scaling_laws"} <= set(STUDIES)


@pytest.mark.parametrize(("study", "plan"), PLANS)
def test_a_plan_of_a_study_expands_and_renders(study: str, plan: str, workspace: Path):
    values = yaml.safe_load((study_folder(study) / "experiments.yaml").read_text())[plan]
    for experiment in values["experiments"]:
        experiment.setdefault("recipe", choose_recipe(experiment.get("resources", {}).get("gpus", 0), False).name)
    checked = parse_plan({**values, "name": "p", "study": study}, f"{study}/{plan}")
    runs = expand(checked, manual)
    files = render(checked, runs, Settings.model_validate({"workspace": workspace}))
    assert {f"runs/{run.name}/run.sbatch" for run in runs} <= files.keys()
    # A control is a base model that is not fine-tuned; what is trained from nothing has none, and says so.
    wanted = any(experiment.control == "base_model" for experiment in checked.experiments)
    assert any(run.kind == "control" for run in runs) is wanted
    assert wanted or all(experiment.framework == "trainer" for experiment in checked.experiments)


def test_the_counts_of_the_published_plan_come_out():
    plan = yaml.safe_load((study_folder("capitalization") / "experiments.yaml").read_text())["batch_from_logs"]
    plan["experiments"][0]["recipe"] = "lora_finetune_single_device"
    runs = expand(parse_plan({**plan, "name": "p"}, "test"), manual)
    steps = {run.name: 8000 // run.config["batch_size"] * run.config["epochs"] for run in runs if run.kind != "control"}
    assert steps == {
        "1B_rank4_batch16": 1500,
        "1B_rank64_batch16": 1500,
        "3B_rank4_batch8": 3000,
        "3B_rank64_batch8": 3000,
    }


# Options of each generator that make little, and the forms that its data have.
TINY = {
    "capitalization": {"words_len": 5, "train_percent": 80, "n": 50, "seed": 3},
    "scaling_laws": {"files": 6, "seed": 3},
}
FORMS = {"capitalization": [{"chat": False}, {"chat": True}], "scaling_laws": [{}, {"tokenizer": "bpe:300"}]}
MAKE_DATA = [name for name in STUDIES if (study_folder(name) / "data.py").is_file()]


@pytest.mark.parametrize(("study", "form"), [(study, form) for study in MAKE_DATA for form in FORMS[study]], ids=str)
def test_the_same_options_make_the_same_bytes(study: str, form: dict, tmp_path: Path):
    made = [run_command(study, "data.py", {**TINY[study], **form, "out": tmp_path / name}) for name in "ab"]
    assert made[0]["sha256"] == made[1]["sha256"]
    contents = [
        {
            file.relative_to(tmp_path / name): file.read_bytes()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        }
        for name in "ab"
    ]
    assert contents[0] == contents[1] and contents[0]
    other = run_command(study, "data.py", {**TINY[study], "seed": 4, **form, "out": tmp_path / "c"})
    assert other["sha256"] != made[0]["sha256"]


@pytest.mark.parametrize("study", [name for name in STUDIES if (study_folder(name) / "evaluate.py").is_file()])
def test_an_oracle_scores_full_marks_and_a_constant_scores_chance(study: str, tmp_path: Path):
    made = run_command(study, "data.py", {**TINY[study], "out": tmp_path})
    rows = load_trainer_file("rows").read_rows(Path(made["path"]), "test")
    targets = [row["output"] for row in rows]
    scope: dict = {}
    exec((study_folder(study) / "evaluate.py").read_text(), scope)
    oracle = [scope["score"](target, target) for target in targets]
    constant = [scope["score"](targets[0], target) for target in targets]
    assert all(all(marks.values()) for marks in oracle)
    assert sum(marks["exact_match"] for marks in constant) == 1
    assert not any(scope["score"](target.lower(), target)["exact_match"] for target in targets)


@pytest.mark.parametrize("study", [name for name in STUDIES if (study_folder(name) / "demo.py").is_file()])
def test_a_demo_asked_for_help_does_not_run(study: str):
    demo = [sys.executable, str(study_folder(study) / "demo.py")]
    helped, odd = (
        subprocess.run([*demo, word], capture_output=True, text=True, check=False) for word in ("--help", "--odd")
    )
    assert (helped.returncode, odd.returncode) == (0, 2)
    assert helped.stdout.startswith("usage: ") and "unrecognized arguments: --odd" in odd.stderr


def test_the_demo_names_plans_that_exist_and_its_second_repeats_a_run_of_its_first():
    text = (study_folder("capitalization") / "demo.py").read_text()
    plans = yaml.safe_load((study_folder("capitalization") / "experiments.yaml").read_text())
    first, second = re.findall(r'experiment\("capitalization", "(\w+)"', text)
    recipe = {"recipe": "lora_finetune_single_device"}
    made = [{**plans[name], "experiments": [plans[name]["experiments"][0] | recipe]} for name in (first, second)]
    runs = [expand(parse_plan({**plan, "name": "p"}, "test"), manual) for plan in made]
    trained = [[run.config for run in some if run.kind == "finetune"] for some in runs]
    # What the demo says of it: the second plan is estimated from the first.
    assert [config for config in trained[1] if config in trained[0]]


def test_a_generator_runs_without_options_and_says_what_it_counts(workspace: Path):
    study = workspace / "tasks" / "mine"
    study.mkdir(parents=True)
    (study / "README.md").write_text("# Mine\n\nAsks.\n")
    (study / "data.py").write_text(
        "import json\nprint(json.dumps({'path': 'x', 'rows': {'train': 1200}, 'unit': 'tokens', 'sha256': 'ab'}))\n"
    )
    assert create_dataset("mine").summary == "x: train 1,200 tokens, sha256 ab."
