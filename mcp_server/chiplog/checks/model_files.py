"""The JSON files of a model folder, and the command that fetches a file of it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from chiplog.checks.lookup import download_command, hub_name

LFS_POINTER = b"version https://git-lfs"


class Config(NamedTuple):
    """What config.json says of a model; None where it does not."""

    model_type: str | None = None
    architecture: str | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    depth: int | None = None
    width: int | None = None
    embedding_width: int | None = None  # differs from the width in a few models, such as opt-350m


class BadFile(ValueError):
    """A file of a model that cannot be used: what was `found`, and how to `mend` it."""

    def __init__(self, found: str, mend: str):
        super().__init__(f"{found}: {mend}")
        self.found, self.mend = found, mend


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises BadFile."""
    refuse_pointer(file)
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise BadFile(f"{file.name} cannot be read ({error.strerror})", "mend its permissions") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{file.name} is not JSON ({error})", fetch_again(file)) from error
    if not isinstance(value, dict):
        raise BadFile(f"{file.name} is no JSON object", fetch_again(file))
    return value


def refuse_pointer(file: Path) -> None:
    """Raises BadFile for a file that is missing, or stands in for one that git-lfs has not fetched."""
    if not file.is_file():
        what = "is a link to nothing" if file.is_symlink() else "is missing"
        raise BadFile(f"{file.name} {what}", fetch_again(file))
    try:
        with file.open("rb") as data:
            pointer = data.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise BadFile(f"{file.name} cannot be read ({error.strerror})", "mend its permissions") from error
    if pointer:
        raise BadFile(f"{file.name} is a git-lfs pointer, not the file", f"run `git lfs pull` in {file.parent}")


def fetch_again(file: Path) -> str:
    """What to do about a file that is broken, for a Check."""
    repo = hub_name(file.parent)
    command = download_command(repo or "ORG/NAME", file.parent, file.name, again=True)
    return f"download it again: {command}{'' if repo else ' (ORG/NAME: as it is called on huggingface.co)'}"


def read_config(folder: Path) -> Config:
    """What config.json says. Raises BadFile."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config")  # where multimodal models describe their language model
    text = nested if isinstance(nested, dict) else config
    names = config.get("architectures")
    width = _number(text, "hidden_size", "n_embd", "d_model")
    return Config(
        model_type=_text(config.get("model_type")),
        architecture=_text(names[0]) if isinstance(names, list) and names else None,
        vocab_size=_number(text, "vocab_size"),
        context_length=_number(text, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
        depth=_number(text, "num_hidden_layers", "n_layer", "num_layers"),
        width=width,
        embedding_width=_number(text, "word_embed_proj_dim") or width,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(config: dict[str, Any], *names: str) -> int | None:
    """The first of these that is given: families of models have different names for one thing."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**53:
            raise BadFile(f"config.json: {name} is no whole number above 0", "mend it, or download config.json again")
        return value
    return None
