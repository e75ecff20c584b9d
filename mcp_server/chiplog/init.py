"""`chiplog init`: writes a `chiplog.toml` where there is none, and checks the one that is there."""

from __future__ import annotations

import os
from pathlib import Path

from chiplog.answers import Answer
from chiplog.bundle import bundle
from chiplog.checks import Check, failed, passed, warning
from chiplog.checks.lookup import list_models
from chiplog.engines.local import available_gpus
from chiplog.files import write_atomic
from chiplog.machine import available_cpus
from chiplog.settings import FILE_NAME, Settings, find_workspace, load_settings


class InitAnswer(Answer):
    """What the workspace has."""

    file: str
    checks: list[Check]


def init_workspace() -> InitAnswer:
    """Raises SettingsError if the file that is there is wrong."""
    file = find_workspace() / FILE_NAME
    new = not file.is_file()
    if new:
        write_atomic(file, (bundle() / "templates" / FILE_NAME).read_bytes())
    checks = _checks(load_settings())
    lines = [f"{file} {'was written' if new else 'is sound'}."]
    lines += [
        f"- {check.level}: {check.subject}: {check.found}{'. ' + check.mend if check.mend else ''}" for check in checks
    ]
    ok = all(check.ok for check in checks)
    return InitAnswer(
        summary="\n".join(lines), next=[f"edit {file} and run chiplog init again"], ok=ok, file=str(file), checks=checks
    )


def _checks(settings: Settings) -> list[Check]:
    models = list_models(settings.model_roots)
    found = [
        *(_folder("models", root) for root in settings.model_roots),
        *(_folder("datasets", root) for root in settings.dataset_roots),
        passed("models found", f"{len(models)}"),
        _writable(settings.experiments),
        passed("this machine", f"{available_cpus()} CPUs, {len(available_gpus())} GPUs"),
    ]
    if settings.slurm and not settings.gpus:
        found.append(warning("gpus", "a cluster without any [[gpus]]", "Add the kinds of GPU that can be asked for"))
    return found


def _folder(what: str, root: Path) -> Check:
    if root.is_dir():
        return passed(what, str(root))
    return warning(what, f"{root} is not there", "Make it, or name another folder under [paths]")


def _writable(folder: Path) -> Check:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if os.access(there, os.W_OK):
        return passed("experiments", str(folder))
    return failed("experiments", f"{folder} cannot be written", "Mend its permissions, or name another folder")
