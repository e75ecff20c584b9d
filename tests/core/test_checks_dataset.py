"""check_dataset: a sound set is silent, every fault has a check that fires, and a wrong name finds the right one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiplog.checks.dataset import DatasetReport, SplitReport, check_dataset
from chiplog.checks.samples import TokenCounts
from chiplog.errors import NotFoundError
from chiplog.trainer_files import load_trainer_file
from tests.conftest import make_model, make_words

Row = dict[str, object]


def row(word: str, **more: object) -> Row:
    return {"input": word, "output": word.capitalize(), **more}


def chat(word: str) -> Row:
    said = {"role": "user", "content": word}, {"role": "assistant", "content": word.capitalize()}
    return {"messages": list(said)}


def words(*letters: str) -> list[Row]:
    return [row(letter) for letter in letters]


def save(file: Path, **splits: list[Row]) -> Path:
    file.write_text(json.dumps(splits))
    return file


def problems(report: DatasetReport) -> list[tuple[str, str, str]]:
    return [(check.level, check.subject, check.found) for check in report.problems]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(tmp_path / "models" / "tiny")
    return tmp_path / "models" / "tiny"


def test_a_sound_set_is_reported_whole_and_silently(tmp_path: Path, model: Path):
    file = save(tmp_path / "words.json", train=words("a", "bc"), validation=words("d"), test=words("e"))
    found = check_dataset(file, model=model)

    def split(rows: int, tokens: TokenCounts) -> SplitReport:
        return SplitReport(rows=rows, columns=["input", "output"], empty=0, duplicates=0, tokens=tokens)

    # One token a character: ^<user>a<end><assistant> is 24, then A<end>~ 7, of which the answer is learnt.
    one = TokenCounts(total=31, label=7, mean=31.0, p50=31, p95=31, max=31)
    both = TokenCounts(total=64, label=15, mean=32.0, p50=31, p95=33, max=33)
    assert found == DatasetReport(
        ok=True,
        checks=found.checks,
        path=file,
        format="json",
        bytes=file.stat().st_size,
        sha256=load_trainer_file("rows").file_hash(file),
        shape="instruct",
        splits={"train": split(2, both), "validation": split(1, one), "test": split(1, one)},
    )
    assert [(check.subject, check.level, check.found) for check in found.checks] == [
        ("reading", "ok", "2 rows of train, 1 rows of validation, 1 rows of test"),
        ("shape", "ok", "instruct, in all rows"),
        ("empty rows", "ok", "none"),
        ("duplicates", "ok", "none"),
        ("leaks", "ok", "none"),
        ("answers", "ok", "one for each input"),
        ("splits", "ok", "train, validation, test"),
        ("tokens", "ok", "126 in all, at most 33 a sample"),
    ]


FAULTS: dict[str, tuple[dict[str, list[Row]], str, str, str]] = {
    "an empty answer": (
        {"train": [*words("a", "b"), {"input": "c", "output": " "}], "test": words("d")},
        "failed",
        "empty rows",
        "1 rows have no content or an empty answer, the first is train row 3",
    ),
    "no content": (
        {"train": [*words("a"), {}, {"input": "", "output": None}], "test": words("d")},
        "failed",
        "empty rows",
        "2 rows have no content or an empty answer, the first is train row 2",
    ),
    "a chat without an answer": (
        {"train": [chat("a"), {"messages": [{"role": "user", "content": "b"}]}], "test": [chat("c")]},
        "failed",
        "empty rows",
        "1 rows have no content or an empty answer, the first is train row 2",
    ),
    "a row twice in a split": (
        {"train": [*words("a", "b", "a"), row("a", id=7)], "test": words("d")},
        "warning",
        "duplicates",
        "2 rows of train repeat an earlier one: train row 3 is train row 1",
    ),
    "a row in two splits": (
        {"train": words("a", "b", "c"), "test": words("d", "c", "b")},
        "failed",
        "leaks",
        "2 rows of test are in train too: test row 2 is train row 3",
    ),
    "a row in two splits under another id": (
        {"train": [row("a", id=1)], "validation": [row("a", id=2)], "test": words("b")},
        "failed",
        "leaks",
        "1 rows of validation are in train too: validation row 1 is train row 1",
    ),
    "an input with two answers": (
        {"train": words("a", "b"), "test": [row("d"), {"input": "b", "output": "bee"}]},
        "warning",
        "answers",
        "1 inputs have more than one answer: train row 2 and test row 2 ask the same",
    ),
    "two shapes": (
        {"train": words("a", "b"), "test": [row("c"), chat("d")]},
        "failed",
        "shape",
        "instruct from train row 1 and chat from test row 2",
    ),
    "no shape": (
        {"train": [*words("a"), {"word": "b"}], "test": words("c")},
        "failed",
        "shape",
        "1 rows cannot be used, the first is train row 2: a row has the columns word; expected messages, ",
    ),
    "a number for an answer": (
        {"train": [*words("a"), {"input": "b", "output": 7}], "test": words("c")},
        "failed",
        "shape",
        "1 rows cannot be used, the first is train row 2: the column output holds 7; expected text",
    ),
    "nothing to score on": ({"train": words("a")}, "warning", "splits", "no split to score on, only train"),
    "nothing to train on": ({"test": words("a")}, "warning", "splits", "no split to train on, only test"),
    "a split without rows": ({"train": words("a"), "test": []}, "failed", "splits", "no rows in test"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fires_its_own_check_and_no_other(name: str, tmp_path: Path):
    splits, level, subject, words_found = FAULTS[name]
    report = check_dataset(save(tmp_path / "words.json", **splits))
    ((found_level, found_subject, found),) = problems(report)
    assert (found_level, found_subject) == (level, subject)
    assert found.startswith(words_found)
    assert report.ok == (level == "warning")


def test_a_leak_is_found_across_the_shapes_of_a_row(tmp_path: Path):
    report = check_dataset(save(tmp_path / "words.json", train=words("a"), test=[chat("a")]))
    assert ("failed", "leaks", "1 rows of test are in train too: test row 1 is train row 1") in problems(report)


def test_plain_text_is_compared_as_it_stands(tmp_path: Path):
    report = check_dataset(save(tmp_path / "words.json", train=[{"text": "a"}, {"text": "a"}], test=[{"text": "b"}]))
    assert (report.ok, report.shape, report.splits["train"].duplicates) == (True, "text", 1)
    assert "answers" not in [check.subject for check in report.checks]


UNREADABLE = {
    "a bad line": (
        "words.jsonl",
        b'{"input": "a", "output": "A"}\n{"input":',
        1,
        "words.jsonl line 2 column 10 is not JSON",
    ),
    "a row that is a list": (
        "words.json",
        b'{"train": [{"input": "a", "output": "A"}, []]}',
        1,
        "train row 2 is a list",
    ),
    "no data at all": ("words.parquet", b"version https://git-lfs.github.com/spec/v1", None, "is a git-lfs pointer"),
    "another format": ("words.xlsx", b"PK", None, "words.xlsx is none of json"),
    "no rows": ("words.json", b"{}", None, "names no split (its keys: none)"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_reported_with_file_and_line_and_the_rows_before_it(name: str, tmp_path: Path):
    file, content, rows, expected = UNREADABLE[name]
    (tmp_path / file).write_bytes(content)
    report = check_dataset(tmp_path / file)
    failed = [check for check in report.checks if not check.ok]
    assert [check.subject for check in failed] == ["reading"]
    assert expected in failed[0].found
    assert failed[0].mend
    assert (report.splits["train"].rows if report.splits else None) == rows


def test_files_that_are_not_read_are_named(tmp_path: Path):
    for name, letter in (("train", "a"), ("test", "b"), ("extra", "c")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row(letter)))
    expected = [("warning", "files", "1 files name no split and are not read: extra.jsonl")]
    assert problems(check_dataset(tmp_path)) == expected


def test_a_limit_reads_so_many_rows_of_each_split_and_says_so(tmp_path: Path):
    file = save(tmp_path / "words.json", train=words("a", "b", "c", "a"), test=words("d", "e"))
    report = check_dataset(file, limit=2)
    assert {name: split.rows for name, split in report.splits.items()} == {"train": 2, "test": 2}
    assert problems(report) == [("warning", "reading", "only the first 2 rows of train were read")]


def test_progress_counts_the_rows_of_all_splits(tmp_path: Path):
    heard: list[tuple[float, float | None, str]] = []
    file = save(
        tmp_path / "words.json", train=[row(f"a{i}") for i in range(2_500)], test=[row(f"b{i}") for i in range(1_000)]
    )
    check_dataset(file, progress=lambda done, total, what: heard.append((done, total, what)))
    assert heard == [
        (1_000, None, "train: 1,000 rows"),
        (2_000, None, "train: 2,000 rows"),
        (3_500, None, "test: 1,000 rows"),
    ]


def test_tokens_are_counted_with_the_system_prompt_and_the_prompt(tmp_path: Path, model: Path):
    file = save(tmp_path / "words.json", train=words("a"), test=words("b"))
    plain = check_dataset(file, model=model).splits["train"].tokens
    prompted = check_dataset(file, model=model, system_prompt="Go", prompt="Say: {input}").splits["train"].tokens
    assert plain and prompted
    # <system>Go<end> has 15 characters, Say: and a space 5; what is learnt stays the same.
    assert (prompted.total - plain.total, prompted.label - plain.label) == (20, 0)


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def without_template(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"eos_token": "~"}')


def with_a_wrong_template(model: Path) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "~", "chat_template": "{{ 1 + 'a' }}"}))


def with_a_wrong_tokenizer_config(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("[]")


def with_short_context(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))


@pytest.mark.parametrize(
    ("break_it", "level", "found"),
    [
        (without_tokenizer, "failed", "tokenizer.json is missing"),
        (without_template, "failed", "train row 1: "),
        (with_a_wrong_template, "failed", "refuses these messages: unsupported operand"),
        (with_a_wrong_tokenizer_config, "failed", "is no JSON object"),
        (with_short_context, "warning", "the longest sample has 31 tokens, the context of tiny 30"),
    ],
)
def test_a_model_that_cannot_count_or_hold_the_samples_is_a_fault(
    break_it: Callable[[Path], None], level: str, found: str, tmp_path: Path, model: Path
):
    break_it(model)
    ((found_level, subject, words_found),) = problems(
        check_dataset(save(tmp_path / "words.json", train=words("a"), test=words("b")), model=model)
    )
    assert (found_level, subject) == (level, "tokens")
    assert found in words_found


def test_a_data_set_that_is_not_there_is_an_error_with_the_names_near_it(tmp_path: Path):
    make_words(tmp_path / "words_5L.json")
    make_words(tmp_path / "numbers.json")
    with pytest.raises(NotFoundError) as error:
        check_dataset(tmp_path / "word_5L.jsn")
    path = tmp_path / "word_5L.jsn"
    assert str(error.value) == f"there is no data set {path}. Did you mean\n  {tmp_path / 'words_5L.json'}"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary()
    | st.lists(
        st.dictionaries(st.sampled_from(["input", "output", "messages", "text"]), st.text() | st.integers())
    ).map(lambda rows: json.dumps({"train": rows}).encode())
)
def test_no_bytes_in_a_file_make_it_raise(name: str, content: bytes, tmp_path: Path, model: Path):
    (tmp_path / name).write_bytes(content)
    report = check_dataset(tmp_path / name, model=model)
    assert report.ok == all(check.ok for check in report.checks)
    assert report.model_dump_json()


def test_deep_brackets_in_a_row_are_a_fault_of_that_row(tmp_path: Path):
    for depth in range(900, 1_000, 5):
        deep = "[" * depth + "]" * depth
        (tmp_path / "a.jsonl").write_text(f'{{"input": {deep}, "output": "A"}}\n')
        assert not check_dataset(tmp_path / "a.jsonl").ok
