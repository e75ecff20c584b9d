"""Folders as crashes, full disks and people leave them: what is broken is named, and nothing that was known is lost."""

from __future__ import annotations

import errno
import itertools
import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from chiplog import running, submitting, tools
from chiplog.engines import Batch, LocalEngine, engine_for
from chiplog.errors import ChiplogError, EngineError, NotFoundError, RecordError, RenderError
from chiplog.folder import ExperimentFolder, Submission, find_experiment
from chiplog.ledger import Ledger
from chiplog.ledger.metrics import read_events, read_scores, train_usage
from chiplog.record import Record, Score, State, Usage, read_records, write_records
from chiplog.settings import load_settings
from tests.core.ended_experiment import SCORES, START, STEP, collected, end_job, folder, states, write_lines

__all__ = ["folder"]

BOTH = {"rank4": State.COMPLETED, "S_base": State.COMPLETED}


def test_the_folder_of_these_tests_is_whole(folder: ExperimentFolder):
    records = collected(folder)
    assert states(folder) == {run: record.state for run, record in records.items()} == BOTH
    assert records["rank4"].metrics == {"exact_match": Score(count=7, n=10)}
    assert records["rank4"].usage.steps == 4 and records["rank4"].packages == {"torch": "2"}


def test_a_revision_that_cannot_be_read_is_not_known(folder: ExperimentFolder):
    file = folder.path / "code" / "REVISION"
    for content in (b"", b"half {", b"[]", b'{"commit": "abc"}', b"\xff\xfe"):
        file.write_bytes(content)
        (folder.path / "records.jsonl").unlink(missing_ok=True)
        assert {(record.commit, record.dirty) for record in collected(folder).values()} == {(None, None)}
    (folder.path / "records.jsonl").unlink()
    file.unlink()
    assert {(record.commit, record.dirty) for record in collected(folder).values()} == {(None, None)}


@pytest.mark.parametrize("torn", [b'{"run": "ra', b"\0\0\0", b'{"run": "\xc3', b" "])
def test_a_last_line_that_was_cut_off_hides_no_other(folder: ExperimentFolder, torn: bytes):
    collected(folder)
    for name in ("jobs.jsonl", "records.jsonl"):
        file = folder.path / name
        file.write_bytes(b"\n" + file.read_bytes() + b"\n" + torn)
    assert states(folder) == BOTH
    with pytest.raises(EngineError, match="nothing to cancel"):
        running.cancel(folder, None)
    assert {run: record.state for run, record in collected(folder).items()} == BOTH
    assert (folder.path / "records.jsonl").read_bytes().count(b"\n") == 2
    folder.add([Submission(run="rank4", engine="local", job_id="9", attempt=2)])
    lines = (folder.path / "jobs.jsonl").read_text().splitlines()
    assert [json.loads(line)["job_id"] for line in lines][2:] == ["9"] and len(lines) == 3


def test_a_line_that_a_person_broke_is_named_and_the_file_kept(folder: ExperimentFolder):
    collected(folder)
    odd_run = json.dumps({"run": "../../x", "engine": "local", "job_id": "1", "attempt": 1}).encode()
    lines = [b'{"run": "ra\n', b"\xff\n", b'{"run": "rank4"}', b"[]\n", odd_run]
    for name, broken in itertools.product(("jobs.jsonl", "records.jsonl"), lines):
        file = folder.path / name
        whole = file.read_bytes()
        file.write_bytes(whole + broken)
        with pytest.raises(RecordError, match=rf"{name}, line 3 is no"):
            collected(folder)
        assert file.read_bytes() == whole + broken
        file.write_bytes(whole)


def test_a_text_may_hold_what_only_looks_like_the_end_of_a_line(tmp_path: Path):
    record = Record(
        key="local:1",
        experiment="e",
        run="r",
        kind="control",
        state=State.FAILED,
        reason="a\u2028b\x85c\rd\0",
        config={},
        usage=Usage(),
    )
    write_records(tmp_path / "records.jsonl", [record, record])
    assert read_records(tmp_path / "records.jsonl") == [record, record]


@pytest.mark.parametrize("name", ["jobs.jsonl", "records.jsonl"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda file: file.symlink_to(file)], ids=["folder", "circle"])
def test_lines_that_cannot_be_read_are_not_taken_for_none(
    folder: ExperimentFolder, name: str, make: Callable[[Path], None]
):
    (folder.path / name).unlink(missing_ok=True)
    make(folder.path / name)
    with pytest.raises(RecordError, match=rf"{name} cannot be read"):
        collected(folder)


def test_records_outlive_the_list_of_jobs_and_the_queue(folder: ExperimentFolder, monkeypatch: pytest.MonkeyPatch):
    before = collected(folder)
    (folder.path / "runs" / "rank4" / "eval" / "scores.json").write_text("half {")
    monkeypatch.setenv("CHIPLOG_HOME", str(folder.path / "elsewhere"))
    assert collected(folder) == before  # as after the folder was copied to another machine
    (folder.path / "jobs.jsonl").unlink()
    assert collected(folder) == before


def test_an_engine_that_is_not_there_is_named(folder: ExperimentFolder):
    folder.add([Submission(run="rank4", engine="slrum", job_id="1", attempt=2)])
    for ask in (states, collected, lambda folder: running.cancel(folder, None)):
        with pytest.raises(EngineError, match=r"no engine 'slrum': there is local.*jobs\.jsonl"):
            ask(folder)
    with pytest.raises(EngineError):
        engine_for("\0")


def test_what_is_no_script_is_not_queued(folder: ExperimentFolder):
    file = folder.path / "runs" / "rank4" / "run.sbatch"
    file.write_bytes(b"")
    with pytest.raises(EngineError, match=r"does not begin with #!"):
        LocalEngine().submit([Batch(script=file, folder=file.parent)], "test")


ODD_LINES = [
    b"",
    b"[1]",
    b"3",
    b"null",
    b'{"event": ["step"]}',
    b'{"event": "other"}',
    b'{"event": "step"}',
    b"\xff\xfe",
    b"[" * 5000,
    *(json.dumps(event).encode() for event in (
        {**STEP, "seconds": "0.25"},
        {**STEP, "seconds": None},
        {**STEP, "seconds": float("nan")},
        {**STEP, "seconds": -1},
        {**STEP, "tokens": 10**400},
        {**STEP, "step": 0},
        {**STEP, "mem_kind": "guess"},
        {key: value for key, value in STEP.items() if key != "loss"},
        {**START, "started": "yesterday"},
        {**START, "started": "2026-01-01T00:00:01"},
        {**START, "setup_s": None},
        {"event": "checkpoint", "seconds": float("inf")},
    )),
]  # fmt: skip


def test_lines_that_are_no_events_change_nothing(folder: ExperimentFolder):
    file = folder.path / "runs" / "rank4" / "metrics.jsonl"
    before = train_usage(read_events(file))
    file.write_bytes(b"\n".join([*ODD_LINES, file.read_bytes(), *ODD_LINES, b'{"event": "step", "st']))
    assert train_usage(read_events(file)) == before
    assert states(folder) == BOTH and collected(folder)["rank4"].usage.steps == 4


def test_what_a_log_does_not_say_is_null(folder: ExperimentFolder):
    file = folder.path / "runs" / "rank4" / "metrics.jsonl"
    said = {key: START[key] for key in ("event", "started", "device", "setup_s")}
    write_lines(file, [said, {**STEP, "seconds": 0, "loss": float("nan")}])
    record = collected(folder)["rank4"]
    usage = record.usage
    assert (usage.steps, usage.train_s, usage.steps_per_s, usage.tokens_per_s) == (1, 0, None, None)
    assert (usage.steps_planned, usage.n_params, record.packages) == (None, None, {})
    assert math.isnan(read_records(folder.path / "records.jsonl")[0].usage.loss_last or 0)
    assert running.status(folder, ["rank4"])[0].total_steps is None


def test_more_items_right_than_there_were_is_refused():
    with pytest.raises(ValueError, match="11 of 10 items"):
        Score(count=11, n=10)


UNTRUSTED = [
    b"half {",
    b"[]",
    b"",
    b"\0",
    b"\xff",
    *(json.dumps(scores).encode() for scores in (
        {**SCORES, "scores": {"exact_match": {"count": 11, "n": 10}}},
        {**SCORES, "scores": {"exact_match": 7}},
        {**SCORES, "ended": "yesterday"},
        {**SCORES, "seconds": float("nan")},
        {key: value for key, value in SCORES.items() if key != "n"},
    )),
]  # fmt: skip


def test_scores_that_cannot_be_trusted_are_a_failed_evaluation(folder: ExperimentFolder):
    file = folder.path / "runs" / "rank4" / "eval" / "scores.json"
    for content in UNTRUSTED:
        file.write_bytes(content)
        record = collected(folder)["rank4"]
        assert record.state is State.FAILED and record.metrics == {} and record.usage.eval_s is None
        assert record.steps == {"train": State.COMPLETED, "eval": State.FAILED}
        assert record.reason and "scores.json cannot be trusted" in record.reason and "\n" not in record.reason
    file.write_text(json.dumps({**SCORES, "ended": "2026-01-01T01:00:00+00:00"}))
    assert collected(folder)["rank4"].metrics == {"exact_match": Score(count=7, n=10)}


def test_scores_that_break_after_they_were_collected_are_noticed(folder: ExperimentFolder):
    assert {run: record.state for run, record in collected(folder).items()} == BOTH
    (folder.path / "runs" / "rank4" / "eval" / "scores.json").write_bytes(b"\xff")
    assert collected(folder)["rank4"].state is State.FAILED


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "", ".", "~nobodyhere/e", "circle", "circle/e", "..", "/"])
def test_a_name_that_is_none_is_not_found(workspace: Path, name: str):
    (workspace / "experiments").mkdir()
    for circle in (workspace / "circle", workspace / "experiments" / "circle"):
        circle.symlink_to(circle)
    with pytest.raises(NotFoundError) as refused:
        find_experiment(name, load_settings())
    assert len(str(refused.value)) < 1000


def test_on_a_full_disk_runs_can_be_followed_and_no_record_is_lost(
    folder: ExperimentFolder, monkeypatch: pytest.MonkeyPatch
):
    def full(file: Path, content: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = collected(folder)
    (folder.path / "runs" / "rank4" / "eval" / "scores.json").write_text("")
    monkeypatch.setattr("chiplog.record.write_atomic", full)
    assert states(folder) == BOTH
    with pytest.raises(RecordError, match=r"records\.jsonl cannot be written: No space left on device"):
        collected(folder)
    with pytest.raises(RecordError, match=r"jobs\.jsonl cannot be written"):
        folder.add([])
    assert {record.run: record for record in read_records(folder.path / "records.jsonl")} == before
    assert {record.key for record in Ledger().records()} == {record.key for record in before.values()}


def test_how_the_runs_stand_is_answered_though_no_record_can_be_written(folder: ExperimentFolder):
    (folder.path / "records.jsonl").mkdir()
    answer = tools.experiment_status("e")
    assert [run.state for run in answer.runs] == [State.COMPLETED, State.COMPLETED]
    assert "Their records could not be written: " in answer.summary and "records.jsonl" in answer.summary


def test_a_ledger_row_that_is_no_record_is_an_error_in_words(folder: ExperimentFolder):
    collected(folder)
    with sqlite3.connect(Ledger().file) as connection:
        connection.execute("UPDATE records SET record = '{}'")
    connection.close()
    with pytest.raises(RecordError, match="the ledger"):
        Ledger().records()


def test_a_recipe_copy_that_is_no_text_is_named(folder: ExperimentFolder):
    (folder.path / "code" / "recipes" / "evaluate.yaml").write_bytes(b"\xff")
    assert states(folder) == BOTH
    with pytest.raises(ChiplogError, match=r"evaluate\.yaml is not YAML"):
        collected(folder)


def test_jobs_can_be_followed_and_collected_when_their_folders_are_gone(folder: ExperimentFolder):
    for name in ("runs", "code"):
        shutil.rmtree(folder.path / name)
    assert states(folder) == BOTH
    record = collected(folder)["rank4"]
    assert (record.state, record.usage.elapsed_s, record.commit) == (State.COMPLETED, 8.5, None)
    assert record.config["lora_rank"] == 4 and record.config["lr"] is None
    assert record.steps == {"train": State.COMPLETED, "eval": State.INCOMPLETE} and record.usage.steps is None


def test_jobs_can_be_followed_when_the_plan_says_other_things_or_nothing(folder: ExperimentFolder):
    plan = folder.path / "plan.yaml"
    plan.write_text(plan.read_text().replace("lora_rank: [4]", "lora_rank: [8]"))
    before = collected(folder)
    assert states(folder) == {"rank8": None, **BOTH} and set(before) == {"S_base"}
    plan.write_text("half: [")
    assert states(folder) == BOTH
    with pytest.raises(ChiplogError, match=r"plan\.yaml"):
        collected(folder)
    with pytest.raises(NotFoundError, match="no run 'rank8'"):
        running.pick_runs(folder, ["rank8"])


def test_a_run_that_lacks_a_file_is_not_submitted_and_another_is(folder: ExperimentFolder):
    for run in ("rank4", "S_base"):
        failed = end_job(folder, run, State.FAILED)
        folder.add([Submission(run=run, engine="local", job_id=failed, attempt=2)])
    (folder.path / "runs" / "rank4" / "eval.sbatch").unlink()
    with pytest.raises(RenderError, match=r"lacks runs/rank4/eval\.sbatch: set it up again"):
        submitting.to_submit(folder, running.pick_runs(folder, None))
    assert [run.name for run in submitting.to_submit(folder, ["S_base"])] == ["S_base"]
    shutil.rmtree(folder.path / "code")
    with pytest.raises(RenderError, match=r"lacks code/recipes/evaluate\.py"):
        submitting.to_submit(folder, ["S_base"])


def test_a_log_that_is_gone_or_no_text_stops_nothing(folder: ExperimentFolder):
    folder.add([Submission(run="rank4", engine="local", job_id=end_job(folder, "rank4", State.FAILED), attempt=2)])
    log = folder.path / "runs" / "rank4" / "slurm-1.out"
    log.mkdir()
    assert collected(folder)["rank4"].reason is None
    with pytest.raises(NotFoundError, match="is gone"):
        running.log_tail(running.status(folder, ["rank4"])[0], 5)
    log.rmdir()
    log.write_bytes(b"\0\0\xff\nValueError: \0\xff\n")
    assert running.log_tail(running.status(folder, ["rank4"])[0], 5) == ["\ufffd", "ValueError: \ufffd"]
    log = running.status(folder, ["rank4"])[0].log
    assert log
    Path(log).write_text("\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m\n 5%\r10%\rdone\r\n" + "x" * 5000 + "\n")
    assert running.log_tail(running.status(folder, ["rank4"])[0], 5) == ["red", "done", "x" * 1000]


def test_results_that_are_folders_or_lead_in_circles_are_not_there(folder: ExperimentFolder):
    run = folder.path / "runs" / "rank4"
    for name in ("metrics.jsonl", "DONE", "eval/scores.json"):
        (run / name).unlink()
        (run / name).symlink_to(run / name)
    assert read_events(run / "metrics.jsonl") == [] and read_scores(run / "eval" / "scores.json") is None
    assert states(folder) == BOTH and collected(folder)["rank4"].usage.steps is None
    for name in ("metrics.jsonl", "DONE", "eval/scores.json"):
        (run / name).unlink()
        (run / name).mkdir()
    assert states(folder) == BOTH and collected(folder)["rank4"].steps["eval"] is State.INCOMPLETE
