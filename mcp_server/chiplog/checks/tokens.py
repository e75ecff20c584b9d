"""Whether a folder of token files can be trained on: what `trainer/prepare.py` writes and `trainer/tokens.py` reads.

Failed: no meta.json, or one that cannot be read; no train or validation split; a file that is missing, of another size
or of other bytes than meta.json says; a token beyond the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from chiplog.checks import Check, Report, all_ok, failed, passed
from chiplog.checks.lookup import missing_dataset
from chiplog.schema import Frozen, Progress, plain_errors

META = "meta.json"
SPLITS = ("train", "validation")
ANEW = "make the folder anew: python -m trainer.prepare --text FILES --out FOLDER"
BLOCK = 1 << 24  # bytes that are read at once: whole tokens of either size

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]  # it becomes that of a file


class TokensReport(Report):
    """What `check_dataset` found in a folder of token files."""

    path: Path = Field(description="Folder.")
    format: Literal["tokens"] = Field(default="tokens", description="Token files.")
    bytes: int | None = Field(description="Bytes of all token files; null where they cannot be read.")
    sha256: str | None = Field(description="Hash of names and contents of meta.json and the token files.")
    vocab_size: int | None = Field(description="Entries of the vocabulary.")
    tokens: dict[str, int] = Field(description="Tokens of each split.")


class Meta(Frozen):
    """What `meta.json` must say."""

    model_config = ConfigDict(extra="ignore", strict=True)

    vocab_size: int = Field(ge=1, description="Entries of the vocabulary.")
    dtype: Literal["<u2", "<u4"] = Field(description="How a token is stored.")
    tokens: dict[Name, Annotated[int, Field(ge=0)]] = Field(description="Tokens of each split.")
    sha256: dict[Name, str] = Field(description="Hash of each split's file.")


class Contents(NamedTuple):
    """A token file, read once."""

    sha256: str
    largest: int  # token; -1 of none


def is_token_folder(path: Path) -> bool:
    """Whether it looks like one, whole or not."""
    return (path / "train.bin").is_file()


def tokens_hash(folder: Path) -> str:
    """The hash of a whole folder, as a report has it. Raises OSError, or ValueError for a meta.json that is none."""
    found = {}
    for file in _files(folder, _meta(folder)):
        with file.open("rb") as data:
            found[file.name] = hashlib.file_digest(data, "sha256").hexdigest()
    return _hash(folder, found)


def check_tokens(folder: Path, progress: Progress | None = None) -> TokensReport:
    """Reads all of it, once. What is wrong stands in the report; raises NotFoundError where there is no `folder`."""
    if not folder.exists():
        raise missing_dataset(folder, [folder.parent])
    try:
        meta = _meta(folder)
    except (OSError, ValueError) as error:
        words = " ".join((plain_errors(error) if isinstance(error, ValidationError) else str(error)).split())
        check = failed(META, f"{folder} is no folder of token files: {words}", ANEW)
        return TokensReport(ok=False, checks=[check], path=folder, bytes=None, sha256=None, vocab_size=None, tokens={})
    checks, read = list(_sizes(folder, meta)), {}
    if all_ok(checks):
        for file in _files(folder, meta):
            read[file.name] = _read(file, meta.dtype)
            if progress:
                progress(len(read), len(meta.tokens), f"{file.name} is read")
        checks += [*_contents(meta, read), passed("tokens", _words(meta))]
    return TokensReport(
        ok=all_ok(checks),
        checks=checks,
        path=folder,
        bytes=sum(file.stat().st_size for file in _files(folder, meta) if file.is_file()),
        sha256=_hash(folder, {name: found.sha256 for name, found in read.items()}) if read else None,
        vocab_size=meta.vocab_size,
        tokens=dict(meta.tokens),
    )


def _meta(folder: Path) -> Meta:
    return Meta.model_validate_json((folder / META).read_bytes())


def _files(folder: Path, meta: Meta) -> list[Path]:
    return [folder / f"{name}.bin" for name in sorted(meta.tokens)]


def _sizes(folder: Path, meta: Meta) -> Iterator[Check]:
    """What is to be seen without reading the tokens."""
    if missing := [name for name in SPLITS if not meta.tokens.get(name)]:
        yield failed("splits", f"no tokens of {' and '.join(missing)}", "prepare more text, of which some validates")
    width = int(meta.dtype[-1])
    if meta.vocab_size > 1 << 8 * width:
        yield failed("vocabulary", f"{meta.vocab_size:,} entries do not fit into {8 * width} bits", ANEW)
    for file in _files(folder, meta):
        n = meta.tokens[file.stem]
        there = file.stat().st_size if file.is_file() else 0
        if there != n * width:
            yield failed(file.name, f"it has {there:,} bytes and {META} says {n:,} tokens of {width} bytes", ANEW)


def _contents(meta: Meta, read: dict[str, Contents]) -> Iterator[Check]:
    for name, found in read.items():
        if found.sha256 != meta.sha256.get(name.removesuffix(".bin")):
            yield failed(name, f"its contents are not those whose hash {META} has", ANEW)
        if found.largest >= meta.vocab_size:
            beyond = f"token {found.largest:,} is beyond the vocabulary of {meta.vocab_size:,} entries"
            yield failed(name, beyond, ANEW)


def _words(meta: Meta) -> str:
    return ", ".join(f"{n:,} of {name}" for name, n in meta.tokens.items()) + f"; vocabulary {meta.vocab_size:,}"


def _read(file: Path, dtype: str) -> Contents:
    import numpy as np  # takes a while

    digest, largest = hashlib.sha256(), -1
    with file.open("rb") as data:
        while block := data.read(BLOCK):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype).max()))
    return Contents(digest.hexdigest(), largest)


def _hash(folder: Path, hashes: dict[str, str]) -> str:
    """Of the hashes of its files, by their names."""
    parts = {META: hashlib.sha256((folder / META).read_bytes()).hexdigest(), **hashes}
    return hashlib.sha256("".join(f"{name}\0{parts[name]}\0" for name in sorted(parts)).encode()).hexdigest()
