"""Logs that nobody meant as logs: whatever the bytes, a parser ends, in bounded memory, with a record."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from chiplog import ledger
from chiplog.errors import RecordError
from chiplog.ledger.parse import parse_log
from chiplog.ledger.reader import MANY, RUNS, Pattern
from chiplog.record import Record
from tests.core.test_parsers import BAR, GPU_OOM, KERAS, LIGHTNING, MAXTEXT, MEGATRON, SACCT, TORCHTUNE, TRAINER

MEMORY = 64 << 20  # bytes, of any log
LARGEST = 4 << 20  # bytes of the logs that are made here
HANGS_S, RUNS_AWAY_S = 120, 30  # no measures: many times what the slowest log, and expression, takes
PIECES = [TORCHTUNE, TRAINER, MEGATRON, LIGHTNING, KERAS, MAXTEXT, SACCT, GPU_OOM, BAR, "\r", "\x1b[1m", "\0", "\n"]


def patterns() -> list[Pattern]:
    """Every pattern of every parser."""
    names = [module.name for module in pkgutil.walk_packages(ledger.__path__, "chiplog.ledger.")]
    values = itertools.chain.from_iterable(vars(importlib.import_module(name)).values() for name in names)
    found = itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
    return list(dict.fromkeys(value for value in found if isinstance(value, Pattern)))


PATTERNS = patterns()


def matching(wanted: Pattern) -> st.SearchStrategy[bytes]:
    """Text that the pattern matches, and the beginnings of such text."""
    text = wanted.regex.pattern.decode("latin-1").replace("*+", "*").replace("++", "+")
    whole = st.from_regex(re.compile(text, re.MULTILINE)).map(lambda match: match.encode(errors="replace"))
    return st.tuples(whole, st.floats(0.2, 1)).map(lambda drawn: drawn[0][: int(len(drawn[0]) * drawn[1]) + 1])


def part(piece: str) -> st.SearchStrategy[bytes]:
    """Some of a real log."""
    ends = st.tuples(st.integers(0, len(piece)), st.integers(0, len(piece)))
    return ends.map(lambda drawn: piece[min(drawn) : max(drawn)].encode())


def repeated(piece: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    times = st.sampled_from([1, 1, 1, 1, 40, 20_000])
    return st.tuples(piece, times).map(lambda drawn: (drawn[0] * drawn[1])[:LARGEST])


@contextmanager
def bounded(seconds: int = HANGS_S) -> Iterator[None]:
    """Fails if what is done within hangs, or holds more memory at once than any log may take."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak < MEMORY, f"{peak >> 20} MiB"


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    phases=set(Phase) - {Phase.explain},  # which traces every line, and so takes longer than any hang
)
@given(
    st.lists(
        st.one_of(
            repeated(st.sampled_from(PIECES).flatmap(part)),
            repeated(st.sampled_from(PATTERNS).flatmap(matching)),
            repeated(st.binary(max_size=60)),
        ),
        max_size=8,
    )
)
@example([b"\n{'loss': 1.0}" * 200_000])
@example([b"Epoch 1: 5%|  | 5/100 [00:01<00:10, 5.00it/s, loss=1.0]\r" * 60_000])
@example([b"loss: " * 600_000])
@example([b"iteration 1/2 | " * 200_000])
@example([TRAINER.encode() * RUNS])
@example([LIGHTNING.encode() * RUNS])
@example([SACCT.encode() * 16_000])
def test_no_bytes_make_a_parser_raise_hang_or_grow(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]):
    file = tmp_path_factory.mktemp("fuzz") / "a.log"
    file.write_bytes(b"".join(pieces)[:LARGEST])
    with bounded():
        try:
            parsed = parse_log(file)
        except RecordError as refused:
            assert f"more than {RUNS:,} runs: cut it into parts" in str(refused)
            return
    assert parsed.records and 0 <= parsed.read_to <= file.stat().st_size
    for record in parsed.records:
        assert Record.model_validate_json(record.model_dump_json()).key == record.key
    file.unlink()


@pytest.mark.parametrize("wanted", PATTERNS, ids=lambda wanted: wanted.regex.pattern.decode("latin-1")[:40])
def test_no_expression_runs_away(wanted: Pattern):
    for hint in wanted.hints or (b"a", b"1", b"/", b" "):
        for between in (b"", b" ", b": ", b"1", b" 1/2 "):
            text = (hint + between) * (80_000 // len(hint + between))
            with bounded(RUNS_AWAY_S):
                for _ in wanted.regex.finditer(text):
                    pass


def test_a_log_of_too_many_runs_is_refused(tmp_path: Path):
    file = tmp_path / "a.log"
    file.write_text(TORCHTUNE * (RUNS + 1))
    with bounded(), pytest.raises(RecordError, match=f"more than {RUNS:,} runs: cut it into parts"):
        parse_log(file)


def test_a_table_of_too_many_jobs_is_refused(tmp_path: Path):
    file = tmp_path / "jobs.txt"
    file.write_text("JobID|State\n" + "".join(f"{job}|FAILED\n" for job in range(300_000)))
    with bounded(), pytest.raises(RecordError, match=f"more than {MANY:,} jobs.*--starttime"):
        parse_log(file)


def test_a_log_of_gigabytes_is_read_at_its_ends(tmp_path: Path):
    file = tmp_path / "a.log"
    begins, ends = TORCHTUNE.encode()[:600], TORCHTUNE.encode()[-900:]
    with file.open("wb") as holes:  # the file system keeps no zeros
        holes.write(begins)
        holes.seek(2 << 30)
        holes.write(ends)
    with bounded():
        (record,) = parse_log(file).records
    assert record.usage.loss_last is not None
