"""Makes the words of the capitalization study: unique English words, split into train, validation and test.

    python data.py --words-len 5 --train-percent 80 --n 1000 [--seed 0] [--chat] [--out input]

Writes words_5L_80P_1000.json, or the folder words_5L_80P_1000_c of chats, and prints {"path", "rows", "sha256"}.
The same arguments give the same bytes. Words: english-words, its web2 list (Webster's Second, 1934).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from trainer import job
from trainer.job import UserError
from trainer.rows import file_hash


def main() -> int:
    """Exit code 0, when the data are there."""
    parser = argparse.ArgumentParser(description="Makes the words of the capitalization study.", allow_abbrev=False)
    parser.add_argument("--words-len", type=int, required=True, help="letters of each word")
    parser.add_argument("--train-percent", type=int, required=True, help="share of the words to train on, in %%")
    parser.add_argument("--n", type=int, required=True, help="words in all")
    parser.add_argument("--seed", type=int, default=0, help="which words, and in which order")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=False, help="rows as chats")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "input", help="folder to write to")
    arguments = parser.parse_args()
    splits = make_splits(arguments.words_len, arguments.train_percent, arguments.n, arguments.seed)
    name = f"words_{arguments.words_len}L_{arguments.train_percent}P_{arguments.n}"
    path = write_splits(splits, arguments.out / name, arguments.chat)
    rows = {split: len(words) for split, words in splits.items()}
    print(json.dumps({"path": str(path), "rows": rows, "sha256": file_hash(path)}))
    return 0


def make_splits(words_len: int, train_percent: int, n: int, seed: int) -> dict[str, list[str]]:
    """Lower-case words, no word twice. Raises UserError when there are too few, or a split would be empty."""
    try:
        from english_words import get_english_words_set
    except ImportError as error:
        raise UserError("the package english-words is not installed: pip install english-words") from error
    words = sorted(w for w in get_english_words_set(["web2"], alpha=True, lower=True) if len(w) == words_len)
    if n > len(words):
        raise UserError(f"there are {len(words)} words of {words_len} letters, fewer than {n}: ask for fewer")
    n_train = n * train_percent // 100
    n_validation = (n - n_train) // 2
    if min(n_train, n_validation) < 1:
        raise UserError(f"{train_percent} % of {n} words leaves a split empty: ask for more words or another share")
    drawn = random.Random(seed).sample(words, n)
    return {
        "train": drawn[:n_train],
        "validation": drawn[n_train : n_train + n_validation],
        "test": drawn[n_train + n_validation :],
    }


def write_splits(splits: dict[str, list[str]], stem: Path, chat: bool) -> Path:
    """Writes `stem`.json, or the folder `stem`_c, whole. Raises UserError when it is there with other content."""
    if chat:
        path = stem.with_name(f"{stem.name}_c")
        texts = {path / f"{split}.json": _dump([_chat(word) for word in words]) for split, words in splits.items()}
    else:
        path = stem.with_name(f"{stem.name}.json")
        texts = {path: _dump({split: [_pair(word) for word in words] for split, words in splits.items()})}
    if path.exists():
        if any(not file.is_file() or file.read_text(encoding="utf-8") != text for file, text in texts.items()):
            raise UserError(
                f"{path} is there with other content, of another seed perhaps: remove it or give another --out"
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if chat:
        with job.whole_folder(path) as folder:
            for file, text in texts.items():
                (folder / file.name).write_text(text, encoding="utf-8")
    else:
        job.write_text(path, texts[path])
    return path


def _pair(word: str) -> dict[str, str]:
    return {"input": word, "output": word.capitalize()}


def _chat(word: str) -> dict[str, list[dict[str, str]]]:
    asked, answer = {"role": "user", "content": word}, {"role": "assistant", "content": word.capitalize()}
    return {"messages": [asked, answer]}


def _dump(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


if __name__ == "__main__":
    job.run(main)
