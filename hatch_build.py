"""Puts what the planner reads as files into the wheel, so that it plans without a clone.

Only for the standard wheel: an editable install reads the checkout, and a copy would go stale.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("templates", "recipes", "trainer", "tasks", "skills")


class BundleHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"] |= {f"{self.root}/{name}": f"chiplog/_bundle/{name}" for name in FOLDERS}
