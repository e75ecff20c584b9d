"""Which code and which packages something came from."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import Field

from chiplog import __version__
from chiplog.schema import Frozen


class Revision(Frozen):
    """The commit that a folder of code stands at."""

    chiplog: str = Field(description="Version of chiplog.")
    commit: str | None = Field(description="Commit of the checkout; null outside a checkout.")
    dirty: bool | None = Field(description="Whether tracked files differ from that commit.")


def revision(folder: Path) -> Revision:
    """The revision of the checkout that `folder` lies in."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    return Revision(chiplog=__version__, commit=commit, dirty=None if changed is None else bool(changed))


def revision_text(found: Revision) -> str:
    """The text of `code/REVISION`: one JSON object."""
    return json.dumps(found.model_dump(), indent=1) + "\n"


def packages() -> dict[str, str]:
    """Name and version of every installed package, and of Python itself."""
    found = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None  # no git here: the revision is not known, and is recorded as such
    return done.stdout.strip() if done.returncode == 0 else None
