"""Planning: what is refused before a job runs, and what a plan adds up to."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from chiplog import totals
from chiplog.engines import local
from chiplog.errors import PlanError
from chiplog.estimate.gpus import gpu
from chiplog.estimate.history import TIME_SPREAD
from chiplog.ledger import Ledger
from chiplog.planning import Planned, make_plan, make_request
from chiplog.recipes import choose_recipe, load_recipe
from chiplog.record import Record, State, Usage
from chiplog.settings import load_settings
from tests.conftest import make_words

ROOT = Path(__file__).resolve().parents[2]
ASK: dict[str, Any] = {"question": "q", "name": "p", "models": {"S": "small"}, "dataset": "words"}
GPUS = "[[gpus]]\nname = 'a100-80gb'\ncount = 4\n[[gpus]]\nname = 'h200'\n"


def plan(**change: Any) -> Planned:
    return make_plan(make_request({**ASK, **change}), load_settings(), Ledger())


def done(lab: Path, run: str, kind: str, device: str, seconds: float, **usage: Any) -> Record:
    """A completed record of the run of `plan()` that has this name."""
    row = next(row for row in plan().rows if row.run.name == run)
    used = Usage(device=device, elapsed_s=seconds, steps=row.steps, eval_samples=10, **{"cpus": 1, "gpus": 0, **usage})
    return Record(
        key=f"local:{run}{device}{seconds}", experiment="before", run=run, kind=kind, recipe=row.run.recipe,
        model=row.run.config["model"], state=State.COMPLETED, config=row.run.config, usage=used,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("toml", "change", "words"),
    [
        ("", {"gpus": 1}, "this machine has 0: plan with gpus=0"),
        ("[slurm]\n", {"gpus": 1}, "names none: add its kind under [[gpus]]"),
        (GPUS, {"gpus": 1}, "say which with gpu, a100-80gb, h200"),
        (GPUS, {"gpus": 1, "gpu": "v100"}, "it has a100-80gb, h200"),
        (GPUS, {"gpus": 8, "gpu": "a100-80gb"}, "counts 4: ask for fewer"),
        (GPUS, {"gpus": 8, "gpu": "a100-80gb", "recipe": "lora_finetune_single_device"}, "uses 1 at most"),
        ("", {"recipe": "evaluate"}, "does not train"),
        ("", {"controls": {"batch_size": 21}}, "batch_size 21 is more than the 20 rows of train"),
        ("", {"controls": {"scorer": "recipes/nothere.py"}}, "no scorer 'recipes/nothere.py'"),
        ("", {"controls": {"scorer": "trainer/chat.py"}}, "there is none yet"),
        ("", {"controls": {"prompt": 5}}, "prompt is 5: give a text"),
        ("", {"variables": None, "runs": [{"lr": 1e-4}, {"lr": 1e-3, "prompt": "noplace"}]}, "{input}"),
        ("", {"controls": {"scorer": 3}}, "scorer is 3: give a text"),
        ("", {"controls": {"dtype": "fp8"}}, "dtype is 'fp8': choose from bf16, fp32"),
        ("", {"metrics": ["a|b"]}, "metrics.0"),
        ("", {"seeds": [2**40]}, "seed is 1099511627776"),
        ("", {"controls": {"epochs": 10**18}}, "epochs is 1000000000000000000"),
    ],
)  # fmt: skip
def test_what_would_not_run_is_refused(lab: Path, toml: str, change: dict[str, Any], words: str, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (lab / "chiplog.toml").write_text(toml)
    with pytest.raises(Exception, match=r".") as refused:
        plan(**change)
    assert type(refused.value).__module__ == "chiplog.errors" and words in str(refused.value)
    assert not (lab / "experiments").exists()


def test_a_model_that_the_recipe_cannot_load_is_refused(lab: Path):
    config = lab / "models" / "small" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"gpt2"'))
    with pytest.raises(PlanError, match="cannot load S, whose model_type is gpt2: it loads llama"):
        plan()


def test_rows_that_cannot_be_scored_are_refused(lab: Path):
    rows = [{"text": f"some words {i}"} for i in range(20)]
    (lab / "data" / "words.json").write_text(json.dumps({"train": rows[:15], "test": rows[15:]}))
    with pytest.raises(PlanError, match="text without a prompt"):
        plan()


def test_a_run_that_is_scored_on_its_own_training_rows_is_warned_of(lab: Path):
    (check,) = [check for check in plan(controls={"eval_split": "train"}).warnings if check.subject == "eval_split"]
    assert check.found.startswith("S would be scored on the rows that they train on")
    assert not any(check.subject == "eval_split" for check in plan().warnings)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("batch_size: 0", "batch_size is 0: give a whole number of at least 1"),
        ("batch_size: four", "batch_size is 'four'"),
        ("epochs: null", "epochs is null: give its default"),
        ("epochs: 1.5", "epochs is 1.5"),
        ("max_steps: -3", "max_steps is -3"),
        ("dtype: fp64", "dtype is 'fp64': choose from bf16, fp32"),
    ],
)
def test_a_recipe_whose_defaults_are_wrong_is_named(lab: Path, setting: str, words: str):
    folder = own_recipes(lab)
    file = folder / "lora_finetune_single_device.yaml"
    key = setting.partition(":")[0]
    file.write_text(re.sub(rf"^{key}: .*$", setting, file.read_text(), flags=re.MULTILINE))
    with pytest.raises(PlanError) as refused:
        plan()
    assert words in str(refused.value) and file.name in str(refused.value)


def bundled_recipes(lab: Path) -> Path:
    """The recipes of this repository as the workspace's."""
    (lab / "recipes").unlink()
    (lab / "recipes").symlink_to(ROOT / "recipes")
    return lab / "recipes"


def test_a_recipe_has_the_settings_of_the_one_that_it_is_like(lab: Path, tmp_path: Path):
    bundled_recipes(lab)
    base, val, several = (
        load_recipe(f"lora_finetune_{name}") for name in ("single_device", "single_device_val", "distributed")
    )
    assert val.settings == {**base.settings, "val_split": "validation", "run_val_every_n_steps": None}
    assert several.settings == {**val.settings, "val_split": None, "shard_model": True}
    assert several.about.takes["lr_schedule"] == ["cosine", "constant"]
    for suffix in (".yaml", ".py"):
        shutil.copy(val.file.with_suffix(suffix), tmp_path)
    with pytest.raises(PlanError, match=r"is like lora_finetune_single_device, which is not beside it: copy"):
        load_recipe("lora_finetune_single_device_val", tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpus": 3, "gpu": "a100-80gb"}, "shares batch_size 16 over 3 GPUs in passes of 1, which leaves a rest"),
        ({"gpus": 2, "gpu": "a100-80gb", "controls": {"micro_batch_size": 16}}, "make batch_size a multiple of 32"),
        ({"validation": True, "controls": {"val_split": "dev2"}}, "has no split 'dev2', .*: add one, or set val_split"),
    ],
)
def test_several_gpus_and_a_validation_need_what_they_share(lab: Path, change: dict[str, Any], words: str):
    bundled_recipes(lab)
    (lab / "chiplog.toml").write_text(GPUS)
    with pytest.raises(PlanError, match=words):
        plan(**{"gpus": 0, **change})


@pytest.mark.parametrize(
    ("processes", "validation", "name"),
    [
        (1, False, "lora_finetune_single_device"),
        (1, True, "lora_finetune_single_device_val"),
        (2, False, "lora_finetune_distributed"),
        (8, True, "lora_finetune_distributed"),
    ],
)
def test_the_recipe_is_chosen_by_processes_and_validation(processes: int, validation: bool, name: str):
    assert choose_recipe(processes, validation).name == name


def test_a_recipe_that_lacks_what_planning_reads_is_named(lab: Path):
    file = own_recipes(lab) / "lora_finetune_single_device.yaml"
    file.write_text(file.read_text().replace("batch_size: 4\n", "", 1))
    with pytest.raises(PlanError, match="lacks batch_size"):
        plan()


def own_recipes(lab: Path) -> Path:
    """The workspace's recipes as files of its own."""
    folder = lab / "recipes"
    sources = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    folder.unlink()
    folder.mkdir()
    for name, content in sources.items():
        (folder / name).write_bytes(content)
    return folder


def test_the_one_kind_of_gpu_need_not_be_named(lab: Path):
    (lab / "chiplog.toml").write_text("[slurm]\n[[gpus]]\nname = 'h200'\n")
    assert {row.run.resources.gpus for row in plan().rows} == {1}


def test_a_scorer_of_the_users_own_stands_among_the_recipes(lab: Path):
    (own_recipes(lab) / "mine.py").write_text("def score(output, target):\n    return {'exact_match': True}\n")
    assert plan(controls={"scorer": "recipes/mine.py"}).rows[0].run.config["scorer"] == "recipes/mine.py"


def test_runs_of_another_gpu_are_no_evidence(lab: Path):
    Ledger().put([done(lab, "S", "finetune", "NVIDIA A100-SXM4-80GB", 30.0, gpus=1)])
    Ledger().put([done(lab, "S", "finetune", "NVIDIA H200", 10.0, gpus=1)])
    (lab / "chiplog.toml").write_text(GPUS)
    for name, seconds in (("a100-80gb", 30.0), ("h200", 10.0)):
        estimate = plan(gpus=1, gpu=name).rows[0].estimate.elapsed
        assert estimate and estimate.value == pytest.approx(seconds) and estimate.n_evidence == 1


def test_of_a_gpu_that_no_file_names_the_evidence_is_this_machines(lab: Path, monkeypatch: pytest.MonkeyPatch):
    Ledger().put([done(lab, "S", "finetune", "NVIDIA A100-SXM4-80GB", 30.0, gpus=1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name, basis in (("NVIDIA H200", "physics"), ("NVIDIA A100-SXM4-80GB", "same-configuration"), ("Cerebras", "")):
        monkeypatch.setattr(local, "_nvidia_smi", lambda name=name: [name])
        estimate = plan(gpus=1).rows[0].estimate.elapsed
        assert (estimate.basis if estimate else "") == basis
        assert ("before/S" in estimate.evidence if estimate else False) == (basis == "same-configuration")


def test_on_a_cluster_a_run_gets_the_limit_that_2_percent_would_exceed_unless_the_plan_has_one(lab: Path):
    (lab / "chiplog.toml").write_text("[slurm]\n")
    Ledger().put([done(lab, "S", "finetune", "cpu", 600.0)])
    fine, base = plan().rows
    assert fine.estimate.elapsed and base.estimate.elapsed is None
    limit = fine.run.resources.time_limit_s
    # One run and four that the spread before it counts as: Student's t of 4 degrees, the spread of one more.
    spread = TIME_SPREAD * math.sqrt(1 + 1 / 1)
    assert limit and limit % 60 == 0 and 0 <= limit - 600 * math.exp(2.99853 * spread) < 60
    assert base.run.resources.time_limit_s is None
    assert {row.run.resources.time_limit_s for row in plan(time_limit_s=7200).rows} == {7200}


def test_totals_add_up_and_runs_share_the_cpus(lab: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(totals, "available_cpus", lambda: 2)
    Ledger().put([done(lab, "S", "finetune", "cpu", 100.0), done(lab, "S_base", "control", "cpu", 30.0)])
    three = plan(seeds=[0, 1, 2])  # seeds change no time: each is the same configuration
    assert [row.estimate.elapsed and round(row.estimate.elapsed.value) for row in three.rows] == [100, 100, 100, 30]
    assert three.totals.unknown == 0 and three.totals.controls == 1 and three.totals.gpu_hours == 0
    assert three.totals.in_sequence_s and three.totals.in_sequence_s.value == pytest.approx(330)
    assert three.totals.in_parallel_s == pytest.approx(200)  # 100 + 100 on one CPU, 100 + 30 on the other
    assert plan(seeds=[0, 1], control="none", cpus=2).totals.in_parallel_s is None  # no run with 2 CPUs is known


def test_a_plan_over_its_budget_is_refused_with_what_it_needs(lab: Path):
    (lab / "chiplog.toml").write_text("[slurm]\n[[gpus]]\nname = 'h200'\n[budget]\ngpu_hours = 1.5\n")
    for run, kind in (("S", "finetune"), ("S_base", "control")):
        Ledger().put([done(lab, run, kind, "NVIDIA H200", 3600.0, gpus=1)])
    with pytest.raises(PlanError, match=r"needs about 2\.0 GPU hours and the budget is 1\.5"):
        plan()
    assert plan(control="none").totals.gpu_hours == pytest.approx(1)


def test_more_rows_than_a_batch_take_a_step(lab: Path):
    make_words(lab / "data" / "words.json", n_train=21)
    assert plan(controls={"batch_size": 21}).rows[0].steps == 1


def on_gpu(lab: Path, toml: str, **change: Any) -> Planned:
    (lab / "chiplog.toml").write_text(f"[slurm]\n[[gpus]]\n{toml}\n")
    return plan(gpus=1, **change)


def test_a_gpu_that_its_name_leaves_open_is_known_by_its_card_or_by_the_runs_there(lab: Path):
    open_name = on_gpu(lab, "name = 'a100'")
    assert open_name.rows[0].estimate.capacity_bytes is None
    assert any(
        "'a100' may be any of" in check.found and "card = " in (check.mend or "") for check in open_name.warnings
    )
    said = on_gpu(lab, "name = 'a100'\ncard = 'a100-40gb'")
    assert said.rows[0].estimate.capacity_bytes == gpu("a100-40gb").memory_bytes and not said.warnings
    Ledger().put([done(lab, "S", "finetune", "NVIDIA A100 80GB PCIe", 30.0, gpus=1)])
    seen = on_gpu(lab, "name = 'a100'").rows[0].estimate
    assert seen.capacity_bytes == gpu("a100-80gb-pcie").memory_bytes and seen.basis == "same-configuration"
    exact = on_gpu(lab, "name = 'a100-80gb-sxm'").rows[0].estimate
    assert exact.capacity_bytes == gpu("a100-80gb-sxm").memory_bytes


def test_the_runs_of_this_model_speak_though_many_newer_ones_are_of_another(lab: Path):
    mine = done(lab, "S", "finetune", "NVIDIA H200", 30.0, gpus=1)
    others = [
        mine.model_copy(update={"key": f"local:x{n}", "model": "other", "started": f"2027-01-01T00:00:{n % 60:02}",
                                "config": {**mine.config, "model": "other"}})
        for n in range(300)
    ]  # fmt: skip
    Ledger().put([mine, *others])
    elapsed = on_gpu(lab, "name = 'h200'").rows[0].estimate.elapsed
    assert elapsed and elapsed.basis == "same-configuration" and elapsed.value == pytest.approx(30.0)


def test_a_control_on_a_gpu_has_a_time_and_a_peak_and_no_day_long_limit(lab: Path):
    control = on_gpu(lab, "name = 'h200'\nprice_per_hour = 4.0").rows[1]
    told = control.estimate
    assert control.run.kind == "control" and told.elapsed and told.peak_mem and told.time_limit_s
    assert told.time_limit_s < 1800 and told.cost == pytest.approx(4 * told.elapsed.value / 3600)


def test_a_plan_over_its_card_can_be_planned_all_the_same(lab: Path):
    (lab / "models" / "small" / "config.json").write_text(
        (lab / "models" / "small" / "config.json")
        .read_text()
        .replace('"num_hidden_layers": 1', '"num_hidden_layers": 20000')
    )
    make_words(lab / "data" / "words.json", n_train=4000)
    ask = {"controls": {"batch_size": 2048}}
    with pytest.raises(PlanError, match=r"set micro_batch_size to .*or set allow_oversize"):
        on_gpu(lab, "name = 't4'", **ask)
    oversize = on_gpu(lab, "name = 't4'", allow_oversize=True, **ask)
    assert any("runs out of GPU memory with a chance" in check.found for check in oversize.warnings)


def test_a_run_from_before_a_setting_was_added_counts_as_one_with_its_default(lab: Path):
    """Of ours; what another's log does not say is not known."""
    record = done(lab, "S", "finetune", "cpu", 30.0)
    older = record.model_copy(update={"config": {k: v for k, v in record.config.items() if k != "right_up_to"}})
    Ledger().put([older.model_copy(update={"experiment": None})])
    assert basis() != "same-configuration"
    Ledger().put([older])
    assert (basis(), basis(right_up_to=9)) == ("same-configuration", "same-configuration")
    assert basis(right_up_to=5) != "same-configuration"


def basis(**controls: Any) -> str | None:
    """What the time of the run of `plan()` rests on."""
    elapsed = plan(controls=controls).rows[0].estimate.elapsed
    return elapsed and elapsed.basis


def test_jobs_at_once_cap_what_runs_side_by_side(lab: Path):
    Ledger().put(
        [done(lab, run, kind, "NVIDIA H200", 100.0, gpus=1) for run, kind in (("S", "finetune"), ("S_base", "control"))]
    )
    ask = {"seeds": [0, 1, 2, 3], "control": "none"}
    assert on_gpu(lab, "name = 'h200'", **ask).totals.in_parallel_s is None
    assert on_gpu(lab, "name = 'h200'\ncount = 4", **ask).totals.in_parallel_s == pytest.approx(100)
    capped = on_gpu(lab, "name = 'h200'\ncount = 4\n[budget]\njobs_at_once = 2", **ask).totals
    assert (
        capped.in_parallel_s == pytest.approx(200) and capped.in_sequence_s and capped.gpu_hours == pytest.approx(1 / 9)
    )


def test_a_plan_over_its_price_is_refused_with_what_fits_it(lab: Path):
    Ledger().put(
        [
            done(lab, run, kind, "NVIDIA H200", 3600.0, gpus=1)
            for run, kind in (("S", "finetune"), ("S_base", "control"))
        ]
    )
    with pytest.raises(
        PlanError, match=r"needs about 6\.0 in cost and the budget is 4: within it are the 1 shortest of its 2"
    ):
        on_gpu(lab, "name = 'h200'\nprice_per_hour = 3.0\n[budget]\ncost = 4.0")


def test_runs_on_several_nodes_are_of_a_recipe_for_it_and_their_controls_are_alone(lab: Path):
    (lab / "chiplog.toml").write_text("[slurm]\n[[gpus]]\nname = 'a100-80gb'\ngres = 'gpu:a100:1'\ncount = 8\n")
    planned = plan(nodes=2, gpus=4, controls={"batch_size": 16, "micro_batch_size": 2})
    assert planned.plan.experiments[0].recipe == "lora_finetune_distributed"
    asked = {row.run.kind: row.run.resources for row in planned.rows}
    assert (asked["finetune"].processes, asked["finetune"].all_gpus) == (8, 8)
    assert (asked["control"].nodes, asked["control"].gpus) == (1, 1)
    assert plan(nodes=2, gpus=0, controls={"batch_size": 4}).plan.experiments[0].recipe == "lora_finetune_distributed"
    with pytest.raises(PlanError, match=r"shares batch_size 4 over 8 GPUs .* make batch_size a multiple of 8"):
        plan(nodes=2, gpus=4, controls={"batch_size": 4})
    with pytest.raises(PlanError, match="shares batch_size 3 over 2 nodes"):
        plan(nodes=2, gpus=0, controls={"batch_size": 3})
    with pytest.raises(PlanError, match=r"asks for 12 a100-80gb and chiplog.toml counts 8"):
        plan(nodes=3, gpus=4, controls={"batch_size": 12})
    with pytest.raises(PlanError, match="2 GPUs are asked for and the recipe lora_finetune_single_device uses 1"):
        plan(nodes=2, gpus=1, recipe="lora_finetune_single_device")


def test_several_nodes_need_a_cluster(lab: Path):
    with pytest.raises(PlanError, match="asks for 2 nodes and this machine is one: leave nodes out, or describe your"):
        plan(nodes=2, gpus=0)
