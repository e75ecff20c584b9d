"""The index of past runs: what a scan reads, what it keeps, and what is found in it again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chiplog import past_runs
from chiplog.diagnosis import diagnose
from chiplog.errors import ConfirmationNeeded, NotFoundError, RecordError
from chiplog.ledger import Ledger, scan
from chiplog.ledger import parse as parsing
from chiplog.ledger.parsers import transformers
from chiplog.ledger.redact import redacted
from chiplog.ledger.scan import FEW
from chiplog.record import OutOfMemory, Record, State, Usage
from tests.core.test_parsers import BAR, GPU_OOM, TORCHTUNE, TRAINER

LIMIT = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
SCAN = """
import sys
from pathlib import Path
from chiplog.ledger import Ledger, scan
scan.scan([Path(sys.argv[1])], Ledger())
"""


@pytest.fixture
def logs(workspace: Path) -> Path:
    """A workspace with a folder of logs."""
    folder = workspace / "logs"
    folder.mkdir()
    (folder / "a.out").write_text(TORCHTUNE)
    (folder / "b.log").write_text(TRAINER)
    (folder / "c.err").write_text(BAR + LIMIT)
    (folder / "notes.md").write_text(TRAINER)
    return folder


def states() -> dict[str, State]:
    return {Path(record.logs[0]).name: record.state for record in Ledger().records()}


def test_a_scan_reads_logs_once(logs: Path, monkeypatch: pytest.MonkeyPatch):
    first = scan.scan([logs], Ledger())
    assert (first.files, first.read, first.runs, first.gone) == (3, 3, 3, 0)
    assert states() == {"a.out": State.COMPLETED, "b.log": State.COMPLETED, "c.err": State.TIMEOUT}

    def touched(*_: Any) -> None:
        raise AssertionError("a file's content was touched")

    monkeypatch.setattr(parsing, "LogReader", touched)
    assert scan.scan([logs], Ledger()).read == 0


def test_a_large_log_that_grew_is_read_from_where_it_ended(logs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scan, "LARGE", 100)
    scan.scan([logs], Ledger())
    file = logs / "b.log"
    whole = TRAINER.encode()
    cut = whole.rfind(b"\n", 0, 900) + 1
    file.write_bytes(whole[:cut])
    scan.scan([file], Ledger())
    started: list[int] = []
    reader = parsing.LogReader
    monkeypatch.setattr(parsing, "LogReader", lambda path, start=0: (started.append(start), reader(path, start))[1])
    file.write_bytes(whole)
    assert scan.scan([file], Ledger()).read == 1
    assert started == [cut]
    (record,) = Ledger().of_file(str(file))
    assert (record.usage.loss_first, record.usage.loss_last, record.state) == (1.5, 0.75, State.COMPLETED)


def test_what_two_scans_read_of_a_log_that_grows_counts_once(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scan, "LARGE", 100)
    file = workspace / "train.log"
    lines = [line for line in TRAINER.splitlines(keepends=True) if "train_runtime" not in line]
    file.write_text("".join(lines[:-1]))
    scan.scan([file], Ledger())
    with file.open("a") as same:
        same.write("{'eval_loss': 0.5, 'eval_runtime': 1.0, 'epoch': 2.0}\n")
    read = scan._read_batch  # pyright: ignore[reportPrivateUsage]

    def after_another(batch: Any) -> Any:
        monkeypatch.setattr(scan, "_read_batch", read)
        ours = read(batch)
        assert scan.scan([file], Ledger()).read == 1
        with file.open("a") as same:
            same.write(lines[-1])
        return ours

    monkeypatch.setattr(scan, "_read_batch", after_another)
    scan.scan([file], Ledger())
    scan.scan([file], Ledger())
    (record,) = Ledger().of_file(str(file))
    assert record.usage.val_losses.count(0.5) == 1


@pytest.mark.parametrize("large", [100, 10**9])
def test_what_was_written_anew_or_by_a_next_run_is_read_whole(logs: Path, monkeypatch: pytest.MonkeyPatch, large: int):
    monkeypatch.setattr(scan, "LARGE", large)
    file = logs / "b.log"
    cut = TRAINER.rfind("\n", 0, 900) + 1
    file.write_text(TRAINER[:cut])
    scan.scan([logs], Ledger())
    with file.open("r+") as same:  # the same inode, and longer
        same.write(TRAINER.replace("'loss': 1.5", "'loss': 9.5") + "\n")
    scan.scan([logs], Ledger())
    (record,) = Ledger().of_file(str(file))
    assert (record.usage.loss_first, record.state, record.reason) == (9.5, State.COMPLETED, None)
    with file.open("a") as same:  # a next run, behind one that had ended
        same.write(TRAINER.replace("'loss': 0.75", "'loss': 0.5"))
    scan.scan([logs], Ledger())
    assert [record.usage.loss_last for record in Ledger().of_file(str(file))] == [0.75, 0.5]


def test_a_log_that_cannot_be_made_sense_of_is_named_and_the_others_are_read(logs: Path):
    (logs / "digits.log").write_text(f"step {'9' * 20}/100 loss 1.0\nstep {'9' * 5000}/100 loss 1.0\n")
    (logs / "sacct.txt").write_text(
        f"JobID|State|Elapsed|MaxRSS\n7|RUNNING|00:10:00|1e999K\n8|FAILED|00:01:00|{'9' * 400}K\n"
    )
    os.close(os.open(os.fsencode(logs) + b"/l\xff.out", os.O_CREAT | os.O_WRONLY))
    scan.scan([logs], Ledger())
    assert {"a.out", "b.log", "c.err"} <= set(states())
    assert scan.scan([logs], Ledger()).read == 0


def test_a_parser_that_stumbles_is_named_and_the_other_logs_are_read(logs: Path, monkeypatch: pytest.MonkeyPatch):
    def stumbles(log: object) -> None:
        raise ValueError("too many digits")

    monkeypatch.setattr(transformers, "parse", stumbles)
    (error,) = scan.scan([logs], Ledger()).errors
    assert "b.log cannot be made sense of, as a log of transformers: too many digits" in error
    assert set(states()) == {"a.out", "c.err"}


def test_a_log_that_was_written_anew_is_read_anew(logs: Path):
    scan.scan([logs], Ledger())
    (logs / "b.log").write_text(BAR + LIMIT)
    scan.scan([logs], Ledger())
    assert states()["b.log"] is State.TIMEOUT and len(Ledger().records()) == 3


def test_a_log_that_vanished_is_marked_and_its_record_kept(logs: Path):
    scan.scan([logs], Ledger())
    (logs / "b.log").unlink()
    found = scan.scan([logs], Ledger())
    assert (found.files, found.gone) == (2, 1) and "b.log" in states()
    assert scan.scan([logs], Ledger()).gone == 0
    (logs / "b.log").write_text(TRAINER)
    assert scan.scan([logs], Ledger()).read == 1


def test_links_in_a_circle_and_unreadable_files_do_not_stop_a_scan(logs: Path):
    (logs / "loop").symlink_to(logs)
    (logs / "self.log").symlink_to(logs / "self.log")
    (logs / "again.log").symlink_to(logs / "b.log")
    os.mkfifo(logs / "pipe.log")
    found = scan.scan([logs], Ledger())
    assert (found.files, found.runs, found.errors) == (3, 3, [])


def test_many_logs_are_read_on_all_cores(logs: Path):
    for number in range(FEW + 10):
        (logs / f"{number}.log").write_text(TRAINER)
    seen: list[float] = []
    found = scan.scan([logs], Ledger(), lambda done, total, words: seen.append(done), workers=2)
    assert found.runs == FEW + 13 == len(Ledger().records()) and seen[-1] == FEW + 13 and seen == sorted(seen)


def test_two_scans_at_once_and_one_killed_lose_nothing(logs: Path):
    for number in range(150):
        (logs / f"{number}.log").write_text(TRAINER)
    command = [sys.executable, "-c", SCAN, str(logs)]
    killed = subprocess.Popen(command)
    both = [subprocess.Popen(command) for _ in range(2)]
    while not Ledger().seen() and killed.poll() is None:
        pass
    killed.send_signal(signal.SIGKILL)
    assert [process.wait(60) for process in both] == [0, 0]
    killed.wait()
    scan.scan([logs], Ledger())
    assert len(Ledger().records()) == 153 and scan.scan([logs], Ledger()).read == 0


def test_a_ledger_that_cannot_be_written_is_an_error_in_words(logs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHIPLOG_HOME", str(logs / "b.log"))
    with pytest.raises(RecordError, match="cannot be used"):
        scan.scan([logs], Ledger())


def test_an_older_ledger_is_carried_over(workspace: Path):
    import sqlite3

    ledger = Ledger()
    ledger.file.parent.mkdir(parents=True)
    record = Record(key="local:1", experiment="e", run="r", kind="control", state=State.COMPLETED)
    with sqlite3.connect(ledger.file) as old:
        old.execute("CREATE TABLE runs (key TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT")
        old.execute("INSERT INTO runs VALUES (?, ?)", (record.key, record.model_dump_json()))
    old.close()
    assert Ledger().records() == [record]


def test_runs_are_searched_sorted_and_paged(logs: Path):
    scan.scan([logs], Ledger())
    assert past_runs.search_runs(framework="torchtune").total == 1
    assert past_runs.search_runs(model="LLAMA3_2").runs[0].config["lora_rank"] == 64
    assert past_runs.search_runs(model="llama%").total == 0  # a % is a %
    assert past_runs.search_runs(state=State.TIMEOUT, batch_size=32).total == 0
    slow = past_runs.search_runs(sort="-train_s", limit=2)
    assert [run.usage.train_s for run in slow.runs] == [200.0, 187.5] and slow.total == 3
    assert [run.usage.train_s for run in past_runs.search_runs(sort="-train_s", limit=2, page=2).runs] == [20.0]
    with pytest.raises(RecordError, match="choose from"):
        Ledger().search({"nonsense": 1})


def test_a_run_is_shown_diagnosed_and_forgotten(logs: Path):
    past_runs.scan_logs(["logs"])
    (run,) = past_runs.search_runs(state=State.TIMEOUT).runs
    assert "c.err, byte" in past_runs.show_run(run.key).summary
    words = past_runs.diagnose_run(run.key).summary
    assert "at step 10 of 100" in words and "00:04:00" in words  # 20 s for 10 steps, 90 left, a fifth more
    with pytest.raises(ConfirmationNeeded):
        past_runs.forget_run(run.key)
    past_runs.forget_run(run.key, confirm=True)
    with pytest.raises(NotFoundError, match="search_runs lists"):
        past_runs.show_run(run.key)
    assert past_runs.diagnose_run("logs/c.err").state is State.TIMEOUT  # the log itself is still there


def test_runs_are_searched_by_date(logs: Path):
    Ledger().put(
        Record(key=f"k{day}", state=State.FAILED, started=f"2026-01-0{day}T12:00:00+00:00") for day in (1, 2, 3)
    )
    found = past_runs.search_runs(since="2026-01-02", until="2026-01-03")
    assert [record.key for record in found.runs] == ["k2"]
    with pytest.raises(RecordError, match="'yesterday' is no date: write one as 2026"):
        past_runs.search_runs(since="yesterday")


def test_nothing_is_called_so(logs: Path):
    with pytest.raises(NotFoundError, match="nothing is called"):
        past_runs.scan_logs(["nothere/*.out"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"micro_batch_size": 8, "grad_accum": 2}, "micro_batch_size 4 with grad_accum 4 in place of 8 and 2"),
        ({"micro_batch_size": 6}, "micro_batch_size 3 with grad_accum 2"),
        ({"micro_batch_size": 1}, "the batch is 1 already"),
        ({"batch_size": 8, "gpus": 8}, "the batch is 1 already"),
        ({"batch_size": 64, "grad_accum": 2, "gpus": 8}, "micro_batch_size 2 with grad_accum 4 in place of 4 and 2"),
        ({}, "halve the micro-batch and double"),
    ],
)
def test_out_of_memory_keeps_the_effective_batch(config: dict[str, Any], words: str):
    oom = OutOfMemory(kind="gpu", tried_bytes=2**31, capacity_bytes=2**36)
    usage = Usage(gpus=config.get("gpus"))
    advice = diagnose(Record(key="k", state=State.OUT_OF_MEMORY, config=config, oom=oom, usage=usage))
    assert advice and words in advice.change and "64 GiB" in advice.cause


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("ModuleNotFoundError: No module named 'flash_attn'", "flash_attn is not installed"),
        ("OSError: [Errno 122] Disk quota exceeded", "quota is full"),
        ("sbatch: error: Invalid account or account/partition combination specified", "does not know that account"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'data.json'", "a file is missing: data.json"),
        ("run.sh: line 3: torchrun: command not found", "the command torchrun"),
    ],
)
def test_a_failure_has_a_cause_and_a_change(reason: str, words: str):
    advice = diagnose(Record(key="k", state=State.FAILED, reason=reason))
    assert advice and words in advice.cause and advice.change


def test_a_loss_that_is_no_number_is_named():
    advice = diagnose(Record(key="k", state=State.COMPLETED, usage=Usage(loss_last=float("nan"), steps=7)))
    assert advice and "no number since step 7" in advice.cause
    assert diagnose(Record(key="k", state=State.COMPLETED)) is None


def test_what_is_shared_names_no_user_host_or_folder(logs: Path):
    error = "ValueError: /home/zoltan/secret/data of zoltan@login7.lab.org"
    (logs / "d.out").write_text(f"{TRAINER}Traceback (most recent call last):\n{error}\n{GPU_OOM}\n")
    past_runs.scan_logs(["logs"])
    past_runs.export_runs("shared.jsonl")
    shared = Path("shared.jsonl").read_text()
    assert len(shared.splitlines()) == 4
    for private in ("/home", "zoltan", "login7", str(logs.parent), "n1 CANCELLED"):
        assert private not in shared
    Ledger().file.unlink()
    assert past_runs.import_runs("shared.jsonl").runs == 4 == len(Ledger().records())
    assert all(json.loads(line)["key"] for line in shared.splitlines())


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("cannot open /home/zoltan", "cannot open PATH"),
        ("in /scratch/zoltan/", "in PATH"),
        ("no '/home/zoltan/my data/x.json'", "no 'my data/x.json'"),
        ("~zoltan/data/x.json: gone", "x.json: gone"),
        ("C:\\Users\\zoltan\\x.json", "x.json"),
        ("data/zoltan/x.json", "x.json"),
        ("srun: error: node042: task 3: Out Of Memory", "srun: error: HOST: task 3: Out Of Memory"),
        ("srun: error: Node failure on gpu-n017", "srun: error: Node failure on HOST"),
        ("slurmstepd-node12: error: x", "slurmstepd-HOST: error: x"),
        (
            "*** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***",
            "*** JOB 7 ON HOST CANCELLED AT 2026-01-01T00:00:00 ***",
        ),
        ("tcp://node042.lab.org:29500 and 10.1.2.3", "URL and HOST"),
        ("zoltan@login7.lab.org", "USER@HOST"),
        ("meta-llama/Llama-3.2-1B, lr 1e-4, 3/4 of it", "meta-llama/Llama-3.2-1B, lr 1e-4, 3/4 of it"),
    ],
)
def test_no_text_that_is_shared_names_a_user_a_host_or_a_folder(text: str, shared: str):
    record = Record(key="k", state=State.FAILED, reason=text, config={"path": text}, packages={"p": text})
    (seen,) = redacted([record])
    assert (seen.reason, seen.config, seen.packages) == (shared, {"path": shared}, {"p": shared})


def test_a_list_in_a_configuration_is_redacted_too():
    (seen,) = redacted(
        [Record(key="k", state=State.FAILED, model="/home/zoltan/llama", config={"files": ["/home/zoltan/a.json"]})]
    )
    assert (seen.config, seen.model) == ({"files": ["a.json"]}, "llama")
