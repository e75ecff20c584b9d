"""The rows of a data set on disk, split by split.

A data set is one of
    words.json    one object of splits, {"train": [...], "validation": [...], "test": [...]}, or one list of rows
    train.jsonl   one row a line; .csv with a header; .parquet; .arrow
    folder/       such files, the split in each name or in its folder's: train.json, data/test-00000-of-00002.parquet
    folder/       as `datasets` writes it with save_to_disk
JSON, JSONL and CSV may be gzipped. val, valid, dev and eval mean validation; what names no split is train. Files of a
split whose names differ in their numbers only are its shards, joined in the order of their names. A .json file is
read whole, everything else row by row.

Standard library, and pyarrow where a file is parquet or arrow. The recipe and the evaluation import this file; the
planner loads it by its path.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

Row = dict[str, Any]

SPLITS = ("train", "validation", "test")
ALIASES = {**{name: name for name in SPLITS}, **dict.fromkeys(("val", "valid", "dev", "eval"), "validation")}
KINDS = ("json", "jsonl", "ndjson", "csv", "parquet", "arrow")
LFS_POINTER = b"version https://git-lfs"
MAX_FILES = 10_000

_FOLDER_DEPTH = 4
_BATCH_ROWS = 1_000
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SHARD = re.compile(r"[-_.]\d+-of-(\d+)$")


class RowsError(ValueError):
    """Data that cannot be read: what was `found`, with its file and line or row, and how to `mend` it."""

    def __init__(self, found: str, mend: str):
        super().__init__(f"{found}: {mend}")
        self.found, self.mend = found, mend


class Layout(NamedTuple):
    """Which files of a data set hold which split."""

    format: str  # such as json, jsonl.gz, folder of parquet, save_to_disk
    splits: dict[str, list[Path]]  # train, validation, test, then others
    unused: tuple[Path, ...] = ()  # data files that name no split, beside others that do
    document: dict[str, list[Any]] | None = None  # the rows themselves, where one .json file holds all of them

    @property
    def files(self) -> list[Path]:
        """Every file that is read, once."""
        return sorted({file for files in self.splits.values() for file in files})


def split_names(path: Path) -> list[str]:
    """The splits that are there: train, validation, test, then others. Raises RowsError."""
    return list(layout(path).splits)


def read_rows(path: Path, split: str) -> Iterator[Row]:
    """The rows of a split in their order. Raises RowsError where it is not there, and at a row that cannot be read."""
    found, name = layout(path), _canonical(split)
    if name not in found.splits:
        raise RowsError(f"{path} has no split {split}", f"name one of {', '.join(found.splits)}, or add it")
    if found.document is not None:
        yield from _objects(found.document[name], f"{path}: {name} row")
    else:
        for file in found.splits[name]:
            yield from _rows_of(file)


def file_hash(path: Path) -> str:
    """sha256 as hex: of a file, the one `sha256sum` prints; of a folder, over name, size and content of what is read.

    Raises RowsError.
    """
    digest = hashlib.sha256()
    for file in layout(path).files if path.is_dir() else [path]:
        with _opened(file, unzip=False) as data:
            if path.is_dir():
                digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
            while block := data.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def layout(path: Path) -> Layout:
    """Finds the splits and their files. Raises RowsError where there are none, or where two files claim one split."""
    try:
        if path.is_dir():
            return _saved_folder(path) or _folder(path)
        if path.is_file():
            return _lone_file(path)
    except OSError as error:
        raise RowsError(f"{path} cannot be read ({error.strerror})", "mend that, then try again") from error
    raise RowsError(f"{path} is not there", "name a file or a folder of rows")


# Which files hold which split


def _lone_file(file: Path) -> Layout:
    kind = kind_of(file)
    if kind is None:
        raise RowsError(f"{file} is none of {', '.join(KINDS)}", "convert it, best to .jsonl")
    document = _document(file) if kind == "json" else None
    splits: dict[str, Any] = {_split_of(file.name) or "train": document}
    if isinstance(document, dict):
        splits = _splits_in(document, file)
    shown = f"{kind}.gz" if file.suffix == ".gz" else kind
    return Layout(shown, {name: [file] for name in splits}, document=None if document is None else splits)


def _splits_in(document: dict[str, Any], file: Path) -> dict[str, list[Any]]:
    """The lists in a document, and whatever is called as a split is; anything else describes them."""
    named = {name: rows for name, rows in document.items() if isinstance(rows, list) or name.lower() in ALIASES}
    for name, rows in named.items():
        if not isinstance(rows, list):
            raise RowsError(f"{file}: {name} is {_shown(rows)}", "make it a list of rows")
    if not any(name.lower() in ALIASES for name in named):
        keys = ", ".join(list(document)[:8]) or "none"
        advice = "call its lists of rows train, validation and test; if it is one row a line, call the file .jsonl"
        raise RowsError(f"{file} is one object that names no split (its keys: {keys:.200})", advice)
    return _by_split(named, file)


def _folder(folder: Path) -> Layout:
    files = _data_files(folder)
    named: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        split = _split_of(*reversed(file.relative_to(folder).parts))
        (named.setdefault(split, []) if split else unnamed).append(file)
    if len(files) == 1 and (not named or files[0].parent == folder):
        return _lone_file(files[0])
    if named:  # the hub's names: beside train-00000-of-00002, ood-00000-of-00001 is a split called ood
        for file in [file for file in unnamed if _SHARD.search(_stem(file.name))]:
            named.setdefault(_SHARD.sub("", _stem(file.name)), []).append(file)
            unnamed.remove(file)
    else:
        named, unnamed = {"train": unnamed}, []
    for split, shards in named.items():
        _check_shards(shards, split)
    kinds = sorted({str(kind_of(file)) for shards in named.values() for file in shards})
    return Layout(f"folder of {' and '.join(kinds)}", _ordered(named), tuple(unnamed))


def _data_files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        deep = len(Path(parent).relative_to(folder).parts) >= _FOLDER_DEPTH
        folders[:] = [] if deep else [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name) for name in names if kind_of(Path(name)) and not name.startswith((".", *_NOT_ROWS))
        ]
        if len(found) > MAX_FILES:
            raise RowsError(f"{folder} holds more than {MAX_FILES:,} data files", "name one data set in it")
    if not found:
        raise RowsError(f"{folder} holds no rows", f"name a file, or a folder of files, in one of {', '.join(KINDS)}")
    return sorted(found)


def _check_shards(files: list[Path], split: str) -> None:
    """Refuses files that claim one split and are no shards of each other, and shards of which one is missing."""
    first = files[0]
    in_own_folder = _canonical(first.parent.name) == split
    for file in files:
        alike = in_own_folder or re.sub(r"\d+", "#", file.name) == re.sub(r"\d+", "#", first.name)
        if file.parent != first.parent or not alike or kind_of(file) != kind_of(first):
            raise RowsError(
                f"{first} and {file} both claim to be {split}", f"keep one, or call them {split}-0, {split}-1"
            )
        if (shard := _SHARD.search(_stem(file.name))) and int(shard[1]) != len(files):
            raise RowsError(
                f"{file.parent} holds {len(files)} of {int(shard[1])} shards of {split}", "fetch all of them"
            )


def _saved_folder(folder: Path) -> Layout | None:
    """What `save_to_disk` wrote, one split or several; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        names = _listed(folder / "dataset_dict.json", "splits")
        return Layout("save_to_disk", _by_split({name: _saved_split(folder / name) for name in names}, folder))
    if (folder / "state.json").is_file():
        return Layout("save_to_disk", {_split_of(folder.name) or "train": _saved_split(folder)})
    return None


def _saved_split(folder: Path) -> list[Path]:
    files = [folder / Path(name).name for name in _listed(folder / "state.json", "_data_files")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise RowsError(f"{folder} lacks {missing[0]}, which its state.json names", "copy or save the data set again")
    return files


def _listed(file: Path, key: str) -> list[str]:
    """The names that a file of `save_to_disk` lists under `key`."""
    about = _document(file) if file.is_file() else None
    entries = about.get(key) if isinstance(about, dict) else None
    names = [e.get("filename") if isinstance(e, dict) else e for e in entries] if isinstance(entries, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise RowsError(f"{file} does not list {key} as `datasets` writes them", "save the data set again")
    return [str(name) for name in names]


def kind_of(file: Path) -> str | None:
    """json, jsonl, csv, parquet or arrow, from the name; None where it is none of them."""
    name = file.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix[1:]
    zipped_inside = kind in ("parquet", "arrow") and name.endswith(".gz")
    return None if kind not in KINDS or zipped_inside else kind.replace("ndjson", "jsonl")


def _stem(name: str) -> str:
    return Path(name.removesuffix(".gz")).stem


def _split_of(name: str, *folders: str) -> str | None:
    """The split that begins or ends a file's name, shard numbers aside; else the one its nearest folder is called."""
    words = re.split(r"[-_.]", re.sub(r"[-_.]\d+$", "", _SHARD.sub("", _stem(name).lower())))
    splits = {ALIASES[word] for word in (words[0], words[-1]) if word in ALIASES}
    if len(splits) > 1:
        raise RowsError(f"{name} names two splits", f"call it {' or '.join(sorted(splits))} alone")
    return next(iter(splits), None) or next((ALIASES[f.lower()] for f in folders if f.lower() in ALIASES), None)


def _canonical(split: str) -> str:
    return ALIASES.get(split.lower(), split)


def _by_split(named: dict[str, Any], source: Path) -> dict[str, Any]:
    """`named` with each alias under the name that it stands for."""
    names: dict[str, str] = {}
    for name in named:
        if (other := names.setdefault(_canonical(name), name)) != name:
            raise RowsError(f"{source}: {other} and {name} both mean {_canonical(name)}", "join them, or rename one")
    return _ordered({split: named[name] for split, name in names.items()})


def _ordered(splits: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS)))


# The rows of one file


def _rows_of(file: Path) -> Iterator[Row]:
    kind = kind_of(file)
    document = _document(file) if kind == "json" else None
    if isinstance(document, dict):
        raise RowsError(f"{file} is one object", "make it a list of rows, as one split of a folder, or name it alone")
    if document is not None:
        yield from _objects(document, f"{file} row")
    elif kind == "csv":
        yield from _csv_rows(file)
    elif kind in ("parquet", "arrow"):
        yield from _arrow_rows(file)
    else:
        yield from _json_lines(file)


def _document(file: Path) -> Any:
    """The list or object that a .json file holds; None where it holds one row a line, as if it were .jsonl."""
    with _opened(file) as data:
        text = "".join(line for _, line in _lines(data, file))
    if re.match(r"\s*\{.*\}\s*\n\s*\{", text):
        return None
    if not text.strip():
        raise RowsError(f"{file} is empty", "make or fetch it again")
    document = _parse(text, str(file))
    if not isinstance(document, list | dict):
        raise RowsError(f"{file} holds {_shown(document)}", "make it a list of rows, or an object of splits")
    return document


def _json_lines(file: Path) -> Iterator[Row]:
    with _opened(file) as data:
        for number, text in _lines(data, file):
            if text.strip():
                yield _object(_parse(text.rstrip(), f"{file} line {number}"), f"{file} line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if text.count("\n") > 1 else ""
        raise RowsError(f"{where}{line} column {error.colno} is not JSON ({error.msg})", "mend it there") from error
    except UnicodeEncodeError as error:
        raise RowsError(f"{where} holds half of a \\ud83d\\ude00 pair", "write both halves, or UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RowsError(f"{where} has too many brackets or digits to be read", "make that a string") from error
    return value


def _csv_rows(file: Path) -> Iterator[Row]:
    with _opened(file) as data:
        reader = csv.reader((text for _, text in _lines(data, file)), strict=True)
        try:
            header = next(reader, [])
            if not header or len(set(header)) < len(header):
                raise RowsError(f"{file} line 1 is no header", "name each column there, once")
            for values in filter(None, reader):
                if len(values) != len(header):
                    found = f"{len(values)} values for {len(header)} columns"
                    raise RowsError(
                        f"{file} line {reader.line_num} has {found}", "mend it, with quotes round each comma"
                    )
                yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise RowsError(f"{file} line {reader.line_num} is not CSV ({error})", "mend it, or use .jsonl") from error


def _arrow_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RowsError(f"{file} needs pyarrow to be read", "pip install 'chiplog[run]'") from error
    kind = kind_of(file)
    with _opened(file, unzip=False):
        try:
            data = pa.memory_map(str(file))  # a wild length in the file then allocates nothing
            batches = pq.ParquetFile(data).iter_batches(_BATCH_ROWS) if kind == "parquet" else pa.ipc.open_stream(data)
            for batch in batches:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from batch.slice(start, _BATCH_ROWS).to_pylist()
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: text and dates
            raise RowsError(f"{file} is not whole {kind} ({error})", "fetch or make it again") from error


def _objects(values: list[Any], where: str) -> Iterator[Row]:
    return (_object(value, f"{where} {number}") for number, value in enumerate(values, 1))


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        example = '{"input": "sines", "output": "Sines"}'
        raise RowsError(f"{where} is {_shown(value)}", f"make it an object, such as {example}")
    return value


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else f"{value!r:.60}"


@contextmanager
def _opened(file: Path, *, unzip: bool = True) -> Iterator[IO[bytes]]:
    """The file's bytes, unzipped; whatever goes wrong in reading them is a RowsError."""
    try:
        _refuse_pointer(file)
        with gzip.open(file) if unzip and file.suffix.lower() == ".gz" else file.open("rb") as data:
            yield data  # pyright: ignore[reportReturnType] - gzip's file is an IO[bytes] in all but name
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RowsError(f"{file} is not whole gzip ({error})", "fetch or make it again") from error
    except OSError as error:
        raise RowsError(f"{file} cannot be read ({error.strerror})", "mend that, then try again") from error


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as data:
        if data.read(len(LFS_POINTER)) == LFS_POINTER:
            raise RowsError(f"{file} is a git-lfs pointer, not the data", f"run `git lfs pull` in {file.parent}")


def _lines(data: IO[bytes], file: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line."""
    for number, line in enumerate(data, 1):
        try:
            yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
            raise RowsError(
                f"{file} line {number}: {byte} is not UTF-8", "convert it, as `iconv -t UTF-8` does"
            ) from error
