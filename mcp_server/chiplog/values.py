"""Values of settings: what each may be, and the refusal in words of what it may not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

from chiplog.errors import PlanError

Value = bool | int | float | str | list[str] | None
Kind = Literal["text", "integer >= 0", "integer >= 1", "number >= 0", "number > 0", "number 0 to 1"]
LARGEST = 2**32 - 1  # of whole numbers, since seeds are no larger


def check_value(key: str, value: Value, default: Value, takes: Mapping[str, Kind | list[str]]) -> Value:
    """`value` as the setting has it: what `takes` says, else what its default is of. Raises PlanError."""
    if value is None and default is None:
        return None
    if isinstance(value, list) != isinstance(default, list):
        raise PlanError(f"{key} is {value!r}: give {'a list' if isinstance(default, list) else 'one value'}")
    return _typed(key, value, takes.get(key) or _kind(default))


def _kind(default: Value) -> Kind | type:
    """What a setting takes whose YAML says no more than this default."""
    if isinstance(default, bool) or not isinstance(default, int | float | str):
        return type(default)
    if isinstance(default, int):
        return "integer >= 1" if default else "integer >= 0"
    return "number >= 0" if isinstance(default, float) else "text"


def _typed(key: str, value: Value, kind: Kind | list[str] | type) -> Value:
    """`value` as a setting of that kind, or of those choices, has it. Raises PlanError."""
    if isinstance(kind, list):
        given = value if isinstance(value, list) else [value]
        if not given or any(word not in kind for word in given):
            raise PlanError(f"{key} is {value!r}: choose from {', '.join(kind)}")
        return value
    if kind is bool and not isinstance(value, bool):
        raise PlanError(f"{key} is {value!r}: give true or false")
    if kind == "text" and (not isinstance(value, str) or "\0" in value):
        raise PlanError(f"{key} is {value!r}: give a text")
    return _number(key, value, kind) if isinstance(kind, str) and kind != "text" else value


def _number(key: str, value: Value, kind: str) -> float:
    whole = kind.startswith("integer")
    if not whole and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 reads 1e-4 as a word
    least, most = (1 if kind == "integer >= 1" else 0), (1 if kind == "number 0 to 1" else LARGEST)
    right = isinstance(value, int if whole else float) and not isinstance(value, bool)
    if right and least <= value <= most and (value or kind != "number > 0"):  # pyright: ignore[reportOperatorIssue]
        return value  # pyright: ignore[reportReturnType]
    above = "above 0 and" if kind == "number > 0" else f"of at least {least} and"
    raise PlanError(f"{key} is {value!r}: give a {'whole ' * whole}number {above} at most {most:,}")
