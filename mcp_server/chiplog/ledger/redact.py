"""Records without users, hosts and folders, fit to be shared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from chiplog.record import Record

URL = re.compile(r"\b[a-z]+://[^\s'\"]+")
PATH = re.compile(
    r"(?<![\w/])(?:~\w*|[A-Z]:)?[/\\][^\s'\"/\\:,;)\]]+(?:[/\\][^\s'\"/\\:,;)\]]*)*|(?<![\w/])~\w+"
    r"|(?<![\w/.-])[\w.+-]+(?:/[\w.@+~-]+){2,}"
)
# Where Slurm names a node, and addresses.
HOST = re.compile(
    r"(?<=\bON )\S+(?= CANCELLED)|(?<=srun: error: )[\w.-]+(?=: )|(?<=failure on )\S+|(?<=slurmstepd-)[\w.-]+(?=:)"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b"
)


def redacted(records: Iterable[Record]) -> Iterator[Record]:
    """The records as others may see them."""
    for record in records:
        hidden = record.model_dump(include={"reason", "config", "packages"})
        yield record.model_copy(
            update={
                "logs": [Path(log).name for log in record.logs],
                "evidence": [],
                "guards": [one.model_copy(update={"found": _no_names(one.found)}) for one in record.guards],
                "model": None if record.model is None else _name_alone(record.model),
                **{name: _without_names(value) for name, value in hidden.items()},
            }
        )


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_without_names(key)): _without_names(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_names(inner) for inner in value]
    return _no_names(value) if isinstance(value, str) else value


def _no_names(text: str) -> str:
    text = URL.sub("URL", text)
    text = PATH.sub(lambda match: _name_alone(match.group()), text)
    text = re.sub(r"\b[\w.+-]+@[\w.-]+\b", "USER@HOST", text)
    return HOST.sub("HOST", text)


def _name_alone(path: str) -> str:
    """The last part of a path, if it is not a folder of somebody's: of `/home/me` and `/data/me/` nothing."""
    parts = [part for part in re.split(r"[/\\]", path) if part]
    rooted = path.startswith(("/", "~")) or ":\\" in path
    if not rooted:
        return path if len(parts) <= 2 else parts[-1]
    return parts[-1] if len(parts) > 2 and not path.endswith(("/", "\\")) else "PATH"
