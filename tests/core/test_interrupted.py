"""Commands that are stopped midway, or meet another: the folder is as it was or complete, and no job runs unknown."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from chiplog import tools
from chiplog.engines import LocalEngine
from chiplog.errors import ChiplogError, EngineError, RenderError
from chiplog.folder import ExperimentFolder
from chiplog.record import State
from tests.killed import killed_at

# A child that is sent a signal while it moves its first, or its last, file into the folder.
SIGNALLED = """
import os, pathlib, signal, sys
replace, moves = pathlib.Path.replace, []
def signalled(self, target):
    if ".staging" in self.parts and ".staging" not in pathlib.Path(target).parts:
        moves.append(target)
        if len(moves) == {at}:
            os.kill(os.getpid(), signal.{name})
            if {twice}:
                os.kill(os.getpid(), signal.SIGTERM)
    return replace(self, target)
pathlib.Path.replace = signalled
"""
CLI = "from chiplog.cli import main; main()"
# The server's tools run beside its main thread, which waits for the client.
SERVER = """
import threading, types
from chiplog import server, tools
def run(_):
    thread = threading.Thread(target=tools.setup_experiment_dirs, args=("e",))
    thread.start()
    thread.join()
server.build_server = lambda: types.SimpleNamespace(run=run)
server.serve()
"""
ASK: dict[str, Any] = {"question": "Which?", "name": "e", "models": {"S": "small"}, "dataset": "words"}
WORDS = ("plan-experiment", "--question", "Which?", "--name", "e", "--models", "S=small", "--dataset", "words")


@pytest.fixture
def folder(lab: Path) -> ExperimentFolder:
    """An experiment that can be submitted."""
    tools.plan_experiment(**ASK, variables={"lora_rank": [4]})
    tools.setup_experiment_dirs("e")
    return ExperimentFolder(lab / "experiments" / "e")


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {file: file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


def queued() -> set[str]:
    with LocalEngine().open() as queue:
        return {row["state"] for row in queue.execute("SELECT state FROM queue")}


def fail(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["_start_worker", "release", "add"])
def test_a_submission_that_is_interrupted_leaves_no_job_and_no_prediction(
    folder: ExperimentFolder, monkeypatch: pytest.MonkeyPatch, where: str
):
    (folder.path / "runs" / "rank4" / "estimate.json").write_text("of an earlier attempt")
    before = contents(folder.path)
    monkeypatch.setattr(LocalEngine, "_start_worker", lambda self: None)
    monkeypatch.setattr(ExperimentFolder if where == "add" else LocalEngine, where, fail)
    with pytest.raises(KeyboardInterrupt):
        tools.submit_experiment("e", confirm=True)
    assert queued() == {State.CANCELLED} and contents(folder.path) == before


def test_a_submission_that_is_killed_before_its_jobs_are_released_goes_on_at_the_next(folder: ExperimentFolder):
    with killed_at("release", LocalEngine, LocalEngine):
        tools.submit_experiment("e", confirm=True)
    assert folder.submissions() and queued() == {State.PENDING}
    said = tools.experiment_status("e").runs[0].reason
    assert said and said.startswith("held: ") and said.endswith("then submit the experiment again")
    again = tools.submit_experiment("e", confirm=True)
    assert again.jobs == {} and again.summary.startswith("3 jobs that an interrupted submission had left held may run")
    assert all(row.state is State.COMPLETED for row in tools.experiment_status("e", wait_s=60).runs)


def test_ctrl_c_while_the_command_still_loads_is_an_interruption():
    code = (
        "import sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': print('loads', flush=True); import time; time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from chiplog.__main__ import main; main()"
    )
    loading = subprocess.Popen(
        [sys.executable, "-c", code, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert loading.stdout and loading.stdout.readline() == "loads\n"
    loading.send_signal(signal.SIGINT)
    assert loading.communicate(timeout=60)[1] == "interrupted\n" and loading.returncode == 130


def test_ctrl_c_ends_every_command_with_the_same_code(tmp_path: Path):
    os.mkfifo(tmp_path / "endless.log")
    reading = subprocess.Popen(
        [sys.executable, "-c", CLI, "parse-log", str(tmp_path / "endless.log")], stderr=subprocess.PIPE, text=True
    )
    written = os.open(tmp_path / "endless.log", os.O_WRONLY)  # waits until it is read
    reading.send_signal(signal.SIGINT)
    assert reading.communicate(timeout=60)[1] == "interrupted\n" and reading.returncode == 130
    os.close(written)


def test_an_engine_that_refuses_leaves_no_prediction(lab: Path):
    tools.plan_experiment(**ASK, cpus=99999)
    tools.setup_experiment_dirs("e")
    with pytest.raises(EngineError, match="asks for 99999 CPUs"):
        tools.submit_experiment("e", confirm=True)
    assert not list(lab.rglob("estimate.json"))


def test_a_prediction_is_not_written_through_a_link(folder: ExperimentFolder, tmp_path: Path):
    (folder.path / "runs").rename(tmp_path / "outside")
    (folder.path / "runs").symlink_to(tmp_path / "outside")
    before = contents(tmp_path / "outside")
    with pytest.raises(RenderError, match="by a link"):
        tools.submit_experiment("e", confirm=True)
    assert contents(tmp_path / "outside") == before and queued() == set()


def test_no_two_commands_write_into_the_same_folder(lab: Path, monkeypatch: pytest.MonkeyPatch):
    write, held = tools.write_experiment, []

    def writing(folder: Path, *arguments: Any, **options: Any) -> list[str]:
        with (folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(folder.name)
        return write(folder, *arguments, **options)

    monkeypatch.setattr(tools, "write_experiment", writing)
    tools.plan_experiment(**ASK)
    tools.plan_experiment(**ASK)
    tools.setup_experiment_dirs("e")
    assert held == ["e", "e", "e"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_first_plan_that_is_interrupted_leaves_no_folder(
    lab: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def broken(*_: object) -> NoReturn:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken)
        with pytest.raises((KeyboardInterrupt, ChiplogError)):
            tools.plan_experiment(**ASK)
    assert not (lab / "experiments" / "e").exists()
    tools.plan_experiment(**ASK)


def child(code: str, *arguments: str, at: int = 1, name: str = "SIGTERM", twice: bool = False) -> int:
    """The exit code of a child that is sent that signal."""
    code = SIGNALLED.format(at=at, name=name, twice=twice) + code
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("twice", [False, True])
def test_a_set_up_that_is_ended_leaves_the_folder_as_it_was(lab: Path, name: str, twice: bool):
    tools.plan_experiment(**ASK)
    before = contents(lab / "experiments")
    assert child(CLI, "setup-experiment-dirs", "e", at=3, name=name, twice=twice) == 128 + signal.Signals[name]
    assert contents(lab / "experiments") == before


def test_a_plan_that_is_ended_leaves_no_folder(lab: Path):
    assert child(CLI, *WORDS) == 143
    assert not (lab / "experiments" / "e").exists()


def test_a_server_that_is_ended_completes_what_it_writes(lab: Path):
    tools.plan_experiment(**ASK)
    assert child(SERVER, at=3) == 143
    there = contents(lab / "experiments")
    assert not [file for file in there if ".staging" in file.name]
    assert tools.setup_experiment_dirs("e").n_written == 0 and contents(lab / "experiments") == there


def test_a_command_that_ignores_a_closed_terminal_goes_on(lab: Path):
    tools.plan_experiment(**ASK)
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert child(ignored + CLI, "setup-experiment-dirs", "e", "--json", name="SIGHUP") == 0
    assert json.loads((lab / "experiments" / "e" / "code" / "REVISION").read_text())
