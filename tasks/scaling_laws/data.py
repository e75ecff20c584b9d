"""Makes token files of real text: the sources of Python's own standard library, tests and third-party code left out.

    python data.py [--tokenizer bytes] [--files N] [--seed 0] [--out input]

Writes the folder stdlib_bytes, stdlib_bpe4096 and so on, as `python -m trainer.prepare` makes it, and prints
{"path", "rows" (of each split), "unit" (tokens), "sha256" (of the training tokens)}. Under one version of Python the
same options give the same bytes. Licence of the text: PSF-2.0, which permits to copy, change and distribute it.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from trainer import job
from trainer.job import UserError
from trainer.prepare import from_files, prepare

# What is not the library itself: installed packages, whose licences are their own, and tests, much of them tables.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
VALIDATION = 0.05  # share of the files


def main() -> int:
    """Exit code 0, when the folder is there."""
    parser = argparse.ArgumentParser(description="Makes token files of the standard library.", allow_abbrev=False)
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or bpe:N for N entries learnt from the text")
    parser.add_argument("--files", type=int, help="only so many files, drawn by the seed; none: all")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the files, and which are the validation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "input", help="folder to write to")
    arguments = parser.parse_args()
    texts = from_files(sources(arguments.files, arguments.seed), ".py")
    parts = ["stdlib", Path(arguments.tokenizer).stem.replace(":", "")]
    parts += [f"{arguments.files}files"] * (arguments.files is not None)
    path = arguments.out / "_".join(parts)
    about = write(texts, path, arguments.tokenizer, arguments.seed)
    print(
        json.dumps({"path": str(path), "rows": about["tokens"], "unit": "tokens", "sha256": about["sha256"]["train"]})
    )
    return 0


def sources(n: int | None, seed: int) -> list[Path]:
    """The library's files in the order of their names, or `n` of them. Raises UserError where there are fewer."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in library.rglob("*.py") if not LEFT_OUT & set(file.relative_to(library).parts)]
    files.sort(key=lambda file: file.relative_to(library).as_posix())
    if n is None:
        return files
    if not 2 <= n <= len(files):
        raise UserError(f"--files {n}: the library has {len(files)} files, ask for 2 to {len(files)}")
    return sorted(random.Random(seed).sample(files, n), key=files.index)


def write(texts: list[str], path: Path, tokenizer: str, seed: int) -> dict[str, Any]:
    """What meta.json says of the folder at `path`. Raises UserError when it is there with other content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return prepare(texts, path, tokenizer, VALIDATION, seed)
    beside = path.with_name(f".{path.name}.again")
    shutil.rmtree(beside, ignore_errors=True)
    about = prepare(texts, beside, tokenizer, VALIDATION, seed)
    names = [file.name for file in beside.iterdir()]
    same = filecmp.cmpfiles(beside, path, names, shallow=False)[0]
    shutil.rmtree(beside)
    if len(same) != len(names):
        raise UserError(
            f"{path} is there with other content, of another seed or Python perhaps: remove it or give another --out"
        )
    return about


if __name__ == "__main__":
    job.run(main)
