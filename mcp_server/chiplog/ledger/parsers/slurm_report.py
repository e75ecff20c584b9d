"""What Slurm reports of a job that ended: `seff`, `sacct` in any of its forms, `scontrol show job`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from chiplog.errors import RecordError
from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import MANY, Found, LogReader, pattern
from chiplog.ledger.units import LARGEST, seconds, size, whole
from chiplog.record import OutOfMemory, State

SEFF = pattern(
    rb"^(?P<key>Job ID|Array Job ID|State|Cores per node|Nodes|Job Wall-clock time|Memory Utilized): *"
    rb"(?P<value>[^\n]+)",
    b": ",
)
WALL_CLOCK = pattern(rb"^Job Wall-clock time: +\d", b"Job Wall-clock time: ")
EXIT = re.compile(r"(?P<state>[A-Z_]+)(?: by \d+)?(?: \(exit code (?P<code>\d+)\))?")
STATES = {
    "OUT_OF_ME": State.OUT_OF_MEMORY,
    "BOOT_FAIL": State.NODE_FAIL,
    "DEADLINE": State.TIMEOUT,
    "REVOKED": State.CANCELLED,
}
TABLE = 1 << 26  # bytes of a table that are read
LINE = pattern(rb"^[^\n]+$")
HEADS = {b"JobID", b"JobIDRaw"}


def sniff(head: bytes, tail: bytes) -> float:
    if b"Job Wall-clock time: " in head + tail or b"CPU Efficiency: " in head + tail:
        # A job's own log may end with its report: then another parser reads the training.
        return 0.9 if len(head) < 4000 and b"it/s" not in head else 0.05
    first = head.partition(b"\n")[0]
    fields = set(re.split(rb"[|\s,]+", first))
    return 0.95 if fields & HEADS and b"State" in fields else 0.0


def parse(log: LogReader) -> list[Draft]:
    first = log.head.partition(b"\n")[0]
    if b"State" in first and b"JobID" in first:
        return _sacct(log) or [Draft(log.whole, "slurm")]
    draft = Draft(log.whole, "slurm")
    report(draft)
    return [draft]


def report(draft: Draft) -> None:
    """Notes what seff says at the end of a log."""
    log = draft.span.log.whole
    if not log.any(WALL_CLOCK):
        return
    values = {found["key"]: found for found in log.near(SEFF)}
    for key, name, read in (
        ("Job ID", "job_id", str),
        ("Job Wall-clock time", "elapsed_s", seconds),
    ):
        if found := values.get(key):
            draft.set(name, read(found["value"].split()[0]), found)
    if found := values.get("State"):
        ended(draft, found["value"], found)


def ended(draft: Draft, text: str, found: Found) -> None:
    """Notes a state in Slurm's words, `CANCELLED by 1000`, `COMPLETED (exit code 0)`."""
    match = EXIT.match(text.strip().rstrip("+"))
    if not match:
        return
    word = match["state"]
    known = STATES.get(word) or next((state for state in State if state.value == word), None)
    if known:
        draft.set("state", known, found)
        if known is State.OUT_OF_MEMORY:
            draft.default("oom", OutOfMemory(kind="host"), found)
        draft.set("reason", None if known is State.COMPLETED else f"Slurm says {text.strip()}", found)
        draft.set("exit_code", whole(match["code"]))


def _sacct(log: LogReader) -> list[Draft]:
    """One draft a job; its steps give what only they know, such as the largest memory."""
    jobs: dict[str, Draft] = {}
    for found, cells in _rows(log):
        job, _, step = (cells.get("JobID") or cells.get("JobIDRaw", "")).partition(".")
        if not re.fullmatch(r"\d+(?:_\d+|_\[[\d,%-]+\]|\+\d+)?", job):
            continue
        if job not in jobs and len(jobs) == MANY:
            raise RecordError(
                f"{log.path} tells of more than {MANY:,} jobs: write it in parts (sacct --starttime, --endtime)"
            )
        draft = jobs.setdefault(job, Draft(log.whole, "slurm"))
        draft.set("job_id", job)
        memory = size(cells.get("MaxRSS", ""))
        if memory and LARGEST > memory > (draft.get("peak_mem_bytes") or 0):
            draft.set("peak_mem_bytes", round(memory), found)
            draft.set("mem_kind", "host_rss")
        if step:
            continue
        draft.set("elapsed_s", seconds(cells.get("Elapsed")), found)
        limit = seconds(cells.get("Timelimit"))  # null for UNLIMITED and Partition_Limit
        draft.set("time_limit_s", round(limit) if limit and 1 <= limit < LARGEST else None, found)
        ended(draft, cells.get("State", ""), found)
        draft.set("started", _time(cells.get("Start")))
        draft.set("ended", _time(cells.get("End")))
        code = re.match(r"\d+", cells.get("ExitCode", ""))
        draft.set("exit_code", whole(code.group()) if code else None)
        if gpus := re.search(
            r"gres/gpu(?::[\w.-]+)?=(\d{1,6})\b", cells.get("AllocTRES", "") + cells.get("ReqTRES", "")
        ):
            draft.set("gpus", whole(gpus.group(1)), found)
    return list(jobs.values())


def _rows(log: LogReader) -> Iterator[tuple[Found, dict[str, str]]]:
    """Each line of a parsable or an aligned table, and its cells by column."""
    lines = log.whole.before(log.start + TABLE).all(LINE)
    first = list(itertools.islice(lines, 3))
    if not first:
        return
    head, *after = (_text(log, found) for found in first)
    names = head.split("|") if "|" in head else head.split()
    rule = next((line for line in after if re.fullmatch(r"[ -]+", line.strip() or "x")), None)
    spans = [match.span() for match in re.finditer(r"-+", rule or "")]
    for found in itertools.chain(first, lines):
        line = _text(log, found)
        if "|" in head:
            cells = line.split("|")
        else:
            cells = [line[a:b].strip() for a, b in spans] if rule else line.split()
        yield found, dict(zip(names, cells, strict=False))


def _text(log: LogReader, found: Found) -> str:
    return log.text(found.offset, found.end).decode(errors="replace")


def _time(text: str | None) -> str | None:
    return text if text and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text) else None
