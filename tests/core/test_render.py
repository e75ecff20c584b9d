"""The rendered folder: golden files, determinism, and that nothing is lost or half-written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chiplog import render as rendering
from chiplog import tools
from chiplog.bundle import bundle
from chiplog.errors import ConfirmationNeeded, RenderError
from chiplog.expand import expand
from chiplog.folder import ExperimentFolder
from chiplog.plan import Experiment, Plan, Resources
from chiplog.recipes import manual
from chiplog.render import render, write_experiment
from chiplog.settings import Settings
from tests.conftest import FAKE_RECIPES

GOLDEN = Path(__file__).parent / "golden"
CLUSTER = {
    "slurm": {
        "account": "lab",
        "partition": "cpu",
        "modules": ["cuda/12.8"],
        "setup": ["source .venv/bin/activate"],
        "environment": {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "it's $HOME"},
    },
    "gpus": [{"name": "a100-80gb", "partition": "gpu", "gres": "gpu:a100:1", "constraint": "gpu80", "count": 16}],
}


def rendered(
    workspace: Path, question: str = "Which rank?", study: str | None = None, nodes: int = 1, **cluster: Any
) -> dict[str, bytes]:
    gpus = (1 if nodes == 1 else 4) if cluster else 0
    plan = Plan(
        name="2026-11-20-lora-rank",
        question=question,
        hypothesis="A higher rank helps.",
        study=study,
        models={"1B": "/scratch/models/1B", "3B": "/scratch/models/3B"},
        datasets={"words": "/scratch/data/words.json"},
        experiments=[
            Experiment(
                recipe="lora_finetune_single_device",
                controls={"epochs": 3},
                variables={"model": ["1B", "3B"], "lora_rank": [4, 64]},
                resources=Resources(nodes=nodes, gpus=gpus, cpus=8, time_limit_s=5400),
            )
        ],
    )
    return render(plan, expand(plan, manual), Settings.model_validate({"workspace": workspace, **cluster}))


@pytest.mark.parametrize("name", ["README.md", "plan.yaml", "submit.sh", "runs/1B_rank4/run.sbatch",
                                  "runs/1B_rank4/eval.sbatch", "runs/1B_base/run.sbatch", "close.sbatch"])  # fmt: skip
@pytest.mark.parametrize("where", ["local", "cluster"])
def test_rendered_text_is_what_a_person_would_have_written(lab: Path, name: str, where: str):
    text = rendered(lab, **(CLUSTER if where == "cluster" else {}))[name].decode()
    is_golden(text, GOLDEN / where / name)


def is_golden(text: str, golden: Path) -> None:
    if os.environ.get("CHIPLOG_WRITE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.is_file(), f"{golden} is missing: look at the text, then run once with CHIPLOG_WRITE_GOLDEN=1"
    assert text == golden.read_text()


@pytest.mark.parametrize("name", ["runs/1B_rank4/run.sbatch", "runs/1B_rank4/eval.sbatch", "runs/1B_base/run.sbatch"])
def test_a_training_on_two_nodes_is_a_process_a_gpu_and_its_evaluation_one(lab: Path, name: str):
    text = rendered(lab, nodes=2, **CLUSTER)[name].decode()
    is_golden(text, GOLDEN / "nodes" / name)


def test_every_rendered_script_is_sound_shell(lab: Path):
    files = rendered(lab, **CLUSTER)
    scripts = [name for name in files if name.endswith((".sbatch", ".sh"))]
    assert len(scripts) == 4 * 2 + 2 + 3  # of trainings, of controls; submit.sh, close.sbatch, job.sh
    for name in scripts:
        subprocess.run(["bash", "-n"], input=files[name], check=True)


def test_a_workspace_whose_path_a_shell_would_read_is_only_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    workspace, outside = tmp_path / "ws $(touch PWN) 'x\"", tmp_path / "e $(touch PWN) `touch PWN`"
    workspace.mkdir()
    monkeypatch.setenv("CHIPLOG_WORKSPACE", str(workspace))
    cluster = {"setup": ['cat "there.txt"', "exit 0"]}  # what follows would train
    files = rendered(workspace, slurm=cluster, gpus=CLUSTER["gpus"], paths={"experiments": str(outside)})
    folder = outside / "2026-11-20-lora-rank"
    write_experiment(folder, files)
    (workspace / "there.txt").write_text("in the workspace")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/bash\nbash "${@: -1}" >> "$PWD/said"\necho "$RANDOM;lab"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for script in (*folder.glob("runs/*/*.sbatch"), folder / "submit.sh"):
        subprocess.run(["bash", "-n", script], check=True)
    for run in folder.glob("runs/*"):
        environment = {"PATH": path, "SLURM_SUBMIT_DIR": str(run)}
        for script in run.glob("*.sbatch"):
            done = subprocess.run(
                ["bash", script], env=environment, cwd=run, capture_output=True, text=True, check=True
            )
            assert done.stdout == "in the workspace"
    environment = {"PATH": path, "SLURM_SUBMIT_DIR": str(folder / "runs" / "1B_rank4")}
    subprocess.run(["bash", folder / "submit.sh"], env=environment, check=True)
    assert [file.read_text() for file in folder.glob("runs/*/said")].count("in the workspace") == 2  # controls
    assert [file.read_text() for file in folder.glob("runs/*/said")].count(2 * "in the workspace") == 4
    assert not list(tmp_path.rglob("PWN"))
    followed = ExperimentFolder(folder).submissions()
    assert len(followed) == 6 and [one.eval_job_id is None for one in followed] == 4 * [False] + 2 * [True]


def test_the_same_plan_is_the_same_bytes(lab: Path):
    assert rendered(lab) == rendered(lab)


def test_the_folder_carries_the_code_it_runs(lab: Path):
    files = rendered(lab)
    assert files["code/recipes/evaluate.py"] == (lab / "recipes" / "evaluate.py").read_bytes()
    assert b'"commit"' in files["code/REVISION"] and b"pydantic==" in files["code/environment.txt"]
    assert "code/trainer/chat.py" in files


def test_a_recipe_of_ones_own_is_not_replaced_by_the_bundled_one(lab: Path):
    (lab / "recipes").unlink()
    (lab / "recipes").mkdir()
    for file in (bundle() / "recipes").glob("lora_*"):
        (lab / "recipes" / file.name).write_text(file.read_text() + "# mine\n")
    files = rendered(lab)
    assert files["code/recipes/lora_finetune_single_device.py"].endswith(b"# mine\n")
    assert "code/recipes/lora_models.py" in files and "code/recipes/evaluate.py" in files


def test_a_control_has_no_training_step(lab: Path):
    files = rendered(lab)
    assert b"lora_finetune" not in files["runs/1B_base/run.sbatch"]
    assert "runs/1B_base/eval.sbatch" not in files


@pytest.mark.parametrize("text", ['a "quoted" `rm -rf` $(reboot)\nquestion | % ü', "<|x|> ' \\ \x07"])
def test_user_text_reaches_no_script(lab: Path, text: str):
    plain, odd = rendered(lab), rendered(lab, question=text)
    changed = {name for name in plain if plain[name] != odd[name]}
    assert changed == {"plan.yaml", "README.md"}


@pytest.mark.parametrize(
    "line",
    [
        "export HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz",
        "export WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567",
        f"export ANY=hf_{'aB' * 17}",
        f"export HF_TOKEN_PATH=hf_{'aB' * 17}",
        f"export ANY=sk-{'aB3' * 16}",
        f"export ANY=sk-{'0123456789abcdef' * 2}",
        f"export ANY=sk-proj-{'aB3_-' * 20}",
        f"export ANY=sk-ant-api03-{'aB3_-' * 18}",
        "export ANY=AKIAIOSFODNN7EXAMPLE",
        "export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    ],
)
def test_a_credential_is_never_rendered(lab: Path, line: str):
    with pytest.raises(RenderError, match="credential") as refused:
        rendered(lab, slurm={"setup": [line]}, gpus=CLUSTER["gpus"])
    assert line.split("=")[1] not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        "export HF_TOKEN_PATH=/home/someone/hf-token",
        "export HF_TOKEN_FILE=secrets/hf-token",
        "export TOKENIZERS_CACHE=/scratch/tokenizers",
        "export TOKENIZER=meta-llama/Llama-3.2-1B",
        "export MODEL=models/sk-learn-experiments-2024/small",
        "export HF_TOKEN=$(cat ~/.hf-token)",
    ],
)
def test_where_a_credential_lies_and_what_only_looks_like_one_is_rendered(lab: Path, line: str):
    files = rendered(lab, slurm={"setup": [line]}, gpus=CLUSTER["gpus"])
    assert line.encode() in files["runs/1B_rank4/run.sbatch"]


@pytest.mark.parametrize("field", ["question", "hypothesis"])
def test_a_credential_in_the_words_of_a_plan_is_not_written(lab: Path, field: str):
    ask: dict[str, Any] = {"question": "Which?", "name": "e", "models": {"S": "small"}, "dataset": "words"}
    with pytest.raises(RenderError, match=r"plan\.yaml, line \d+, holds what looks like a credential"):
        tools.plan_experiment(**{**ask, field: f"Does hf_{'aB' * 17} work?"})
    assert not (lab / "experiments").exists()


@pytest.mark.parametrize(
    "line",
    [
        f"login('hf_{'a1' * 17}')  # mine",
        'os.environ["WANDB_API_KEY"] = "0123456789abcdef"',
        "db_password: 'correct-horse-1'",
    ],
)
@pytest.mark.parametrize(
    "name", ["recipes/lora_finetune_single_device.py", "recipes/evaluate.yaml", "tasks/mine/evaluate.py"]
)
def test_a_credential_in_ones_own_code_is_named_by_file_and_line_and_not_copied(lab: Path, name: str, line: str):
    own_code(lab)
    before = (lab / name).read_text()
    (lab / name).write_text(f"{before}# {line}\n")
    with pytest.raises(RenderError, match="credential") as refused:
        rendered(lab, study="mine")
    assert f"{lab / name}, line {before.count(chr(10)) + 1}, holds" in str(refused.value)
    assert not any(value in str(refused.value) for value in ("a1a1", "0123", "horse"))


@pytest.mark.parametrize(
    "line",
    [
        "tokens = tokenizer.encode(text_of_the_row_1)",
        'PAD_TOKEN = "<|reserved_special_token_0|>"',
        "answer(max_new_tokens=max_new_tokens)",
        'TOKENIZER = "tokenizer.json"',
        'kinds = {"token": "word_or_part"}',
        "see task-difficulty-of-many-words-2 and risk-of-overfitting-small-sets",
    ],
)
def test_code_and_text_that_only_speak_of_tokens_are_no_credential(lab: Path, line: str):
    own_code(lab)
    with (lab / "recipes" / "lora_finetune_single_device.py").open("a") as file:
        file.write(f"# {line}\n")
    assert line.encode() in rendered(lab, study="mine")["code/recipes/lora_finetune_single_device.py"]
    assert rendered(lab, "Is task-difficulty-of-many-words-2 the cause?")


def own_code(lab: Path) -> None:
    """Recipes and a study of the user's own."""
    (lab / "recipes").unlink()
    shutil.copytree(FAKE_RECIPES, lab / "recipes")
    (lab / "tasks" / "mine").mkdir(parents=True)
    for name in ("README.md", "evaluate.py"):
        (lab / "tasks" / "mine" / name).write_text("# Mine\n")


@pytest.mark.parametrize("link", ["runs", "runs/a", "code", "plan.yaml", ".staging", ".staging.old"])
def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path, link: str):
    folder, outside = tmp_path / "e", tmp_path / "outside"
    (folder / link).parent.mkdir(parents=True)
    outside.mkdir()
    (folder / link).symlink_to(outside)
    before = set(folder.rglob("*"))
    files = {"plan.yaml": b"1", "code/recipes/a.py": b"2", "runs/a/config.yaml": b"3"}
    for confirm in (False, True):
        with pytest.raises(RenderError, match=r"is led to .*outside.* by a link"):
            write_experiment(folder, files, confirm=confirm)
    assert set(folder.rglob("*")) == before and not list(outside.iterdir())


def test_a_link_to_itself_is_an_error_in_words(tmp_path: Path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "runs").symlink_to("runs")
    with pytest.raises(RenderError, match="cannot be written"):
        write_experiment(tmp_path / "e", {"plan.yaml": b"1", "runs/a/config.yaml": b"3"})
    assert [file.name for file in (tmp_path / "e").iterdir()] == ["runs"]


def test_nothing_is_overwritten_without_a_diff_and_a_yes(tmp_path: Path):
    folder = tmp_path / "e"
    assert write_experiment(folder, {"a/b": b"one\n", "c": b"two\n"}) == ["a/b", "c"]
    assert write_experiment(folder, {"a/b": b"one\n", "c": b"two\n"}) == []
    (folder / "a" / "result").write_text("kept")
    with pytest.raises(ConfirmationNeeded) as asked:
        write_experiment(folder, {"a/b": b"changed\n", "c": b"two\n"})
    assert "-one" in str(asked.value) and "+changed" in str(asked.value)
    assert (folder / "a" / "b").read_text() == "one\n"
    assert write_experiment(folder, {"a/b": b"changed\n", "c": b"two\n"}, confirm=True) == ["a/b"]
    assert (folder / "a" / "b").read_text() == "changed\n" and (folder / "a" / "result").read_text() == "kept"


def test_ctrl_c_in_the_clearing_up_leaves_no_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rmtree, calls = shutil.rmtree, []

    def interrupted(path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            for file in path.rglob("*"):
                file.unlink()
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(rendering.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_experiment(tmp_path / "e", {"a": b"1", "b": b"2"})
    assert sorted(file.name for file in (tmp_path / "e").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupted_set_up_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
):
    folder = tmp_path / "e"
    write_experiment(folder, {"plan.yaml": b"old\n", "kept": b"kept\n"})
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    count, replace = 0, Path.replace

    def failing(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == at:
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(RenderError if isinstance(error, OSError) else KeyboardInterrupt):
        write_experiment(folder, {"plan.yaml": b"new\n", "runs/a": b"a", "runs/b": b"b"}, confirm=True)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not list(folder.glob("runs*")) and not list(folder.glob(".staging*"))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rendering.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(RenderError, match="needs 20 bytes and its disk has 1 free"):
        write_experiment(tmp_path / "e", {"a": b"0123456789"})
    assert not (tmp_path / "e").exists()


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path):
    (tmp_path / "e").write_text("a file where the folder should be")
    with pytest.raises(RenderError, match="cannot be written"):
        write_experiment(tmp_path / "e", {"a": b"1"})
