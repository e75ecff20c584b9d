"""The workspace's settings, and the index of past runs."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from chiplog.errors import NotFoundError, OutsideRootsError, RecordError, SettingsError
from chiplog.ledger import Ledger
from chiplog.record import Record, State, Usage, read_records, write_records
from chiplog.settings import load_settings


def a_record(key: str, **change: Any) -> Record:
    values = {
        "key": key,
        "experiment": "e",
        "run": "r",
        "kind": "finetune",
        "state": State.COMPLETED,
        "config": {"lr": 1e-4},
        "usage": Usage(device="cpu", elapsed_s=12.5),
    }
    return Record.model_validate({**values, **change})


def test_workspace_settings_beat_the_users_key_by_key(workspace: Path, tmp_path: Path):
    user = tmp_path / "config" / "chiplog" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text("[slurm]\naccount = 'mine'\npartition = 'gpu'\n[paths]\nmodels = ['/big/models']\n")
    (workspace / "chiplog.toml").write_text("[slurm]\naccount = 'lab'\n")
    settings = load_settings()
    assert settings.slurm and (settings.slurm.account, settings.slurm.partition) == ("lab", "gpu")
    assert settings.model_roots == [Path("/big/models")]


def test_the_workspace_is_found_upwards(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    below = workspace / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert load_settings().workspace == workspace
    monkeypatch.setenv("CHIPLOG_WORKSPACE", str(below))
    assert load_settings().workspace == below


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gpus]\nname = 'x'\n", "gpus: "),
        ("[[gpus]]\ncount = 0\nname = 'x'\n", "gpus.0.count"),
        ("[budget]\ngpu_hours = 'many'\n", "budget.gpu_hours"),
        ("[slurm]\naccount = 'a b'\n", "slurm.account"),
        ('[slurm]\nsetup = ["a\\nb"]\n', "slurm.setup.0"),
        ("paths = 3\n", "paths"),
        ("workspace = '/etc'\n", "remove the line"),
        ("[[gpus]]\nname = 'x'\ngres = 'nonsense'\n", "gpus.0.gres"),
        ("[[gpus]]\nname = 'x'\n[[gpus]]\nname = 'x'\n", "two [[gpus]] called 'x'"),
        ("[paths]\nexperiments = 'chiplog.toml'\n", "which is no folder"),
        ("[nonsense]\n", "nonsense: there is no such field"),
    ],
)
def test_a_wrong_setting_is_named(workspace: Path, text: str, words: str):
    (workspace / "chiplog.toml").write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert words in str(refused.value) and "chiplog.toml" in str(refused.value)


def test_a_link_does_not_lead_out_of_the_allowed_folders(workspace: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("x")
    (workspace / "data").mkdir()
    (workspace / "data" / "link").symlink_to(tmp_path / "secret")
    settings = load_settings()
    assert settings.allowed("data") == workspace / "data"
    for path in ("data/link", "../secret", "/etc/passwd", "data/../../secret"):
        with pytest.raises(OutsideRootsError, match="outside the folders"):
            settings.allowed(path)


@pytest.mark.parametrize("path", ['"~nobodyhere/x"', '"a\\u0000b"', "3", '["a"]'])
@pytest.mark.parametrize("key", ["models", "datasets", "experiments", "logs"])
def test_a_path_that_is_none_is_named_by_its_setting(workspace: Path, key: str, path: str):
    value = path if key == "experiments" else f"[{path}]"
    (workspace / "chiplog.toml").write_text(f"[paths]\n{key} = {value}\n")
    with pytest.raises(SettingsError, match=rf"chiplog\.toml is wrong:\n  paths\.{key}"):
        load_settings()


@pytest.mark.parametrize("variable", ["CHIPLOG_WORKSPACE", "XDG_CONFIG_HOME"])
def test_a_variable_that_names_no_folder_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "~nobodyhere/x")
    with pytest.raises(SettingsError, match=f"set {variable}"):
        load_settings()


def test_a_path_that_cannot_be_followed_is_not_allowed(workspace: Path):
    (workspace / "circle").symlink_to(workspace / "circle")
    for path in ("a\0b", "~nobodyhere", "circle"):
        with pytest.raises(NotFoundError, match="is no path"):
            load_settings().allowed(path)


def test_records_come_back_as_they_were_put(tmp_path: Path):
    ledger = Ledger(tmp_path / "deep" / "ledger.sqlite")
    first, second = a_record("local:1", started="2026-01-01"), a_record("local:2", started="2026-01-02")
    ledger.put([first, second])
    assert ledger.records() == [second, first]
    ledger.put([a_record("local:1", state=State.FAILED)])
    assert [r.key for r in ledger.records(state=State.COMPLETED)] == ["local:2"]
    assert ledger.records(device="cuda") == []


def test_a_ledger_file_that_is_none_is_an_error_in_words(tmp_path: Path):
    (tmp_path / "ledger.sqlite").write_text("this is no database, and longer than a header would be" * 20)
    with pytest.raises(RecordError, match="cannot be used"):
        Ledger(tmp_path / "ledger.sqlite").records()


def _put_many(file: Path, start: int) -> None:
    for number in range(start, start + 20):
        Ledger(file).put([a_record(f"local:{number}")])


def test_two_processes_write_the_ledger_at_once_and_nothing_is_lost(tmp_path: Path):
    file = tmp_path / "ledger.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_put_many, args=(file, start)) for start in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Ledger(file).records()) == 40


def test_a_line_that_is_no_record_is_named_and_the_file_kept(tmp_path: Path):
    file = tmp_path / "records.jsonl"
    write_records(file, [a_record("local:1")])
    file.write_text(file.read_text() + "{half a rec\n")
    with pytest.raises(RecordError, match="line 2"):
        read_records(file)
    assert "{half a rec" in file.read_text()
