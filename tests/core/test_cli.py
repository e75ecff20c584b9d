"""The command line: the same tools, exit codes that mean something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from chiplog.cli import app
from chiplog.engines import Job

CHIPLOG = [sys.executable, "-m", "chiplog.cli"]


def chiplog(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*CHIPLOG, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def plan(name: str, *more: str) -> None:
    chiplog("plan-experiment", "--question", "Which rank?", "--models", "S=small", "--dataset", "words",
            "--name", name, "--variables", "lora_rank=[4, 16]", *more)  # fmt: skip


def test_the_command_line_gets_from_a_question_to_a_summary(lab: Path):
    plan("ranks")
    chiplog("setup-experiment-dirs", "ranks")
    asked = chiplog("submit-experiment", "ranks", code=2)
    assert "Submit 3 runs" in asked.stderr and "--confirm" in asked.stderr
    chiplog("submit-experiment", "ranks", "--confirm")
    chiplog("experiment-status", "ranks", "--wait-s", "60")
    answer = json.loads(chiplog("summarize-experiment", "ranks", "--json").stdout)
    assert [row["run"] for row in answer["rows"]] == ["rank4", "rank16", "S_base"]
    shown = chiplog("summarize-experiment", "ranks").stdout
    assert "Not shown:" in shown and "exact_match, % (95 % CI)" in shown


def test_a_run_can_be_named_as_the_control_of_the_others(lab: Path):
    plan("ranks", "--control", "{lora_rank: 4}")
    assert yaml.safe_load((lab / "experiments/ranks/plan.yaml").read_text())["experiments"][0]["control"] == {
        "lora_rank": 4
    }
    plan("other", "--control", "none")
    wrong = chiplog("plan-experiment", "--question", "q", "--models", "S=small", "--dataset", "words",
                    "--control", "everything", code=2)  # fmt: skip
    assert "control" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_check_that_fails_answers_with_exit_code_1(lab: Path):
    good = chiplog("check-dataset", "words", "--model", "small", "--json")
    assert json.loads(good.stdout)["report"]["splits"]["train"]["rows"] == 20
    words = json.loads((lab / "data" / "words.json").read_text())
    words["test"].append(words["train"][0])
    (lab / "data" / "leak.json").write_text(json.dumps(words))
    leak = chiplog("check-dataset", "leak", code=1)
    assert "failed" in leak.stdout
    with (lab / "models" / "small" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert "failed" in chiplog("check-model", "small", code=1).stdout
    for cause in (("--dataset", "leak", "--models", "S=large"), ("--dataset", "words", "--models", "S=small")):
        refused = chiplog("plan-experiment", "--question", "q", *cause, code=2)
        assert "cannot be used" in refused.stderr and not (lab / "experiments").exists()


def test_a_mistake_is_one_error_in_words_and_exit_code_2(lab: Path):
    for arguments in (
        ("experiment-status", "nothere"),
        ("check-model", "nothere"),
        ("check-dataset", "../../../etc/passwd"),
        ("plan-experiment", "--question", "q", "--models", "small"),
        ("plan-experiment", "--plan", "demo"),
        ("create-dataset", "nothere", "--options", "n=3"),
        ("plan-experiment", "--quesion", "q"),
        ("plan-experiment", "--question", "q", "--models", "S=5", "--variables", "lora_rank=4"),
        ("list-studies", "--limit", "3"),
        ("summarize-experiment", "x", "--limit", "0"),
    ):
        done = chiplog(*arguments, code=2)
        assert "rror" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_settings_file_is_named_with_its_key(lab: Path):
    (lab / "chiplog.toml").write_text("[slurm]\nacount = 'lab'\n")
    done = chiplog("list-studies", code=0)
    done = chiplog("check-model", "small", code=2)
    assert "chiplog.toml" in done.stderr and "slurm.acount: there is no such field" in done.stderr
    (lab / "chiplog.toml").write_text("[slurm\n")
    assert "is not TOML" in chiplog("init", code=2).stderr


def test_init_writes_the_settings_once_and_checks_them(workspace: Path):
    (workspace / "chiplog.toml").unlink()
    assert "was written" in chiplog("init").stdout
    text = (workspace / "chiplog.toml").read_text()
    again = chiplog("init").stdout
    assert "is sound" in again and "warning: models" in again
    assert (workspace / "chiplog.toml").read_text() == text


def test_two_plans_do_not_share_a_folder(lab: Path):
    plan("ranks")
    plan("ranks")
    refused = chiplog("plan-experiment", "--question", "Another?", "--models", "S=small", "--dataset", "words",
                      "--name", "ranks", code=2)  # fmt: skip
    assert "-question: Which rank?" in refused.stderr and "+question: Another?" in refused.stderr
    assert "Which rank?" in (lab / "experiments" / "ranks" / "plan.yaml").read_text()


def test_data_that_changed_after_planning_are_not_trained_on(lab: Path):
    plan("ranks")
    chiplog("setup-experiment-dirs", "ranks")
    file = lab / "data" / "words.json"
    file.write_text(file.read_text().replace("Wordaa", "WordAA"))
    assert "has changed since it was planned" in chiplog("submit-experiment", "ranks", "--confirm", code=2).stderr
    file.unlink()
    assert "cannot be read any more" in chiplog("submit-experiment", "ranks", "--confirm", code=2).stderr


def test_a_plan_that_was_not_set_up_is_not_submitted(lab: Path):
    plan("ranks")
    assert "not set up" in chiplog("submit-experiment", "ranks", "--confirm", code=2).stderr


def test_ctrl_c_ends_the_waiting_and_not_the_jobs(lab: Path):
    plan("ranks", "--controls", "seconds_a_step=0.5")
    chiplog("setup-experiment-dirs", "ranks")
    chiplog("submit-experiment", "ranks", "--confirm")
    # A child that says so when it first waits; it ends by itself after 60 s, and readline with it.
    code = (
        "import time; nap = time.sleep\n"
        "time.sleep = lambda seconds: (print('waits', flush=True), nap(seconds))\n"
        "from chiplog.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "experiment-status", "ranks", "--wait-s", "60"]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stdout and waiting.stdout.readline() == "waits\n"
    waiting.send_signal(signal.SIGINT)
    assert "interrupted" in waiting.communicate(timeout=60)[1] and waiting.returncode == 130
    assert "3 COMPLETED" in chiplog("experiment-status", "ranks", "--wait-s", "60").stdout


@pytest.mark.parametrize("option", ["--models", "--variables", "--controls"])
def test_a_key_that_is_given_twice_is_refused(lab: Path, option: str):
    twice = chiplog("plan-experiment", "--question", "q", "--dataset", "words", option, "S=a", option, "S=b", code=2)
    assert "S is given twice" in twice.stderr and not (lab / "experiments").exists()


@pytest.mark.parametrize("how", ["ctrl-c", "ctrl-d"])
def test_a_question_that_is_left_open_is_an_interruption(lab: Path, how: str):
    plan("ranks")
    ask = ("--question", "Another?", "--models", "S=small", "--dataset", "words", "--name", "ranks")
    terminal, end = os.openpty()
    command = [*CHIPLOG, "plan-experiment", *ask]
    asking = subprocess.Popen(command, stdin=end, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = b""
    while b"Go on?" not in said:
        more = os.read(asking.stderr.fileno(), 1000) if asking.stderr else b""
        assert more, said
        said += more
    if how == "ctrl-c":
        asking.send_signal(signal.SIGINT)
    else:
        os.write(terminal, b"\x04")
    words = asking.communicate(timeout=60)[1].decode()
    os.close(terminal)
    os.close(end)
    assert asking.returncode == 130 and words.split() == ["interrupted"]
    assert "Which rank?" in (lab / "experiments" / "ranks" / "plan.yaml").read_text()


def test_a_fault_of_ours_is_not_said_to_be_the_users_arguments(lab: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("chiplog.studies.list_studies", lambda: Job.model_validate({}))
    with pytest.raises(ValidationError, match="for Job"):
        CliRunner().invoke(app, ["list-studies"], catch_exceptions=False)


def test_the_experiment_goes_on_with_its_own_code_when_the_repo_changes(lab: Path):
    plan("ranks")
    chiplog("setup-experiment-dirs", "ranks")
    (lab / "recipes").unlink()
    (lab / "recipes").mkdir()
    chiplog("submit-experiment", "ranks", "--confirm")
    assert "3 COMPLETED" in chiplog("experiment-status", "ranks", "--wait-s", "60").stdout


def test_a_ledger_that_cannot_be_written_is_an_error_in_words(lab: Path, monkeypatch: pytest.MonkeyPatch):
    (lab / "file").write_text("")
    monkeypatch.setitem(os.environ, "CHIPLOG_HOME", str(lab / "file" / "below"))
    plan_words = ("plan-experiment", "--question", "q", "--models", "S=small", "--dataset", "words")
    assert "the ledger" in chiplog(*plan_words, code=2).stderr


def test_a_scaling_law_is_fitted_to_a_table_with_whether_it_can_be_told(tmp_path: Path):
    rows = [(n, ratio * n) for n in (1e6, 4e6, 1.6e7, 6.4e7) for ratio in (5, 20, 80)]
    lines = [f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28},{int(n > 0)}" for n, d in rows]
    (tmp_path / "t.csv").write_text("\n".join(["N,D,loss,used_in_fit", *lines, "1e5,1e5,9.9,0"]) + "\n")
    found = json.loads(chiplog("fit-scaling-law", str(tmp_path / "t.csv"), "--json", "--bootstrap", "40").stdout)
    expected = {"E": 1.7, "A": 400, "B": 410, "alpha": 0.34, "beta": 0.28}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["identifiable"] is True and found["ci"].keys() == expected.keys() and found["objective"] < 1e-12
    assert (found["n"], found["left_out"], found["next"]) == (12, {"used_in_fit is 0": 1}, [])
    assert found["summary"].startswith("L = E + A / N^alpha + B / D^beta, of 12 points of 12 runs (1 rows left out")

    every = chiplog(
        "fit-scaling-law", str(tmp_path / "t.csv"), "--json", "--bootstrap", "0", "--all", "--drop-largest=2"
    )
    assert (json.loads(every.stdout)["n"], json.loads(every.stdout)["ci"]) == (11, {})
    (tmp_path / "line.csv").write_text("\n".join(["N,D,loss", *(line[:-2] for line in lines[1::3] * 2)]) + "\n")
    line = json.loads(chiplog("fit-scaling-law", str(tmp_path / "line.csv"), "--json", "--bootstrap", "0").stdout)
    assert line["identifiable"] is False and "needs at least two token ratios" in line["why"] and line["next"]
    (tmp_path / "bad.csv").write_text("N,loss\n1,2\n")
    assert "D is missing" in chiplog("fit-scaling-law", str(tmp_path / "bad.csv"), code=2).stderr
