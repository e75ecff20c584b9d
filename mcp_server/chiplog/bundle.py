"""What is found by convention: recipes, studies, templates and skills are the folders and files that are there."""

from __future__ import annotations

from pathlib import Path

from chiplog.errors import NotFoundError
from chiplog.settings import find_workspace


def bundle() -> Path:
    """The folder that holds templates/, recipes/, trainer/, tasks/ and skills/: the checkout, or the wheel's copy."""
    package = Path(__file__).resolve().parent
    inside = package / "_bundle"
    return inside if inside.is_dir() else package.parent.parent


def places(name: str) -> list[Path]:
    """The folders called `name`: the workspace's own before the bundled one."""
    return [place for place in dict.fromkeys((find_workspace() / name, bundle() / name)) if place.is_dir()]


def study_names() -> list[str]:
    """Every folder under tasks/ that has a README."""
    return sorted({file.parent.name for place in places("tasks") for file in place.glob("*/README.md")})


def study_folder(name: str) -> Path:
    """The folder of a study. Raises NotFoundError with what is there."""
    names = study_names()
    for place in places("tasks"):
        if name in names and (place / name / "README.md").is_file():
            return place / name
    raise NotFoundError(f"there is no study {name!r}: there are {', '.join(names) or 'none'} (folders under tasks/)")
