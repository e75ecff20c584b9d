"""trainer/rows.py: every shape of data set gives the same rows, and what cannot be read says where and what to do."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.rows import RowsError, file_hash, layout, read_rows, split_names

TRAIN = [{"input": "sines", "output": "Sines"}, {"input": 'élan, "so"', "output": "Élan"}]
VALIDATION = [{"input": "cosine", "output": "Cosine"}]
TEST = [{"input": "tangent", "output": "Tangent"}]
ALL = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def read(path: Path) -> dict[str, list]:
    return {split: list(read_rows(path, split)) for split in split_names(path)}


def lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, files: Mapping[str, str | bytes | list]) -> Path:
    """Files by name; a list is written as rows, in what the name's suffix says."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list) and name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(content), file)
            continue
        text = content
        if isinstance(content, list):
            text = json.dumps(content) if ".json" in file.suffixes else lines(content)
        data = text if isinstance(text, bytes) else str(text).encode()
        file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


CSV = 'input,output\nsines,Sines\n"élan, ""so""",Élan\n'
FOLDERS = {
    "one .json a split": {"train.json": TRAIN, "validation.json": VALIDATION, "test.json": TEST},
    "aliases and several kinds": {
        "my_train.jsonl": TRAIN,
        "dev.json.gz": VALIDATION,
        "test.csv": "input,output\ntangent,Tangent\n",
    },
    "shards": {
        "train-00000-of-00002.jsonl": TRAIN[:1],
        "train-00001-of-00002.jsonl": TRAIN[1:],
        "valid.jsonl": VALIDATION,
        "test.jsonl.gz": TEST,
    },
    "the hub's parquet": {
        "data/train-00000-of-00002.parquet": TRAIN[:1],
        "data/train-00001-of-00002.parquet": TRAIN[1:],
        "data/validation-00000-of-00001.parquet": VALIDATION,
        "data/test-00000-of-00001.parquet": TEST,
        "README.md": "words",
        ".cache/train.json": "[]",
    },
    "a folder a split": {
        "train/0000.parquet": TRAIN[:1],
        "train/0001.parquet": TRAIN[1:],
        "val/0000.parquet": VALIDATION,
        "test/0000.parquet": TEST,
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_files_gives_the_rows_of_each_split(name: str, tmp_path: Path):
    assert read(write(tmp_path, FOLDERS[name])) == ALL


@pytest.mark.parametrize("name", ["words.json", "words.json.gz", "test_words.json"])
def test_one_object_of_splits_gives_the_rows_of_each(name: str, tmp_path: Path):
    document = json.dumps({"version": 3, "test": TEST, "dev": VALIDATION, "train": TRAIN})
    path = write(tmp_path, {name: document}) / name
    assert read(path) == ALL
    assert read(tmp_path) == ALL  # a file that is alone in its folder
    assert split_names(path) == ["train", "validation", "test"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("words.json", "train"),
        ("words.jsonl", "train"),
        ("words_val.jsonl.gz", "validation"),
        ("eval-2024.ndjson", "validation"),
        ("Test.jsonl", "test"),
        ("words.test.json", "test"),
        ("words_train.parquet", "train"),
    ],
)
def test_the_name_of_a_lone_file_says_its_split_and_train_is_the_rest(name: str, split: str, tmp_path: Path):
    assert read(write(tmp_path, {name: TRAIN}) / name) == {split: TRAIN}


def test_a_csv_gives_its_columns_as_text(tmp_path: Path):
    assert read(write(tmp_path, {"words.csv": CSV}) / "words.csv") == {"train": TRAIN}


def test_one_row_a_line_in_a_file_called_json_is_read_as_lines(tmp_path: Path):
    path = write(tmp_path, {"words.json": lines(TRAIN)}) / "words.json"
    assert (layout(path).format, read(path)) == ("json", {"train": TRAIN})


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path):
    path = write(tmp_path, {"words.jsonl": b"\xef\xbb\xbf" + lines(TRAIN).encode() + b"\n\r\n"}) / "words.jsonl"
    assert read(path) == {"train": TRAIN}


def test_what_save_to_disk_wrote_is_read_without_datasets(tmp_path: Path):
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    both = DatasetDict({"valid": Dataset.from_list(VALIDATION), "train": Dataset.from_list(TRAIN)})
    both.save_to_disk(str(tmp_path / "both"), num_shards={"train": 2, "valid": 1})
    both["train"].save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "both") == {"train": TRAIN, "validation": VALIDATION}
    assert (layout(tmp_path / "one").format, read(tmp_path / "one")) == ("save_to_disk", {"train": TRAIN})
    (tmp_path / "both" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(RowsError, match=r"train lacks data-00001-of-00002\.arrow, .*: copy or save the data set again"):
        split_names(tmp_path / "both")


def test_other_split_names_stay_and_come_last(tmp_path: Path):
    folder = write(tmp_path, {"data/ood-00000-of-00001.parquet": TEST, "data/train-00000-of-00001.parquet": TRAIN})
    assert read(folder) == {"train": TRAIN, "ood": TEST}
    document = {"ood": TEST, "train": TRAIN}
    assert split_names(write(tmp_path, {"words.json": json.dumps(document)}) / "words.json") == ["train", "ood"]


def test_a_file_that_names_no_split_beside_others_is_named_as_unused(tmp_path: Path):
    folder = write(tmp_path, {"train.jsonl": TRAIN, "meta.json": "{}"})
    assert layout(folder)._asdict() == {
        "format": "folder of jsonl",
        "splits": {"train": [folder / "train.jsonl"]},
        "unused": (folder / "meta.json",),
        "document": None,
    }


def test_a_split_may_be_asked_for_by_its_alias_and_one_that_is_not_there_lists_those_that_are(tmp_path: Path):
    folder = write(tmp_path, {"train.jsonl": TRAIN, "dev.jsonl": VALIDATION})
    assert list(read_rows(folder, "val")) == VALIDATION
    with pytest.raises(RowsError, match=r"has no split test: name one of train, validation, or add it"):
        list(read_rows(folder, "test"))


WRONG = {
    "a bad line": ({"a.jsonl": '{"a": 1}\n{"a":\n'}, r"a\.jsonl line 2 column 6 is not JSON"),
    "a bad document": ({"a.json": '[\n{"a": 1},\n{"a":\n]'}, r"a\.json line 4 column 1 is not JSON"),
    "a list for a row": ({"a.jsonl": '{"a": 1}\n[1]\n'}, r"a\.jsonl line 2 is a list: make it an object"),
    "a number for a row": ({"a.json": '{"test": [{"a": 1}, 7]}'}, r"a\.json: test row 2 is 7: make it an object"),
    "a second encoding": ({"a.jsonl": b'{"a": "x"}\n{"a": "\xe9"}'}, r"line 2: byte 0xe9 at column 8 is not UTF-8"),
    "UTF-16": ({"a.json": "[]".encode("utf-16")}, r"line 1: byte 0xff at column 1 is not UTF-8"),
    "half a character": ({"a.jsonl": '{"a": "\\ud83d"}'}, r"a\.jsonl line 1 holds half of a"),
    "deep brackets": ({"a.jsonl": "[" * 100_000}, r"line 1 has too many brackets or digits"),
    "many digits": ({"a.jsonl": '{"a": ' + "1" * 5_000 + "}"}, r"line 1 has too many brackets or digits"),
    "no split": ({"a.json": '{"input": "a"}'}, r"names no split \(its keys: input\): .*call the file \.jsonl"),
    "a split that is no list": ({"a.json": '{"train": {}, "test": []}'}, r"train is a dict: make it a list of rows"),
    "one split twice": ({"a.json": '{"val": [], "dev": []}'}, r"val and dev both mean validation"),
    "a bare value": ({"a.json": "7"}, r"a\.json holds 7"),
    "an empty file": ({"a.json": ""}, r"a\.json is empty"),
    "an empty csv": ({"a.csv": ""}, r"a\.csv line 1 is no header"),
    "a short csv line": ({"a.csv": "a,b\n1,2\n1\n"}, r"a\.csv line 3 has 1 values for 2 columns"),
    "an open csv quote": ({"a.csv": 'a,b\n"1,2\n'}, r"a\.csv line 2 is not CSV"),
    "no parquet": ({"a.parquet": b"PAR1"}, r"a\.parquet is not whole parquet .*: fetch or make it again"),
    "no arrow": ({"a.arrow": b"abc"}, r"a\.arrow is not whole arrow"),
    "another kind": ({"a.txt": "words"}, r"a\.txt is none of json, jsonl, .*: convert it, best to \.jsonl"),
    "git-lfs": ({"a.parquet": b"version https://git-lfs.github.com/spec/v1\n"}, r"pointer.*: run `git lfs pull` in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_read_says_where_and_what_to_do(name: str, tmp_path: Path):
    files, words = WRONG[name]
    with pytest.raises(RowsError, match=words):
        read(write(tmp_path, files) / next(iter(files)))


def test_gzip_that_is_cut_off_says_so(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TRAIN * 100).encode())[:-9])
    with pytest.raises(RowsError, match=r"a\.jsonl\.gz is not whole gzip .*: fetch or make it again"):
        read(tmp_path / "a.jsonl.gz")


WRONG_FOLDERS = {
    "two files of one split": (
        ["train.json", "train.jsonl"],
        r"train\.json and \S*train\.jsonl both claim to be train",
    ),
    "two of one kind": (["a_train.json", "b_train.json"], r"a_train\.json and \S*b_train\.json both claim to be train"),
    "two data sets": (["words_4L.csv", "words_5L.json"], r"words_4L\.csv and \S*words_5L\.json both claim to be train"),
    "a lost shard": (
        ["train-00000-of-00003.json", "train-00002-of-00003.json"],
        r"holds 2 of 3 shards of train: fetch",
    ),
    "two splits in a name": (["train_test.json", "test.json"], r"train_test\.json names two splits: call it test or"),
    "nothing": (["README.md"], r"holds no rows: name a file, or a folder"),
}


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_a_folder_that_means_two_things_is_refused_by_the_names_of_its_files(name: str, tmp_path: Path):
    files, words = WRONG_FOLDERS[name]
    with pytest.raises(RowsError, match=words):
        split_names(write(tmp_path, dict.fromkeys(files, "[]")))


def test_the_object_of_splits_is_refused_as_one_split_of_a_folder(tmp_path: Path):
    folder = write(tmp_path, {"train.json": '{"train": [], "test": []}', "test.json": TEST})
    with pytest.raises(RowsError, match=r"train\.json is one object: make it a list of rows"):
        read(folder)


def test_a_path_that_is_not_there_or_cannot_be_says_so(tmp_path: Path):
    for path in (tmp_path / "words.json", tmp_path / ("x" * 5_000)):
        with pytest.raises(RowsError, match=r"is not there|cannot be read"):
            split_names(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, {"a.parquet": TRAIN}) / "a.parquet"
    real = builtins.__import__

    def without_pyarrow(name: str, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(RowsError, match=r"needs pyarrow to be read: pip install 'chiplog\[run\]'"):
        read(path)


def test_the_hash_of_a_file_is_sha256sum_s(tmp_path: Path):
    path = write(tmp_path, {"words.jsonl": TRAIN}) / "words.jsonl"
    assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_hash_of_a_folder_is_that_of_names_and_contents_of_its_rows(tmp_path: Path):
    files = {"train.jsonl": TRAIN, "test.jsonl": TEST}
    same = [write(tmp_path / "a", files), write(tmp_path / "b", files | {"README.md": "words"})]
    other = [
        write(tmp_path / "c", files | {"test.jsonl": TRAIN}),
        write(tmp_path / "d", {"train.jsonl": TRAIN, "validation.jsonl": TEST}),
    ]
    assert file_hash(same[0]) == file_hash(same[1])
    assert len({file_hash(folder) for folder in (*same, *other)}) == 3


KINDS = ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet", "a.arrow"]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_it_raise_anything_but_its_own_error(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    try:
        for rows in read(tmp_path / name).values():
            assert all(isinstance(row, dict) for row in rows)
    except RowsError as error:
        assert name in str(error)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), keep=st.floats(0, 1))
def test_one_changed_byte_or_a_cut_in_a_whole_file_makes_no_other_error(
    name: str, at: float, byte: int, keep: float, tmp_path: Path
):
    whole = bytearray(binary(tmp_path / name))
    whole[int(at * len(whole))] = byte
    (tmp_path / name).write_bytes(whole[: int(keep * len(whole)) + 1] if keep < 0.3 else whole)
    try:
        read(tmp_path / name)
    except RowsError as error:
        assert name in str(error)


def binary(file: Path) -> bytes:
    """A whole file of TRAIN, in the kind that its name says."""
    if file.suffix == ".arrow":
        table = pa.Table.from_pylist(TRAIN)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    else:
        write(file.parent, {file.name: TRAIN})
    return file.read_bytes()
