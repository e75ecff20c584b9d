"""Whether a data set can be trained on and scored: its rows, their shape, what repeats, what they cost in tokens.

Failed:
- a file, line or row that cannot be read; rows of an unknown shape, or of two shapes
- a row without content or with an empty answer (it teaches silence, or is scored against it)
- the same content in two splits (a score on it is memory)
- a split without rows; tokens that the named model cannot count
Warning:
- no split to train on, or none to score on; a data file that names no split; only the first `limit` rows read
- the same content twice in a split; one input with two answers; a sample longer than the model's context

Two rows have the same content if a model sees the same: their messages are compared, not their other columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from chiplog.checks import Check, Report, Words, all_ok, failed, passed, warning
from chiplog.checks.lookup import missing_dataset
from chiplog.checks.model_files import BadFile, read_config
from chiplog.checks.row_index import Comparison, RowIndex
from chiplog.checks.samples import Samples, Tally, TokenCounts, read_samples
from chiplog.schema import Frozen, Progress
from chiplog.trainer_files import load_trainer_file

PROGRESS_ROWS = 1_000


class SplitReport(Frozen):
    """One split of a data set."""

    rows: int = Field(description="Rows read.")
    columns: list[Words] = Field(description="Columns that any row has (at most 100), in order of appearance.")
    empty: int = Field(description="Rows without content or with an empty answer.")
    duplicates: int = Field(description="Rows with the content of an earlier row of this split.")
    tokens: TokenCounts | None = Field(description="Tokens; null where no model was named, or it could not count.")


class DatasetReport(Report):
    """What `check_dataset` found."""

    path: Path = Field(description="File or folder.")
    format: str | None = Field(description="Such as json, jsonl.gz, folder of parquet, save_to_disk; null: unreadable.")
    bytes: int | None = Field(description="Bytes of all files that hold rows; null where they are not known.")
    sha256: str | None = Field(description="Hash of the file, or of names and contents of a folder's data files.")
    shape: Literal["chat", "instruct", "text", "mixed"] | None = Field(description="Shape of the rows; null: unknown.")
    splits: dict[Words, SplitReport] = Field(description="Splits by name: train, validation, test, then others.")


def check_dataset(
    path: Path,
    *,
    model: Path | None = None,
    system_prompt: str | None = None,
    prompt: str = "{input}",
    limit: int | None = None,
    progress: Progress | None = None,
) -> DatasetReport:
    """Reads every row, or the first `limit` of each split; counts tokens where a model folder is given.

    What is wrong with the data stands in the report. Raises NotFoundError where there is no `path`.
    """
    if not path.exists():
        raise missing_dataset(path, [path.parent])
    rows = load_trainer_file("rows")
    try:
        layout, sha256 = rows.layout(path), rows.file_hash(path)
    except rows.RowsError as error:
        return _unreadable(path, failed("reading", error.found, error.mend))
    count, no_tokenizer = _counter(model, system_prompt, prompt)
    splits: dict[str, Samples] = {}
    with RowIndex() as index:
        for split in layout.splits:
            read = _told(rows.read_rows(path, split), split, sum(each.rows for each in splits.values()), progress)
            splits[split] = read_samples(read, split, index, count, limit)
        compared = index.compare()
    checks = [
        *_reading(splits, layout.unused),
        *_rows(splits),
        *_comparison(compared, splits),
        *_roles(splits),
        *(_tokens(splits, model, no_tokenizer) if model else []),
    ]
    shapes = {shape for split in splits.values() for shape in split.shapes}
    repeats = {pair.later.split: pair.n for pair in compared.repeats}
    return DatasetReport(
        ok=all_ok(checks),
        checks=checks,
        path=path,
        format=layout.format,
        bytes=sum(file.stat().st_size for file in layout.files),
        sha256=sha256,
        shape="mixed" if len(shapes) > 1 else next(iter(shapes), None),  # pyright: ignore[reportArgumentType]
        splits={name: _split_report(split, repeats.get(name, 0)) for name, split in splits.items()},
    )


def _unreadable(path: Path, check: Check) -> DatasetReport:
    return DatasetReport(
        ok=False, checks=[check], path=path, format=None, bytes=None, sha256=None, shape=None, splits={}
    )


def _counter(
    model: Path | None, system_prompt: str | None, prompt: str
) -> tuple[Callable[..., Any] | None, str | None]:
    """What makes a row's token ids; or None, and why there is none."""
    if model is None:
        return None, None
    try:
        tokenizer = load_trainer_file("chat").ChatTokenizer(model)
    except Exception as error:  # ChatError, or whatever a broken tokenizer makes of itself
        return None, str(error)
    return lambda row: tokenizer.row_example(row, system_prompt, prompt), None


def _told(rows: Iterator[Any], split: str, before: int, progress: Progress | None) -> Iterator[Any]:
    """The rows, with a word to `progress` at every thousandth."""
    for number, row in enumerate(rows, 1):
        if progress and number % PROGRESS_ROWS == 0:
            progress(before + number, None, f"{split}: {number:,} rows")
        yield row


def _split_report(split: Samples, duplicates: int) -> SplitReport:
    return SplitReport(
        rows=split.rows,
        columns=list(split.columns),
        empty=split.empty.n,
        duplicates=duplicates,
        tokens=split.tokens,
    )


def _reading(splits: dict[str, Samples], unused: tuple[Path, ...]) -> Iterator[Check]:
    broken = [split.unreadable for split in splits.values() if split.unreadable]
    cut = [f"{split.rows:,} rows of {name}" for name, split in splits.items() if split.cut]
    yield from (failed("reading", error.found, error.mend) for error in broken)
    if cut:
        yield warning("reading", f"only the first {' and '.join(cut)} were read", "check without a limit before a run")
    if not broken and not cut:
        yield passed("reading", ", ".join(f"{split.rows:,} rows of {name}" for name, split in splits.items()))
    if unused:
        found = f"{len(unused):,} files name no split and are not read: {', '.join(file.name for file in unused[:5])}"
        yield warning("files", found, "begin their names with train, validation or test, or move them away")


def _rows(splits: dict[str, Samples]) -> Iterator[Check]:
    unusable, empty = ([getattr(split, kind) for split in splits.values()] for kind in ("unusable", "empty"))
    firsts: dict[str, Any] = {}
    for split in splits.values():
        firsts = split.shapes | firsts
    if n := sum(tally.n for tally in unusable):
        found = f"{n:,} rows cannot be used, the first is {_first(unusable)}"
        yield failed("shape", found, "rename or mend their columns, or leave these rows out")
    elif len(firsts) > 1:
        found = " and ".join(f"{shape} from {place}" for shape, place in firsts.items())
        yield failed("shape", found, "write all rows in one shape")
    elif firsts:
        yield passed("shape", f"{next(iter(firsts))}, in all rows")
    if n := sum(tally.n for tally in empty):
        found = f"{n:,} rows have no content or an empty answer, the first is {_first(empty)}"
        yield failed("empty rows", found, "leave them out, or fill in what is missing")
    elif firsts:
        yield passed("empty rows", "none")


def _first(tallies: list[Tally]) -> str:
    return next(tally.first for tally in tallies if tally.n)


def _comparison(compared: Comparison, splits: dict[str, Samples]) -> Iterator[Check]:
    for pair in compared.repeats:
        found = f"{pair.n:,} rows of {pair.later.split} repeat an earlier one: {pair.later} is {pair.earlier}"
        yield warning("duplicates", found, "leave them out, unless they are meant to weigh more")
    for pair in compared.leaks:
        found = f"{pair.n:,} rows of {pair.later.split} are in {pair.earlier.split} too: {pair.later} is {pair.earlier}"
        yield failed("leaks", found, "keep each in one split only")
    if pair := compared.two_answers:
        found = f"{pair.n:,} inputs have more than one answer: {pair.earlier} and {pair.later} ask the same"
        yield warning("answers", found, "keep one, unless several are right")
    if not any(split.shapes for split in splits.values()):
        return
    if not compared.repeats:
        yield passed("duplicates", "none")
    if not compared.leaks:
        yield passed("leaks", "none")
    if not compared.two_answers and not all("text" in split.shapes for split in splits.values()):
        yield passed("answers", "one for each input")


def _roles(splits: dict[str, Samples]) -> Iterator[Check]:
    there = ", ".join(splits) or "none"
    if hollow := [name for name, split in splits.items() if not split.rows and not split.unreadable]:
        yield failed("splits", f"no rows in {' and '.join(hollow)}", "put some there, or leave the split out")
    elif "train" not in splits:
        yield warning("splits", f"no split to train on, only {there}", "call one train, unless it is for scoring alone")
    elif len(splits) == 1:
        yield warning("splits", "no split to score on, only train", "keep some rows for one called validation or test")
    else:
        yield passed("splits", there)


def _tokens(splits: dict[str, Samples], model: Path, no_tokenizer: str | None) -> Iterator[Check]:
    refused = [split.uncounted for split in splits.values() if split.uncounted.n]
    if no_tokenizer or refused:
        found = no_tokenizer or _first(refused)
        yield failed("tokens", found, f"mend that, or name another model than {model.name}")
        return
    counts = [split.tokens for split in splits.values() if split.tokens]
    if not counts:
        return
    longest, context = max(count.max for count in counts), _context_length(model)
    if context and longest > context:
        found = f"the longest sample has {longest:,} tokens, the context of {model.name} {context:,}"
        yield warning("tokens", found, "leave out what is longer, or it is cut")
        return
    about = "about " if any(count.sampled for count in counts) else ""
    yield passed("tokens", f"{about}{sum(count.total for count in counts):,} in all, at most {longest:,} a sample")


def _context_length(model: Path) -> int | None:
    try:
        return read_config(model).context_length
    except BadFile:
        return None  # check_model's to say
