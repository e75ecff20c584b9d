"""From the name of a model or data set to its path, and to words that help where there is none.

A name is a path, or what ends a path under one of the roots: `Llama-3.2-1B`, `meta-llama/Llama-3.2-1B`, `words_5L`.
Models in a Hugging Face cache (`models--meta-llama--Llama-3.2-1B/snapshots/<revision>`) go by their names on the hub.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from chiplog.errors import NotFoundError
from chiplog.trainer_files import load_trainer_file

DEPTH = 4
MAX_FOLDERS = 20_000
MAX_LISTED = 10
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(name: str, roots: Sequence[Path], start: Path | None = None) -> Path:
    """The model's folder. `start`, by default the current folder, is where relative paths start.

    Raises NotFoundError that lists the models there are, or all that go by this name.
    """
    folders = [place for place in _places(name, roots, start) if place.is_dir()]
    direct = [path for folder in folders for path in _snapshots(folder) or [folder]]
    listed = [] if direct else [path for path in list_models(roots) if _ends_with(model_label(path, roots), name)]
    found = [path for path in direct if _is_model(path)] or direct or listed
    if not found:
        raise missing_model(name, roots)
    return _only(found, name)


def resolve_dataset(name: str, roots: Sequence[Path], start: Path | None = None) -> Path:
    """The data set's file or folder; a file's name may lack its suffix. Otherwise as `resolve_model`."""
    found = _places(name, roots, start)
    if not found:
        found = [path for path in _datasets(roots) if any(_ends_with(label, name) for label in _labels(path, roots))]
    if not found:
        raise missing_dataset(Path(name), roots)
    return _only(found, name)


def list_models(roots: Sequence[Path]) -> list[Path]:
    """Every folder with a config.json, at most four deep; of a model in the hub's cache, the revision called main."""
    found = []
    for folder, inside, _ in _walk(roots):
        if models := [path for path in _snapshots(folder) or [folder] if _is_model(path)]:
            found += models
            inside.clear()
    return found


def model_label(path: Path, roots: Sequence[Path]) -> str:
    """What a model is called: org/name in the hub's cache, else its path under a root."""
    return hub_name(path) or _labels(path, roots)[0]


def hub_name(path: Path) -> str | None:
    """org/name of a model in the hub's cache; None elsewhere."""
    repo = next((part for part in path.parts if part.startswith("models--")), None)
    return repo and repo.removeprefix("models--").replace("--", "/", 1)


def find_near(path: Path, roots: Sequence[Path]) -> list[Path]:
    """At most five data sets under the roots whose names are like this one's, the likest first."""
    names = {found: [found.name, _bare(found).name] for found in _datasets(roots)}
    return _near(path.name, names)


def missing_dataset(path: Path, roots: Sequence[Path]) -> NotFoundError:
    """An error that names what is like `path`, or else what is there."""
    if near := find_near(path, roots):
        return NotFoundError(f"there is no data set {path}. Did you mean\n{_lines(near)}")
    if there := list(_datasets(roots)):
        return NotFoundError(f"there is no data set {path}. Under {_named(roots)} there are\n{_lines(there)}")
    advice = "make one with create_dataset, or add its folder to [paths] datasets in chiplog.toml"
    return NotFoundError(f"there is no data set {path}, and none under {_named(roots)}: {advice}")


def missing_model(name: str, roots: Sequence[Path]) -> NotFoundError:
    """An error that lists the models there are, the likest first, and says how to download this one."""
    labels = {path: model_label(path, roots) for path in list_models(roots)}
    near = _near(Path(name).name, {path: [label, Path(label).name] for path, label in labels.items()})
    listed = [f"{labels[path]}  ({path})" for path in dict.fromkeys([*near, *labels])]
    there = f"There are\n{_lines(listed)}\nTo" if listed else "There are none. To"
    last = Path(name).name or "NAME"
    is_repo = REPO.fullmatch(name) and Path(name).parts[0] not in {root.name for root in roots}
    repo, explained = (name, "") if is_repo else (f"ORG/{last}", " (ORG: who publishes it on huggingface.co)")
    command = download_command(repo, roots[0] / last if roots else Path(last))
    return NotFoundError(f"there is no model {name} under {_named(roots)}. {there} download it: {command}{explained}")


def download_command(repo: str, folder: Path, *files: str, again: bool = False) -> str:
    """The shell command that puts a model of the hub into a folder; `again` replaces what seems complete."""
    cache = next((parent.parent for parent in folder.parents if parent.name.startswith("models--")), None)
    place = ["--cache-dir", str(cache)] if cache else ["--local-dir", str(folder)]
    return shlex.join(["hf", "download", repo, *files, *place, *(["--force-download"] if again else [])])


def _places(name: str, roots: Sequence[Path], start: Path | None) -> list[Path]:
    """What is there under the name as a path; an absolute one stays what it is wherever it starts."""
    try:
        path = Path(name).expanduser()
        places = [(place / path).resolve() for place in (start or Path.cwd(), *roots)]
        return list(dict.fromkeys(place for place in places if place.exists()))
    except (OSError, ValueError, RuntimeError):
        return []  # too long, a NUL, an unknown ~user: no path, but perhaps a name


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _snapshots(repo: Path) -> list[Path]:
    """The revision called main of a model in the hub's cache, or all where none is; nothing for another folder."""
    if not (repo.name.startswith("models--") and (repo / "snapshots").is_dir()):
        return []
    main = repo / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if main.is_file() else ""
    revisions = sorted((repo / "snapshots").iterdir())
    return [path for path in revisions if path.name == revision] or revisions


def _datasets(roots: Sequence[Path]) -> Iterator[Path]:
    """Data files, folders that hold some, and folders that `save_to_disk` or `trainer.prepare` wrote; no models."""
    kind_of = load_trainer_file("rows").kind_of
    for folder, inside, files in _walk(roots):
        saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json", "train.bin"))
        if saved or _is_model(folder):
            inside.clear()
        data = [] if saved or _is_model(folder) else [file for file in files if kind_of(file)]
        if saved or (data and folder not in roots):
            yield folder
        yield from data


def _walk(roots: Sequence[Path]) -> Iterator[tuple[Path, list[str], list[Path]]]:
    """Each folder, the list of folders in it (the caller may empty it to go no deeper), and the files in it."""
    left = MAX_FOLDERS
    for root in roots:
        for parent, inside, files in os.walk(root, followlinks=True):
            left -= 1
            deep = len(Path(parent).relative_to(root).parts) >= DEPTH
            inside[:] = [] if deep or left <= 0 else sorted(name for name in inside if not name.startswith("."))
            yield Path(parent), inside, [Path(parent, name) for name in sorted(files) if not name.startswith(".")]


def _bare(path: Path) -> Path:
    """A file's path without its suffixes."""
    return path.with_name(path.name.removesuffix(".gz")).with_suffix("") if path.is_file() else path


def _labels(path: Path, roots: Sequence[Path]) -> list[str]:
    """The path under its root, with and without suffix."""
    root = next((root for root in roots if path.is_relative_to(root)), Path())
    return [each.relative_to(root).as_posix() for each in (path, _bare(path))]


def _ends_with(label: str, name: str) -> bool:
    return label == name or label.endswith(f"/{name}")


def _near(name: str, named: dict[Path, list[str]]) -> list[Path]:
    """Paths one of whose names holds `name` or is like it; 0.6 is difflib's own threshold."""

    def likeness(each: str) -> float:
        held = bool(name) and name.lower() in each.lower()
        return held + difflib.SequenceMatcher(None, name.lower(), each.lower()).ratio()

    scores = {path: max(map(likeness, names)) for path, names in named.items()}
    return sorted((path for path, score in scores.items() if score >= 0.6), key=lambda path: (-scores[path], path))[:5]


def _only(paths: list[Path], name: str) -> Path:
    unique = sorted({path.resolve() for path in paths})
    if len(unique) > 1:
        raise NotFoundError(f"{name} may be any of {len(unique)}: give the path of one\n{_lines(unique)}")
    return unique[0]


def _named(roots: Sequence[Path]) -> str:
    return ", ".join(map(str, roots)) or "any root"


def _lines(items: Iterable[Path | str]) -> str:
    """One item a line, the first ten."""
    items = list(items)
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return "\n".join(f"  {item}" for item in [*map(str, items[:MAX_LISTED]), *more])
