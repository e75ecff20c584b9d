"""The recipes as the planner sees them: the YAML beside each recipe file, never the code.

That file holds two documents: what the recipe can do (`About`), then every setting with its default; `like` names
another recipe whose settings it has too. Recipes stand in `recipes/`, and `train`, which makes models of its own, in
`trainer/`. One in the workspace's own `recipes/` stands before the bundled one of the same name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from chiplog.bundle import bundle, places
from chiplog.errors import NotFoundError, PlanError
from chiplog.plan import Config, Manual
from chiplog.schema import Frozen, plain_errors
from chiplog.values import Kind, check_value

# The settings that planning itself reads, and what they take, by what a recipe is built on and does.
ASKED: dict[str, Kind] = {"model": "text", "dataset": "text", "system_prompt": "text", "prompt": "text"}
NEEDED: dict[str, dict[str, Kind]] = {
    "evaluate": {**ASKED, "eval_split": "text", "eval_limit": "integer >= 1", "scorer": "text"},
    "trainer": {  # which trains on token files: no base model, no chats
        "dataset": "text",
        "seed": "integer >= 0",
        "batch_size": "integer >= 1",
        "seq_len": "integer >= 1",
        "max_steps": "integer >= 1",
    },
    "train": {
        **ASKED,
        "seed": "integer >= 0",
        "batch_size": "integer >= 1",
        "epochs": "integer >= 1",
        "max_steps": "integer >= 1",
    },
}
MAY_BE_NULL = {"model", "dataset", "system_prompt", "eval_limit", "scorer", "max_steps"}


class About(Frozen):
    """What a recipe can do."""

    does: Literal["train", "evaluate"] = Field(description="Whether it trains or evaluates.")
    framework: Literal["torchtune", "trainer", "transformers"] = Field(description="What it is built on.")
    model_types: list[str] = Field(description="Values of model_type in config.json that it can load.")
    like: str | None = Field(default=None, description="Recipe beside it whose settings it has beside its own.")
    max_processes: int | None = Field(description="Processes, of a GPU each, that it can use; null: any number.")
    validates: bool = Field(description="Whether it validates during training.")
    takes: dict[str, Kind | list[str]] = Field(
        default={}, description="Kind or choices of the settings whose default does not say it."
    )


class Recipe(Frozen):
    """One recipe file and its settings."""

    name: str = Field(description="File name without .py.")
    file: Path = Field(description="The Python file.")
    about: About = Field(description="What it can do.")
    settings: Config = Field(description="Every setting with its default.")

    @property
    def place(self) -> Literal["recipes", "trainer"]:
        """The folder of an experiment's `code/` that carries it."""
        return "trainer" if self.file.parent.name == "trainer" else "recipes"


def recipe_names(folder: Path | None = None) -> list[str]:
    """Names of all recipes, by the files that are there.

    `folder`, a recipes/ that may have a trainer/ beside it, instead of the workspace's and the bundled ones.
    """
    return sorted(
        {file.stem for place in _folders(folder) for file in place.glob("*.yaml") if file.with_suffix(".py").is_file()}
    )


def load_recipe(name: str, folder: Path | None = None) -> Recipe:
    """The recipe called `name`. Raises NotFoundError with the names that are there, PlanError for a wrong YAML."""
    names = recipe_names(folder)
    for place in _folders(folder):
        file = place / f"{name}.yaml"
        if name in names and file.is_file():
            return _read(file)
    raise NotFoundError(f"there is no recipe {name!r}: there are {', '.join(names)} (files under recipes/)")


def choose_recipe(processes: int, validation: bool) -> Recipe:
    """The torchtune recipe for that many processes, with or without validation during training.

    Raises PlanError if no recipe does that, saying which there are.
    """
    found = [load_recipe(name) for name in recipe_names()]
    found = [recipe for recipe in found if recipe.about.does == "train" and recipe.about.framework == "torchtune"]
    for recipe in found:
        enough = recipe.about.max_processes is None or processes <= recipe.about.max_processes
        single = processes <= 1 and recipe.about.max_processes is None  # no distributed recipe for one device
        fits = recipe.about.validates if validation else not recipe.settings.get("val_split")
        if enough and not single and fits:
            return recipe
    wanted = f"{processes} devices {'with' if validation else 'without'} validation during training"
    raise PlanError(f"no recipe trains on {wanted}: there are {', '.join(recipe.name for recipe in found)}")


def manual(name: str, folder: Path | None = None) -> Manual:
    """Every setting that a run of this recipe knows: its own, and the evaluation's where there is one."""
    recipe = load_recipe(name, folder)
    if recipe.about.framework == "trainer":
        return Manual(framework="trainer", defaults=recipe.settings, takes=recipe.about.takes)
    evaluation = load_recipe("evaluate", folder)
    return Manual(
        framework="torchtune",
        defaults={**evaluation.settings, **recipe.settings},
        takes={**evaluation.about.takes, **recipe.about.takes},
    )


def _folders(folder: Path | None) -> list[Path]:
    return [*places("recipes"), bundle() / "trainer"] if folder is None else [folder, folder.with_name("trainer")]


def _read(file: Path) -> Recipe:
    about, settings = _about(file)
    takes = dict(about.takes)
    like, seen = about.like, {file.stem}
    while like is not None:
        other = file.with_name(f"{like}.yaml")
        if like in seen or not other.is_file():
            raise PlanError(f"{file} is like {like}, which is not beside it: copy {like}.yaml and {like}.py there")
        seen.add(like)
        theirs, defaults = _about(other)
        takes, settings, like = {**theirs.takes, **takes}, {**defaults, **settings}, theirs.like
    needed = NEEDED["trainer" if about.framework == "trainer" else about.does]
    if missing := [key for key in needed if key not in settings]:
        raise PlanError(f"{file} lacks {', '.join(missing)}: every recipe that can {about.does} has these settings")
    if unknown := takes.keys() - settings.keys():
        raise PlanError(f"{file} says what {', '.join(sorted(unknown))} takes, and has no such setting")
    about = about.model_copy(update={"takes": {**takes, **needed}})
    for key, default in settings.items():
        counted = key == "max_steps" and about.framework == "trainer"  # nothing else says how long it trains
        if default is None and key in needed and (counted or key not in MAY_BE_NULL):
            raise PlanError(f"{file}: {key} is null: give its default")
        try:
            check_value(key, default, default, about.takes)
        except PlanError as error:
            raise PlanError(f"{file}: {error}") from error
    return Recipe(name=file.stem, file=file.with_suffix(".py"), about=about, settings=settings)


def _about(file: Path) -> tuple[About, Config]:
    """The two documents of a recipe's YAML."""
    try:
        documents: list[Any] = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{file} is not YAML: {error}. Mend that line.") from error
    if len(documents) != 2 or not isinstance(documents[1], dict):
        raise PlanError(f"{file} must hold two documents: what the recipe can do, then `---` and its settings")
    try:
        return About.model_validate(documents[0]), documents[1]
    except ValidationError as error:
        raise PlanError(f"{file}, first document:\n{plain_errors(error)}\nMend these fields.") from error
