"""The weights of a model folder: every file whole, every tensor where the index says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chiplog.checks import Check, failed, passed, warning
from chiplog.checks.model_files import BadFile, fetch_again, read_json, refuse_pointer
from chiplog.checks.safetensors_header import HeaderError, Tensor, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".safetensors")
# What stands before .weight, in different families of models.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
CONVERT = "python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('.').save_pretrained('.')\""


class Weights(NamedTuple):
    """What the weight files hold."""

    files: list[Path]  # those that a loader opens
    tensors: dict[str, Tensor] | None  # None where any of them cannot be read
    checks: list[Check]


def check_weights(folder: Path) -> Weights:
    """Reads the headers of the files that transformers would load: model.safetensors, else the shards of the index."""
    single, index = folder / SINGLE, folder / INDEX
    try:
        if single.exists() or single.is_symlink():
            files, placed = [single], None
        elif index.exists() or index.is_symlink():
            placed = _placed(index)
            files = [folder / name for name in sorted(set(placed.values()))]
        else:
            return Weights([], None, [_no_weights(folder)])
    except BadFile as error:
        return Weights([], None, [failed("weights", error.found, error.mend)])
    by_file, checks = _headers(files)
    if placed is None and index.exists():
        checks.append(warning("index", f"{SINGLE} is loaded, and {INDEX} lies beside it", f"delete {INDEX}"))
    if placed is not None:
        checks += _index(index, placed, by_file)
    if len(by_file) < len(files):
        return Weights(files, None, checks)
    tensors = {name: tensor for header in by_file.values() for name, tensor in header.items()}
    checks.append(passed("weights", f"{len(tensors):,} tensors, every file whole"))
    return Weights(files, tensors, checks)


def check_embedding(tensors: dict[str, Tensor], vocab_size: int, width: int) -> Iterator[Check]:
    """Whether a token embedding has the shape that config.json says; nothing where none goes by a known name."""
    shapes = {name: list(tensors[name].shape) for name in tensors if _is_embedding(name)}
    if [vocab_size, width] in shapes.values():
        yield passed("embedding", f"{vocab_size:,} x {width:,}")
    elif shapes:
        name, shape = next(iter(shapes.items()))
        found = f"{name} has the shape {shape}, where config.json says {[vocab_size, width]}"
        yield failed("embedding", found, "take weights and config.json from the same model")


def _is_embedding(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS


def _placed(index: Path) -> dict[str, str]:
    """Which file the index says holds each tensor."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise BadFile(f"{INDEX} has no weight_map", fetch_again(index))
    for file in placed.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise BadFile(f"{INDEX} names a shard that is no file of this folder", fetch_again(index))
    return placed


def _headers(files: list[Path]) -> tuple[dict[str, dict[str, Tensor]], list[Check]]:
    """The tensors of each file that is whole, and a check for each that is not."""
    read: dict[str, dict[str, Tensor]] = {}
    checks = []
    for file in files:
        try:
            refuse_pointer(file)
            read[file.name] = read_header(file)
        except BadFile as error:
            checks.append(failed("weights", error.found, error.mend))
        except HeaderError as error:
            checks.append(failed("weights", f"{file.name} {error}", fetch_again(file)))
    return read, checks


def _index(index: Path, placed: dict[str, str], by_file: dict[str, dict[str, Tensor]]) -> Iterator[Check]:
    """Whether the whole files hold what the index says, and nothing else."""
    lost = [name for name, file in placed.items() if file in by_file and name not in by_file[file]]
    if lost:
        found = f"{INDEX} places {len(lost):,} tensors where they are not: {lost[0]} is not in {placed[lost[0]]}"
        yield failed("index", found, f"take index and weights from one revision; {fetch_again(index)}")
    unlisted = [name for file, header in by_file.items() for name in header if placed.get(name) != file]
    if unlisted:
        found = f"{len(unlisted):,} tensors are in no shard that the index gives for them: {unlisted[0]}"
        yield warning("index", found, "they are not loaded; take index and weights from one revision")
    if lost or unlisted or len(by_file) < len(set(placed.values())):
        return
    total = sum(tensor.n_bytes for header in by_file.values() for tensor in header.values())
    about = read_json(index).get("metadata")
    said = about.get("total_size") if isinstance(about, dict) else None
    if said is not None and said != total:
        found = f"{INDEX} says total_size {_shown(said)}, the tensors have {total:,} bytes"
        yield warning("index", found, "take index and weights from one revision, if they are not")
    else:
        yield passed("index", f"{len(placed):,} tensors, each in its shard")


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"of type {type(value).__name__}"


def _no_weights(folder: Path) -> Check:
    others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_WEIGHTS)
    found = f"neither {SINGLE} nor {INDEX}{', only ' if others else ''}{', '.join(others[:5])}"
    if any(name.startswith("pytorch_model") for name in others):
        return failed("weights", found, f"in {folder}, convert them: {CONVERT}")
    return failed("weights", found, fetch_again(folder / SINGLE))
