"""The `#SBATCH` lines of a script: what is read, and what is refused by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiplog.engines.job import read_options
from chiplog.errors import EngineError


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"--cpus-per-task=abc", "is no number of CPUs"),
        (b"--cpus-per-task=0", "is no number of CPUs"),
        (b"--cpus-per-task", "is no number of CPUs"),
        (b'--job-name="open', "No closing quotation"),
        (b"--job-name=\xff", "can't decode"),
        (b"--job-name=a\0b", "is no name"),
        (b"--output=", "is no name"),
        (b"--time=soon", "is no time"),
        (b"--time=99999999999999999999", "is no time"),
        (b"--gres=gpu:many", "is no number of GPUs"),
        (b"--gres=2", "is no number of GPUs"),
        (b"--gpus=a100:x", "is no number of GPUs"),
    ],
)
def test_an_option_that_a_person_broke_is_named_by_file_and_line(tmp_path: Path, line: bytes, words: str):
    (tmp_path / "run.sbatch").write_bytes(b"#!/bin/bash\n# words\n#SBATCH " + line + b"\necho hi\n")
    with pytest.raises(EngineError, match=words) as refused:
        read_options(tmp_path / "run.sbatch")
    assert "run.sbatch, line 3: " in str(refused.value)


def test_options_are_read_as_slurm_reads_them(tmp_path: Path):
    (tmp_path / "s").write_bytes(
        b"#!/bin/bash\r\n#SBATCH --time 0 --gpus=a100:2\r\n#SBATCH --cpus-per-task 3\r\n\xff\n"
    )
    options = read_options(tmp_path / "s")
    assert (options.time_limit_s, options.gpus, options.cpus) == (None, 2, 3)
