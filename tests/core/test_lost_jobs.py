"""Jobs that an engine has forgotten, that are another folder's, that cannot be noted: what is known of them stays."""

from __future__ import annotations

import errno
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import pytest

from chiplog import tools
from chiplog.collect import collect
from chiplog.engines import LocalEngine
from chiplog.errors import EngineError, RecordError, in_words
from chiplog.files import write_atomic
from chiplog.folder import Closing, ExperimentFolder
from chiplog.ledger import Ledger
from chiplog.record import State
from tests.core.ended_experiment import folder, write_lines

__all__ = ["folder"]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_queue_that_forgets_takes_nothing_from_what_is_done(folder: ExperimentFolder, recorded: bool):
    if recorded:
        collect(folder, Ledger())
    (folder.path / "runs" / "rank4" / "slurm-1.out").write_text("the last words\n")
    with LocalEngine().open() as queue:
        queue.execute("DELETE FROM queue")
    said = tools.experiment_status("e", log_of="rank4")
    assert [row.state for row in said.runs] == 2 * [State.COMPLETED] and said.log_tail == ["the last words"]
    assert tools.submit_experiment("e", confirm=True).jobs == {}
    (folder.path / "records.jsonl").unlink(missing_ok=True)
    (folder.path / "runs" / "rank4" / "eval" / "scores.json").unlink()
    assert [row.state for row in tools.experiment_status("e").runs] == [State.UNKNOWN, State.COMPLETED]


def test_a_copy_has_no_jobs_and_a_folder_that_was_moved_keeps_its_own(folder: ExperimentFolder):
    noted = [one.model_copy(update={"folder": str(folder.path)}) for one in folder.submissions()]
    write_lines(folder.path / "jobs.jsonl", [one.model_dump(mode="json") for one in noted])
    (folder.path / "runs" / "rank4" / "slurm-1.out").write_text("the last words\n")
    with LocalEngine().open() as queue:
        queue.execute("UPDATE queue SET log = ?", (str(folder.path / "runs" / "rank4" / "slurm-1.out"),))
    folder.close(Closing(engine="local", job_id="1", runs=["rank4"], folder=str(folder.path)))
    copy = folder.path.with_name("copy")
    shutil.copytree(folder.path, copy)
    assert ExperimentFolder(copy).submissions() == [] and ExperimentFolder(copy).closing() is None
    with pytest.raises(EngineError, match="nothing to cancel"):
        tools.cancel_experiment("copy", confirm=True)
    assert folder.closing() and len(folder.submissions()) == 2
    folder.close(None)
    shutil.rmtree(copy)
    folder.path.rename(copy)
    said = tools.experiment_status("copy", log_of="rank4")
    assert [row.state for row in said.runs] == 2 * [State.COMPLETED] and said.log_tail == ["the last words"]


@pytest.mark.parametrize("number", ["x_1", "_", "²_0", "9" * 23])
def test_a_job_id_that_is_none_is_named_with_its_line(folder: ExperimentFolder, number: str):
    file = folder.path / "jobs.jsonl"
    first, *lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), "job_id": number}), *lines]) + "\n")
    with pytest.raises(RecordError, match=r"jobs\.jsonl"):
        tools.experiment_status("e")


@pytest.mark.parametrize("file", [".lock", "jobs.jsonl"])
def test_what_fills_the_disk_can_be_cancelled(folder: ExperimentFolder, monkeypatch: pytest.MonkeyPatch, file: str):
    (folder.path / "runs" / "rank4" / "DONE").unlink()
    with LocalEngine().open() as queue:
        queue.execute("UPDATE queue SET state = 'PENDING', held = 1")

    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    if file == ".lock":
        (folder.path / ".lock").unlink(missing_ok=True)
        (folder.path / ".lock").mkdir()
        tools.cancel_experiment("e", confirm=True)
    else:
        monkeypatch.setattr(ExperimentFolder, "cancelled", full)
        with pytest.raises(EngineError, match=r"were cancelled, which could not be noted .*No space left"):
            tools.cancel_experiment("e", confirm=True)
    with LocalEngine().open() as queue:
        assert {row["state"] for row in queue.execute("SELECT state FROM queue")} == {"CANCELLED"}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refused(*_: object) -> NoReturn:
        raise OSError(number, "refused")

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(OSError) if number == errno.EIO else nullcontext(), ExperimentFolder(tmp_path).locked():
        assert number == errno.ENOSYS


def test_a_disk_that_fills_up_within_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomic(tmp_path / "notes.json", b"{}")
    assert in_words(error.value).startswith(f"{tmp_path / 'notes.json'}: No space left on device.")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_outside_of_the_experiment_are_not_pruned(folder: ExperimentFolder, tmp_path: Path):
    run = folder.path / "runs" / "rank4"
    (run / "checkpoints" / "step_4").mkdir(parents=True)
    run.rename(tmp_path / "outside")
    run.symlink_to(tmp_path / "outside")
    assert tools.prune_checkpoints("e", confirm=True).pruned == []
    assert (tmp_path / "outside" / "checkpoints" / "step_4").is_dir()
