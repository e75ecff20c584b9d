"""What all nouns share: they are frozen, they refuse what they do not know, and their errors read as plain lines."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, ValidationError

# What long work calls now and then: how much is done, of how much (null: not known), and of what.
Progress = Callable[[float, float | None, str], None]


class Frozen(BaseModel):
    """A value: it cannot be changed, and has no field that is not named here."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def plain_errors(error: ValidationError) -> str:
    """A pydantic error as one line a field: where, what is wrong, what was given."""
    lines = []
    for entry in error.errors():
        where = ".".join(str(part) for part in entry["loc"]) or "(all)"
        words = "there is no such field" if entry["type"] == "extra_forbidden" else entry["msg"]
        given = "" if entry["type"] == "missing" else f" (given: {entry['input']!r:.80})"
        lines.append(f"  {where}: {words}{given}")
    return "\n".join(lines)
