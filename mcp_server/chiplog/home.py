"""The folder in which chiplog keeps what outlives a workspace: the ledger and the local queue."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$CHIPLOG_HOME`, else `chiplog` under the XDG state directory. It need not exist yet."""
    if named := os.environ.get("CHIPLOG_HOME"):
        return Path(named).expanduser().resolve()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "chiplog"
