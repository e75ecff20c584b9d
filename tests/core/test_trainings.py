"""Trainings that make a model of their own: planned, refused, rendered, run by a recipe that pretends, summarised."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from scipy import stats

from chiplog import tools
from chiplog.deviation import after_running_out
from chiplog.errors import PlanError
from chiplog.expand import expand
from chiplog.folder import ExperimentFolder
from chiplog.losses import compare_losses
from chiplog.plan import Experiment, Plan, Resources
from chiplog.recipes import load_recipe, manual
from chiplog.record import Record, State
from chiplog.render import render
from chiplog.settings import Settings
from chiplog.trainer_files import load_trainer_file
from tests.conftest import ROOT
from tests.core.test_flow import answer, calls
from tests.core.test_render import CLUSTER, GOLDEN, is_golden
from tests.trainer.helpers import write_tokens

ASK: dict[str, Any] = {"question": "Which lr?", "name": "lrs", "recipe": "train", "dataset": "text"}
SWEEP: dict[str, Any] = {**ASK, "variables": {"lr": [0.01, 0.0316, 10.0]}, "seeds": [0, 1, 2]}


@pytest.fixture
def corpus(lab: Path) -> Path:
    """The token files `text` of a workspace whose recipe `train` only pretends: 5,400 tokens, 600 to validate on."""
    return write_tokens(lab / "data" / "text")


def planned(**more: Any) -> Any:
    return tools.plan_experiment(**{**ASK, **more})


def run_all(name: str = "lrs") -> None:
    """Sets an experiment up, submits it to the local engine and waits."""
    tools.setup_experiment_dirs(name)
    tools.submit_experiment(name, confirm=True)
    assert tools.experiment_status(name, wait_s=100).ok


def test_a_sweep_gets_from_a_question_to_a_summary(corpus: Path, lab: Path):
    async def steps(client: Client) -> None:
        plan = await answer(client, "plan_experiment", **SWEEP)
        assert [row["run"] for row in plan["rows"]][:4] == [
            "lr0.01_seed0",
            "lr0.01_seed1",
            "lr0.01_seed2",
            "lr0.0316_seed0",
        ]
        assert {row["kind"] for row in plan["rows"]} == {"train"} and plan["totals"]["controls"] == 0
        await answer(client, "setup_experiment_dirs", experiment="lrs")
        submitted = await answer(client, "submit_experiment", experiment="lrs", confirm=True)
        assert len(submitted["jobs"]) == 9
        status = await answer(client, "experiment_status", experiment="lrs", wait_s=100)
        assert {run["state"] for run in status["runs"]} == {"COMPLETED"}
        summary = await answer(client, "summarize_experiment", experiment="lrs")
        (compared,) = summary["comparisons"]
        assert (compared["first"], compared["second"], compared["shown"]) == ("lr0.01", "lr0.0316", True)
        assert compared["difference"]["seeds"] == 3 and compared["difference"]["interval"]["high"] < 0
        assert "lr0.01 against lr0.0316: val_loss -0.249" in compared["words"]
        lost = [f"lr10_seed{seed}: nothing, since it diverged: the loss is nan at step 1" for seed in range(3)]
        assert summary["not_shown"] == lost
        again = await answer(client, "submit_experiment", experiment="lrs", confirm=True)
        assert again["jobs"] == {}  # also what diverged is done

    calls(steps)
    folder = lab / "experiments" / "lrs"
    assert (folder / "figures" / "losses.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "summary.md").read_text()
    assert "Welch" in text and "McNemar" not in text and "diverged" in text
    assert not list(folder.glob("runs/*/eval*")) and "metrics: [val_loss]" in (folder / "plan.yaml").read_text()


def test_the_table_of_a_plan_shows_parameters_tokens_and_flops_of_the_shape(corpus: Path):
    plan = planned(variables={"width": [16, 32]}, controls={"max_steps": 30})
    shape = load_trainer_file("shape")
    for row, width in zip(plan.rows, (16, 32), strict=True):
        config = load_recipe("train").settings | {"width": width}
        made = shape.make_shape(type("Settings", (), config), 64)
        assert row.n_params == made.n_params and row.tokens == 30 * 4 * 16
        assert row.flops == pytest.approx(made.train_flops(16) * row.tokens)
        assert f"| {row.n_params:,} | 1,920 |" in plan.summary
    assert "| # | run | params | tokens | FLOPs |" in plan.summary and "| model |" not in plan.summary


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({"widht": 32}, "did you mean 'width'"),
        ({"width": 30, "heads": 4}, "width 30 cannot be divided by 4 heads"),
        ({"width": 36, "heads": 12}, "a head of 3 is odd"),
        ({"seq_len": 5400}, "the 5,400 tokens of train are too few for seq_len 5,400"),
        ({"architecture": "lstm", "batch_size": 400}, "too few for seq_len 16 and batch_size 400"),
        ({"val_tokens": 600}, "val_tokens is 600 and the validation split has 599 targets"),
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size 3 does not divide batch_size 8"),
        ({"zero_readout": True}, "which is the readout too: set tied to false"),
        ({"parametrization": "completep", "optimizer": "sgd"}, "completep is known for Transformers under Adam only"),
        ({"optimizer": "sgd", "nesterov": True, "momentum": 0}, "nesterov needs a momentum above 0"),
        ({"dropout": 1.0}, "dropout is 1.0: give a number of at least 0 and below 1"),
        ({"base_heads": 3, "base_width": 16}, "base_heads 3 does not divide base_width 16"),
        ({"model": "small"}, "there is no setting 'model'"),
        ({"eval_split": "test"}, "there is no setting 'eval_split'"),
    ],
    ids=str,
)
def test_what_could_never_train_is_refused_before_it_is_queued(corpus: Path, controls: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        planned(controls=controls)


def test_what_conflicts_are_read_from_are_settings_of_the_trainer():
    assert load_recipe("train", ROOT / "trainer").settings.keys() >= load_trainer_file("conflicts").READS


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"control": "base_model"}, "no base model that could be its control"),
        ({"metrics": ["exact_match"]}, "measured by its val_loss"),
        ({"models": {"S": "small"}}, "makes its own model: leave models out"),
        ({"dataset": "words"}, "is no folder of token files"),
        ({"recipe": None, "models": {"S": "small"}}, "holds token files, which nothing is fine-tuned on"),
        ({"recipe": None}, "the plan lacks models"),
    ],
    ids=str,
)
def test_a_plan_that_mixes_both_kinds_is_refused_with_words(corpus: Path, more: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        planned(**more)


def test_experiments_of_both_kinds_are_two_plans(lab: Path):
    tuned, made = Experiment(recipe="lora_finetune_single_device"), Experiment(framework="trainer", recipe="train")
    with pytest.raises(ValueError, match="make a plan of each kind"):
        Plan(name="p", question="q", models={"S": "s"}, datasets={"d": "d"}, experiments=[tuned, made])


def test_the_recipe_and_the_framework_of_an_experiment_must_match():
    wrong = Plan(
        name="p", question="q", models={"S": "s"}, datasets={"d": "d"}, experiments=[Experiment(recipe="train")]
    )
    with pytest.raises(PlanError, match="write framework: trainer"):
        expand(wrong, manual)


def test_the_bundled_trainer_is_the_recipe_train_and_knows_no_evaluation(workspace: Path):
    recipe = load_recipe("train")
    assert recipe.place == "trainer" and recipe.about.framework == "trainer" and recipe.file.is_file()
    assert not {"eval_split", "scorer", "prompt", "model"} & manual("train").defaults.keys()


def test_more_passes_over_the_corpus_than_meant_are_warned_of(corpus: Path):
    assert planned(controls={"max_steps": 84}).warnings == []  # 336 of 337 windows
    plan = planned(variables={"max_steps": [20, 170]}, confirm=True)
    (words,) = plan.warnings
    assert "1 of 2 runs" in words and "max_steps170 2.02 times" in words


def test_a_batch_that_processes_cannot_share_is_refused(corpus: Path, lab: Path):
    (lab / "chiplog.toml").write_text("[slurm]\n")
    with pytest.raises(PlanError, match="leaves a rest"):
        planned(nodes=3)


def test_a_token_folder_is_checked_whole(corpus: Path):
    found = tools.check_dataset("text")
    assert (
        found.ok
        and found.summary
        == "text is usable for trainings: train 5,400 tokens, validation 600 tokens, of a vocabulary of 64."
    )
    meta = json.loads((corpus / "meta.json").read_text())
    for change, words in [
        ({"vocab_size": 60}, "is beyond the vocabulary of 60 entries"),
        ({"tokens": {**meta["tokens"], "train": 5401}}, "meta.json says 5,401 tokens of 2 bytes"),
        ({"tokens": {"train": 5400}}, "no tokens of validation"),
        ({"sha256": {**meta["sha256"], "train": "0"}}, "not those whose hash meta.json has"),
        ({"dtype": "<f4"}, "no folder of token files: dtype"),
    ]:
        (corpus / "meta.json").write_text(json.dumps(meta | change))
        found = tools.check_dataset("text")
        assert not found.ok and words in found.summary, found.summary


def test_token_files_that_change_after_the_plan_stop_its_submission(corpus: Path):
    planned()
    tools.setup_experiment_dirs("lrs")
    data = (corpus / "train.bin").read_bytes()
    (corpus / "train.bin").write_bytes(data[2:] + data[:2])
    with pytest.raises(PlanError, match="has changed since it was planned"):
        tools.submit_experiment("lrs", confirm=True)
    (corpus / "train.bin").write_bytes(data)
    assert list(tools.submit_experiment("lrs", confirm=True).jobs) == ["text"]
    assert tools.experiment_status("lrs", wait_s=60).ok


def test_arms_with_one_seed_are_not_compared_and_many_arms_not_in_pairs(corpus: Path):
    planned(variables={"lr": [0.01, 0.02]})
    run_all()
    summary = tools.summarize_experiment("lrs")
    assert [c.difference for c in summary.comparisons] == [None]
    assert "lr0.01 against lr0.02: not shown, since each was trained once" in summary.not_shown
    planned(name="many", variables={"lr": [0.01 + i / 1000 for i in range(13)]})
    run_all("many")
    many = tools.summarize_experiment("many")
    assert many.comparisons == [] and len(many.rows) == 13
    assert "Which of the 13 arms differ: more than 12 are not compared in pairs." in many.not_shown


def test_an_arm_that_failed_is_named_and_only_it_runs_again(corpus: Path):
    planned(runs=[{"lr": 0.01}, {"lr": 0.02, "fail_at_step": 3}])
    tools.setup_experiment_dirs("lrs")
    tools.submit_experiment("lrs", confirm=True)
    assert not tools.experiment_status("lrs", wait_s=60).ok
    summary = tools.summarize_experiment("lrs")
    name = "lr0.02_fail_at_step3"
    assert not summary.ok and any(
        words.startswith(f"{name}: nothing, since it is FAILED") for words in summary.not_shown
    )
    assert [row.val_loss is None for row in summary.rows] == [False, True]
    assert list(tools.submit_experiment("lrs", confirm=True).jobs) == [name]
    tools.experiment_status("lrs", wait_s=60)


def test_an_arm_of_which_a_seed_diverged_is_not_compared_by_the_others():
    (pair,) = compare_losses("val_loss", [("a", "b")], {"a": [2.0, 2.1], "b": [3.0, 3.1]}, diverged={"b"})
    assert not pair.shown and pair.words == "a against b: not shown, since a seed of b diverged"


def test_losses_of_seeds_are_compared_by_welchs_t_and_adjusted_for_their_number():
    arms = {"a": [2.0, 2.1, 2.05], "b": [2.3, 2.2, 2.35], "c": [2.0, 2.2]}
    pairs = compare_losses("val_loss", [("a", "b"), ("a", "c"), ("b", "c")], arms, diverged=())
    tests = [
        stats.ttest_ind(arms[one], arms[other], equal_var=False)
        for one, other in ((pair.first, pair.second) for pair in pairs)
    ]
    for pair, test in zip(pairs, tests, strict=True):
        assert pair.difference and pair.difference.p == pytest.approx(test[1])
        ends = test.confidence_interval()
        assert (pair.difference.interval.low, pair.difference.interval.high) == pytest.approx((ends.low, ends.high))
    assert pairs[0].p_adjusted == pytest.approx(3 * pairs[0].difference.p)  # pyright: ignore
    assert [pair.shown for pair in pairs] == [True, False, False]


def test_seeds_that_give_the_same_loss_show_nothing():
    (pair,) = compare_losses("val_loss", [("a", "b")], {"a": [2.0, 2.0], "b": [3.0, 3.0]}, diverged=())
    assert pair.difference is None and "all seeds of each have the same loss" in pair.words


def test_time_is_told_by_the_same_settings_then_the_same_steps_then_flops_and_else_not_at_all(corpus: Path):
    assert planned().rows[0].estimate.elapsed is None
    run_all()
    told = {}
    for name, controls in {
        "other lr and init": {"lr": 0.05, "warmup_steps": 3},
        "longer": {"max_steps": 40},
        "wider": {"width": 32},
        "far wider": {"width": 512},
        "lstm": {"architecture": "lstm"},
    }.items():
        told[name] = planned(name="next", controls=controls, confirm=True).rows[0].estimate.elapsed
    assert told["other lr and init"].basis == "same-configuration"
    assert told["longer"].basis == told["wider"].basis == "scaled"
    assert told["far wider"] is None and told["lstm"] is None
    assert all(each.evidence == ["lrs/text"] for each in told.values() if each)


def test_a_training_killed_for_its_memory_goes_on_with_less_than_it_had_chosen(corpus: Path, lab: Path):
    planned(controls={"batch_size": 32})
    run_all()
    (run,) = ExperimentFolder(lab / "experiments" / "lrs").runs()
    home = lab / "experiments" / "lrs" / "runs" / "text"
    (home / "DONE").unlink()
    begun = {
        "event": "start",
        "started": "2026-01-01T00:00:01Z",
        "device": "cpu",
        "setup_s": 1.0,
        "micro_batch_size": 8,
    }
    (home / "metrics.jsonl").write_text(json.dumps(begun) + "\n")
    killed = Record(key="local:1", state=State.OUT_OF_MEMORY, started="2026-01-01T00:00:00Z")
    deviation = after_running_out(run, home, killed)
    assert deviation and (deviation.micro_batch_size, deviation.asked) == (4, 8)


def rendered(workspace: Path, nodes: int = 1, **cluster: Any) -> dict[str, bytes]:
    plan = Plan(
        name="2026-11-20-lr",
        question="Which lr?",
        datasets={"text": "/scratch/data/text"},
        experiments=[
            Experiment(
                framework="trainer",
                recipe="train",
                controls={"max_steps": 2000},
                variables={"width": [64, 128], "lr": [0.001, 0.00316]},
                resources=Resources(nodes=nodes, gpus=1 if cluster else 0, cpus=8, time_limit_s=5400),
            )
        ],
    )
    return render(plan, expand(plan, manual), Settings.model_validate({"workspace": workspace, **cluster}))


@pytest.mark.parametrize("name", ["README.md", "plan.yaml", "submit.sh", "runs/width64_lr0.001/run.sbatch",
                                  "runs/width64_lr0.001/config.yaml"])  # fmt: skip
def test_a_rendered_training_is_what_a_person_would_have_written(workspace: Path, name: str):
    is_golden(rendered(workspace, **CLUSTER)[name].decode(), GOLDEN / "training" / name)


def test_a_training_carries_the_trainer_alone_and_has_no_evaluation(workspace: Path):
    files = rendered(workspace)
    assert {"code/trainer/train.py", "code/trainer/train.yaml", "code/trainer/shape.py", "code/job.sh"} <= files.keys()
    assert not [name for name in files if name.startswith("code/recipes") or name.endswith("eval.sbatch")]
    for name in ("submit.sh", "runs/width64_lr0.001/run.sbatch"):
        subprocess.run(["bash", "-n"], input=files[name], check=True)


def test_several_nodes_train_together(workspace: Path):
    script = rendered(workspace, nodes=2, **CLUSTER)["runs/width64_lr0.001/run.sbatch"].decode()
    assert "work_together python ../../code/trainer/train.py --config config.yaml" in script
