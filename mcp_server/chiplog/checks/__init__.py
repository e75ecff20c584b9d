"""What is looked at before a job is rendered: data sets and models.

A check that is not ok stops a plan. One that is ok and yet says how to mend something is a warning: the run would
work, and a person should know.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from chiplog.schema import Frozen

# Names in a broken file may hold half of a surrogate pair, which is no text that could be sent on.
Words = Annotated[str, BeforeValidator(lambda text: text.encode(errors="backslashreplace").decode())]


class Check(Frozen):
    """One thing that was looked at."""

    subject: Words = Field(description="What was looked at.")
    ok: bool = Field(description="Whether a run can go ahead.")
    found: Words = Field(description="What was found.")
    mend: Words | None = Field(description="What to do; null where nothing is to be done.")

    @property
    def level(self) -> str:
        """ok, warning or failed."""
        return "failed" if not self.ok else "warning" if self.mend else "ok"


class Report(Frozen):
    """What all checks of one thing found."""

    ok: bool = Field(description="Whether no check failed.")
    checks: list[Check] = Field(description="Every check, in the order in which they were made.")

    @property
    def problems(self) -> list[Check]:
        """What is to be mended, failures before warnings."""
        return sorted((check for check in self.checks if check.mend), key=lambda check: check.ok)


def passed(subject: str, found: str) -> Check:
    """A check that leaves nothing to do."""
    return Check(subject=subject, ok=True, found=found, mend=None)


def warning(subject: str, found: str, mend: str) -> Check:
    """A check that stops no run, and still has something to mend."""
    return Check(subject=subject, ok=True, found=found, mend=mend)


def failed(subject: str, found: str, mend: str) -> Check:
    """A check that stops a run until it is mended."""
    return Check(subject=subject, ok=False, found=found, mend=mend)


def all_ok(checks: list[Check]) -> bool:
    """Whether none failed: a Report's `ok`."""
    return all(check.ok for check in checks)
