"""The trainer's files that need no torch, loaded by their path: rows, chat, shape, conflicts.

`trainer` is no package that the planner may import, since the two meet in files only; yet both must read rows and count
tokens by the same code.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType

from chiplog.bundle import bundle

_lock = threading.Lock()  # tools run on threads, and two copies of a module would have two RowsErrors


def load_trainer_file(name: str) -> ModuleType:
    """The module in `trainer/<name>.py`, the same one at every call. Raises FileNotFoundError where there is none."""
    private = f"_chiplog_trainer_{name}"
    with _lock:
        if private in sys.modules:
            return sys.modules[private]
        spec = importlib.util.spec_from_file_location(private, bundle() / "trainer" / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[private] = module  # before it runs: dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[private]
            raise
        return module
