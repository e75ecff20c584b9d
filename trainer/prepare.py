"""Makes token files of text: a folder that `trainer.train` reads.

    python -m trainer.prepare --text FILE_OR_FOLDER ... --out DIR [--tokenizer bytes]
    python -m trainer.prepare --dataset NAME_OR_FOLDER --column text --out DIR    by Hugging Face's datasets

A tokenizer is `bytes` (256 and an end), `bpe:N` (byte-level BPE of N entries, learnt from the training text), or the
path of a tokenizer.json. Documents are put in an order of the seed's and end with a token of their own; the last ones
are the validation. The same text and options give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

# isort: split
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.job import UserError
from trainer.tokens import META

END = "<|end|>"
LARGEST = 1 << 20  # entries of a vocabulary to learn: more is a slip


def main() -> int:
    """Exit code 0, when the folder is there."""
    parser = argparse.ArgumentParser(description="Makes token files of text.", allow_abbrev=False)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files, or folders of files")
    parser.add_argument("--suffix", default=".txt", help="of the files in a folder")
    parser.add_argument("--dataset", help="instead of --text: a data set on the hub, or a folder, for its train split")
    parser.add_argument("--column", default="text", help="of the data set")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, bpe:N or the path of a tokenizer.json")
    parser.add_argument("--validation", type=float, default=0.05, help="share of the documents to validate on")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the documents")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; must not be there")
    arguments = parser.parse_args()
    if bool(arguments.text) == bool(arguments.dataset):
        raise UserError("give --text or --dataset, one of them")
    if arguments.dataset:
        documents = from_dataset(arguments.dataset, arguments.column)
    else:
        documents = from_files(arguments.text, arguments.suffix)
    about = prepare(documents, arguments.out, arguments.tokenizer, arguments.validation, arguments.seed)
    empty = sum(not text for text in documents)
    said = {"path": str(arguments.out), "rows": about["tokens"], "sha256": about["sha256"]["train"]}
    print(json.dumps(said | {"empty_documents": empty}))
    return 0


def from_files(places: Iterable[Path], suffix: str) -> list[str]:
    """The text of each file, in the order of their names. Raises UserError for one that is not there or no file."""
    files: list[Path] = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place} is not there: give files, or folders that hold {suffix} files")
        files += sorted(place.rglob(f"*{suffix}")) if place.is_dir() else [place]
    return [_text(file) for file in files]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} of {file} is {error.object[error.start]:#x}, which is no UTF-8"
        raise UserError(f"{wrong}: convert the file (iconv -t UTF-8), or take it away") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): make it a file of text, or take it away") from error


def from_dataset(name: str, column: str) -> list[str]:
    """The texts of a column of a data set's training split, "" for a null. Raises UserError where there is none."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "give a data set on the hub, or a folder of its files"
        raise UserError(f"--dataset {name} cannot be loaded ({said}): {advice}") from error
    if column not in rows.column_names:
        raise UserError(f"{name} has no column {column!r}, it has {', '.join(rows.column_names)}: give --column")
    texts: list[str] = []
    for number, text in enumerate(rows[column], 1):
        if text is not None and not isinstance(text, str):
            raise UserError(f"{name}: {column} of row {number} is {text!r:.80}, no text: mend it, or give --column")
        texts.append(text or "")
    return texts


def prepare(documents: list[str], out: Path, tokenizer: str, validation: float, seed: int) -> dict:
    """Writes the folder, whole or not at all, and returns what meta.json holds. Raises UserError."""
    if os.path.lexists(out):
        raise UserError(f"{out} is there already: remove it, or give another --out")
    if not 0 <= validation < 1:
        raise UserError(f"--validation is {validation}: give a share of at least 0 and below 1")
    documents = [text for text in documents if text]
    n_validation = max(1, round(len(documents) * validation))
    if len(documents) <= n_validation:
        raise UserError(f"{len(documents)} documents are too few to train on some and validate on others: give more")
    random.Random(seed).shuffle(documents)
    splits = {"train": documents[:-n_validation], "validation": documents[-n_validation:]}
    encoder = make_tokenizer(tokenizer, splits["train"])
    vocab_size = vocab_size_of(encoder)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    meta = {"vocab_size": vocab_size, "dtype": dtype, "tokens": {}, "sha256": {}, "tokenizer": tokenizer, "seed": seed}
    try:
        with job.whole_folder(out) as folder:
            job.write_text(folder / "tokenizer.json", encoder.to_str(pretty=True))
            for name, texts in splits.items():
                tokens = np.concatenate([np.asarray(ids, dtype=dtype) for ids in _encoded(texts, encoder)])
                tokens.tofile(folder / f"{name}.bin")
                meta["tokens"][name] = len(tokens)
                meta["sha256"][name] = hashlib.sha256(tokens.tobytes()).hexdigest()
            job.write_json(folder / META, meta)
    except OSError as error:
        raise job.cannot("written", out, error) from error
    return meta


def vocab_size_of(encoder: Tokenizer) -> int:
    """One more than its highest token: a tokenizer.json may leave some out."""
    return 1 + max(encoder.get_vocab().values(), default=-1)


def make_tokenizer(kind: str, texts: list[str]) -> Tokenizer:
    """The tokenizer that `--tokenizer` means; it knows END. Raises UserError."""
    if kind != "bytes" and not kind.startswith("bpe:"):
        if not Path(kind).is_file():
            raise UserError(f"--tokenizer {kind} is no file: give bytes, bpe:N or the path of a tokenizer.json")
        encoder = read_tokenizer(Path(kind))
        encoder.add_special_tokens([END])
        encoder.no_truncation()  # such a file may ask for either, and text would be lost without a word
        encoder.no_padding()
        return encoder
    is_number = kind[4:].isdecimal() and len(kind) < 20  # int() refuses one of thousands of digits
    size = 257 if kind == "bytes" else int(kind[4:]) if is_number else 0
    if not 257 <= size <= LARGEST:
        raise UserError(
            f"--tokenizer {kind}: give bpe:N with N of at least 257, the bytes and the end, and at most {LARGEST}"
        )
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    encoder.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)  # pyright: ignore
    encoder.train_from_iterator([] if kind == "bytes" else texts, learner)
    return encoder


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises UserError for a file that is none."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no narrower one
        raise UserError(
            f"{file} cannot be read ({error}): give a tokenizer.json of Hugging Face's tokenizers"
        ) from error


def _encoded(texts: list[str], encoder: Tokenizer) -> Iterator[list[int]]:
    encoder.encode_special_tokens = True  # what the text says is text
    end = encoder.token_to_id(END)
    assert end is not None, "make_tokenizer adds it"
    for first in range(0, len(texts), 256):
        for encoding in encoder.encode_batch(texts[first : first + 256], add_special_tokens=False):
            ids = encoding.ids
            if end in ids:  # of a vocabulary that has it as a word
                raise UserError(
                    f"a document says {END}, which ends documents: take it out, or give another --tokenizer"
                )
            yield [*ids, end]


if __name__ == "__main__":
    job.run(main)
