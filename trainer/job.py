"""What every job does in the same way: read its settings, write files whole, watch time and memory, fail in one line.

Import it before torch: its clock starts here, and imports are part of what a job waits for.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

if TYPE_CHECKING:
    import torch

BEGAN = time.perf_counter()
REQUEUE = 75  # the exit code that asks to be started again: EX_TEMPFAIL of sysexits.h
LARGEST = 2**64 - 1  # of a whole number in settings, as of torch's seeds
# What the system says of a path that is full, forbidden, of another kind, or too long.
UNUSABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.EEXIST, errno.ELOOP,
}  # fmt: skip
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # as of Lustre without -o flock, or NFS without its daemon
# How the system, torch, its zip writer and numpy say that a disk is full.
FULL = ("No space left", "Disk quota", "file write failed", "unexpected pos", "requested and")


class UserError(Exception):
    """A mistake in settings or files; the message says what is wrong, then what to do."""


class Stop:
    """Remembers that SIGUSR1, SIGTERM or Ctrl-C came; made before the long imports, else that ends the process.

    A second Ctrl-C ends it at once.
    """

    def __init__(self):
        self.asked = False
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nstops after this step, saved; Ctrl-C again: at once\n")  # print may be in use just now


def age_s() -> float:
    """Seconds since the process began, less the interpreter's own start (some 20 ms)."""
    return time.perf_counter() - BEGAN


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def started() -> str:
    """When the process began, as `now` writes it."""
    return (datetime.now(UTC) - timedelta(seconds=age_s())).isoformat(timespec="seconds")


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with what `main` returns; a user's mistake is one line on stderr and exit code 1.

    A mistake is a UserError or one of `trainer.chat` and `trainer.rows`, whose errors are ValueErrors with words of
    their own, or a path that cannot be used; any other exception is a fault of ours and keeps its traceback.
    """
    from trainer.chat import ChatError
    from trainer.rows import RowsError

    try:
        sys.exit(main())
    except (UserError, ChatError, RowsError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        path = error.filename or ("the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None)
        if error.errno not in UNUSABLE or not path:
            raise
        sys.exit(f"error: {cannot('used', path, error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def cannot(be: str, path: Path | str, error: Exception) -> UserError:
    """That a file or folder could not `be` read or written, and what to do."""
    words = getattr(error, "strerror", None) or " ".join(str(error).split())
    full = any(said in str(error) for said in FULL)
    advice = "free disk space and start again" if full else "mend that, or give another path"
    return UserError(f"{path} could not be {be} ({words}): {advice}")


def read_config(file: Path, schema: Path) -> SimpleNamespace:
    """The settings that a recipe's YAML file `schema` names, as `file` has them; it may hold others too.

    Raises UserError for a setting that is missing or of another kind than its default (a null default tells nothing).
    """
    values, defaults = _settings(file), default_settings(schema)
    if missing := [key for key in defaults if key not in values]:
        raise UserError(f"{file} lacks {', '.join(missing)}: give every setting of {schema.name}")
    check_kinds(values, defaults, f"{file}: ")
    return SimpleNamespace(**{key: values[key] for key in defaults})


def check_kinds(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "") -> None:
    """Raises UserError, which begins with `where`, for a setting of another kind than its default; null has none."""
    for key, default in defaults.items():
        kind = (int, float) if isinstance(default, float) else object if default is None else type(default)
        if not isinstance(values[key], kind) or isinstance(values[key], bool) != isinstance(default, bool):
            raise UserError(f"{where}{key} is {values[key]!r}; expected something like {default!r}")


def default_settings(schema: Path) -> dict[str, Any]:
    """Every setting of a recipe with its default, with those of the recipe that its YAML says it is `like`."""
    about, settings = _documents(schema)[0], _settings(schema)
    like = about.get("like") if isinstance(about, dict) else None
    return {**default_settings(schema.with_name(f"{like}.yaml")), **settings} if like else settings


def check_numbers(config: SimpleNamespace, keys: list[str], kind: type[int] | type[float], low: int) -> None:
    """Raises UserError for a setting that is no number of that kind, lower than `low`, or huge; null passes."""
    for key in keys:
        value = getattr(config, key)
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if fits and kind is int and value > LARGEST:
            raise UserError(f"{key} is {value!r}: give a smaller number")
        if value is not None and not (fits and low <= value < math.inf):
            raise UserError(f"{key} is {value!r}: give {'a whole' if kind is int else 'a'} number of at least {low}")


def check_choice(config: SimpleNamespace, key: str, choices: Iterable[str]) -> None:
    """Raises UserError for a setting that is none of these."""
    if getattr(config, key) not in choices:
        raise UserError(f"{key} is {getattr(config, key)!r}: choose {' or '.join(choices)}")


def folder_of(config: SimpleNamespace, key: str) -> Path:
    """The existing file or folder that a setting names. Raises UserError."""
    value = getattr(config, key)
    if not isinstance(value, str) or not Path(value).exists():
        raise UserError(f"{key} is {value!r}, which is not there: give the path of a file or folder")
    return Path(value)


def write_text(file: Path, text: str) -> None:
    """Writes beside, then renames: the file is whole or as it was. An OSError names it."""
    beside = file.with_name(f".{file.name}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())  # before the name: a machine that dies must leave no empty file
    except OSError as error:
        error.filename = error.filename or str(file)  # a full disk says so without a name
        with suppress(OSError):
            beside.unlink()
        raise
    beside.replace(file)


def write_json(file: Path, value: Any) -> None:
    """As `write_text`, indented by one."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(file: Path) -> Any:
    """Raises UserError for a file that holds none."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): it was cut off or changed; remove it, or mend it") from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends well: whole or not there."""
    beside, old = (folder.with_name(f".{folder.name}.{word}") for word in ("tmp", "old"))
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for file in beside.rglob("*"):  # onto the disk before the name, as above
            if file.is_file():
                with file.open("rb") as data:
                    os.fsync(data.fileno())
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # it may be what fills the disk
        raise
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def done_steps(out: Path) -> float:
    """Steps of a finished run, without end where it diverged; 0 where it is not finished."""
    file = out / "DONE"
    done = read_json(file) if file.is_file() else {"step": 0}
    return math.inf if done.get("diverged") else done["step"]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from working in a folder while the block runs. Raises UserError where one does.

    A file system that has no locks keeps nobody out.
    """
    with (folder / ".working").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process works in {folder}: wait for it, or stop it") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def pick_device(name: str | None) -> torch.device:
    """The device that a setting names; null is cuda where there is one, else cpu. Raises UserError."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {name!r} does not exist: give cuda, cpu or null") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"device {name!r} is not here: give {'cuda or ' if torch.cuda.is_available() else ''}cpu, or null"
        )
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had; torch's allocator on the CPU says so in a plain RuntimeError."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def within_memory(work: Callable[[], float]) -> tuple[float, bool]:
    """What `work` returns, and whether memory ran out instead."""
    try:
        return work(), False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 0.0, True


def describe_device(device: torch.device) -> dict[str, Any]:
    """`device`, its name, and `device_mem_bytes`, all the memory that it has."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return {"device": torch.cuda.get_device_name(device), "device_mem_bytes": total}
    return {"device": "cpu", "device_mem_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


def peak_memory(device: torch.device) -> dict[str, Any]:
    """`peak_mem_bytes` so far and its kind: what torch allocated on a GPU, else the process's resident memory."""
    import torch

    if device.type == "cuda":
        return {
            "peak_mem_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
            "mem_kind": "allocated",
        }
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return {"peak_mem_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "mem_kind": "host_rss"}


def _settings(file: Path) -> dict[str, Any]:
    """The last document of a YAML file: a recipe's has one before it, which says what the recipe can do."""
    values = _documents(file)[-1]
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no settings: expected lines of `key: value`")
    return values


def _documents(file: Path) -> list[Any]:
    """The documents of a YAML file; one of nothing where there is none."""
    try:
        return list(yaml.safe_load_all(file.read_text(encoding="utf-8"))) or [None]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
