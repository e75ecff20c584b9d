"""Puts what the planner reads as files into the wheel, so that it plans without a clone.

Only for the standard wheel: an editable install reads the checkout, and a copy would go stale.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("templates", "recipes", "trainer", "tasks", "skills")
MADE = {"__pycache__", "input"}  # what Python and the studies make in these folders


class BundleHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":
            return
        root = Path(self.root)
        files = [file for name in FOLDERS for file in sorted((root / name).rglob("*")) if file.is_file()]
        inside = {file: file.relative_to(root) for file in files}
        build_data["force_include"] |= {
            str(file): f"chiplog/_bundle/{path}" for file, path in inside.items() if not MADE & set(path.parts)
        }
