"""Writing files so that no reader ever meets half of one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomic(file: Path, content: bytes) -> None:
    """Writes beside, then renames. Makes the folder if need be. Raises OSError of `file`, and then leaves nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("xb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        if file.exists():
            beside.chmod(file.stat().st_mode & 0o777)
        beside.replace(file)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # a full disk says so without a name
            error.filename = str(file)
        raise
