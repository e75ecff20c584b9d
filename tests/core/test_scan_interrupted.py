"""A scan that is stopped: by Ctrl-C, by a kill, by a full disk, by a folder that is not to be written to."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from chiplog.ledger import Ledger, scan
from tests.core.test_parsers import TRAINER

MANY = 190  # logs: read in this process, some batches of them
COMMAND = [sys.executable, "-m", "chiplog.cli", "scan-logs", "--paths"]
# As another user than root, whom no permission stops; what is imported is imported before.
READ_ONLY = """
import os, sys
from pathlib import Path
from chiplog.errors import RecordError
from chiplog.ledger import Ledger, scan
logs, ledger = Path(sys.argv[1]), Path(sys.argv[2])
scan.scan([logs], Ledger(Path(sys.argv[3])))
if os.geteuid() == 0:
    os.seteuid(65534)
print(len(Ledger(ledger).records()))
try:
    scan.scan([logs], Ledger(ledger))
except RecordError as error:
    print(error)
"""


@pytest.fixture
def logs(workspace: Path) -> Path:
    """A workspace with many logs, of which the ledger has one."""
    folder = workspace / "logs"
    folder.mkdir()
    (folder / "first.log").write_text(TRAINER)
    scan.scan([folder], Ledger())
    for number in range(MANY):
        (folder / f"{number}.log").write_text(TRAINER)
    return folder


def is_whole(logs: Path) -> None:
    """Another scan reads what is missing, and nothing was lost."""
    assert "first.log" in {Path(record.logs[0]).name for record in Ledger().records()}
    scan.scan([logs], Ledger())
    assert len(Ledger().records()) == MANY + 1 and scan.scan([logs], Ledger()).read == 0


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_loses_no_more_than_what_is_being_read(logs: Path, sign: signal.Signals):
    process = subprocess.Popen([*COMMAND, str(logs)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while len(Ledger().seen()) == 1 and process.poll() is None:
        pass
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    if sign is signal.SIGINT and process.returncode:  # it may have been done before
        assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert len(Ledger().seen()) > 1
    is_whole(logs)


def test_a_full_disk_is_named_and_what_was_there_stays(logs: Path):
    room = Ledger().file.stat().st_size + 20_000

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    process = subprocess.run([*COMMAND, str(logs)], capture_output=True, text=True, preexec_fn=full, check=False)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    words = " ".join(process.stderr.split())
    assert "cannot be used" in words and "free disk space" in words
    is_whole(logs)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users may look into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name, "home").chmod(0o755)


def test_a_ledger_that_is_only_to_be_read_is_read_and_named(workspace: Path, shared: Path):
    (shared / "logs").mkdir()
    (shared / "logs" / "a.log").write_text(TRAINER)
    ledger = shared / "home" / "ledger.sqlite"
    scan.scan([shared / "logs"], Ledger(ledger))
    (shared / "logs" / "b.log").write_text(TRAINER)
    ledger.chmod(0o444)
    ledger.parent.chmod(0o555)
    arguments = [str(shared / "logs"), str(ledger), str(workspace / "warm.sqlite")]
    process = subprocess.run(
        [sys.executable, "-c", READ_ONLY, *arguments], capture_output=True, text=True, check=False, cwd=shared
    )
    assert process.returncode == 0, process.stderr
    n, error = process.stdout.splitlines()[0], process.stdout
    assert n == "1" and "readonly" in error and "Mend its permissions" in error
    assert len(Ledger(ledger).records()) == 1 and os.access(ledger, os.R_OK)
