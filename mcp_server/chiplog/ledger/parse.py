"""From a log, or all logs of one job, to records: the surest parser reads the runs, then what surrounds them."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from chiplog.errors import RecordError
from chiplog.ledger import parsers
from chiplog.ledger.draft import Draft
from chiplog.ledger.ending import end
from chiplog.ledger.models import take_model
from chiplog.ledger.parsers.nvidia_smi import cards
from chiplog.ledger.parsers.slurm_report import report
from chiplog.ledger.place import place
from chiplog.ledger.reader import OVERLAP, LogReader
from chiplog.record import Record, State, Usage

# What the files of one job say of its end: the surest comes first.
SUREST = [
    State.TIMEOUT, State.PREEMPTED, State.NODE_FAIL, State.OUT_OF_MEMORY, State.CANCELLED, State.FAILED,
    State.COMPLETED, State.INCOMPLETE, State.UNKNOWN, State.RUNNING, State.PENDING,
]  # fmt: skip
SCHEDULER = "slurm"  # the framework of a record that only a scheduler speaks of
UNSAID = (State.INCOMPLETE, State.UNKNOWN)
# Of a log that grew, what its first part said for good, and what is joined figure by figure.
KEPT = {"loss_first", "resumed_from", "device", "gpus", "resumed", "n_params"}
JOINED = {"val_losses", "checkpoint_s", "peak_mem_bytes", "mem_kind"}
RECORD_KEPT = {"key", "usage", "config", "evidence", "logs", "version", "attempt", "framework", "model", "started"}


@cache
def all_parsers() -> list[ModuleType]:
    """Every module of `ledger/parsers`."""
    names = sorted(module.name for module in pkgutil.iter_modules(parsers.__path__))
    return [importlib.import_module(f"{parsers.__name__}.{name}") for name in names]


class Parsed(NamedTuple):
    """The runs in a log, in their order, the byte after the last whole line, and which parser read it."""

    records: list[Record]
    read_to: int
    parser: str


def parse_log(path: Path, start: int = 0, parser: str | None = None) -> Parsed:
    """Reads a log from byte `start` on, by the named parser or the surest. Raises RecordError if it cannot."""
    with LogReader(path, start) as log:
        module = next((m for m in all_parsers() if _name(m) == parser), None) or _surest(log)
        try:
            records = [draft.record(_key(path, number)) for number, draft in enumerate(drafts(log, module))]
        except (ValueError, OverflowError, RecursionError) as error:
            raise RecordError(f"{path} cannot be made sense of, as a log of {_name(module)}: {error}") from error
        end = max(start, log.size - OVERLAP)
        last_line = log.text(end, log.size).rfind(b"\n")
        return Parsed(records, end + last_line + 1 if last_line >= 0 else start, _name(module))


def continued(before: Sequence[Record], after: Sequence[Record]) -> list[Record]:
    """The records of a log that grew: what was read later says more of the last run, and may begin new ones."""
    if not before or not after:
        return [*before, *after]
    *earlier, last = before
    going_on, *new = after
    usage = {key: value for key, value in last.usage if value is not None}
    settled = JOINED | (KEPT & usage.keys())
    usage |= {key: value for key, value in going_on.usage if value is not None and key not in settled}
    usage["val_losses"] = [*last.usage.val_losses, *going_on.usage.val_losses]
    if saved := going_on.usage.checkpoint_s:
        usage["checkpoint_s"] = saved + (last.usage.checkpoint_s or 0.0)
    if (peak := going_on.usage.peak_mem_bytes) and peak > (last.usage.peak_mem_bytes or 0):
        usage |= {"peak_mem_bytes": peak, "mem_kind": going_on.usage.mem_kind}
    steps, first, seconds = usage.get("steps"), usage.get("resumed_from") or 0, usage.get("train_s")
    if steps and seconds:
        usage["mean_steps_per_s"] = (steps - first) / seconds
    found = {entry.of: entry for entry in (*last.evidence, *going_on.evidence)}
    idle = going_on.usage.steps is None and going_on.usage.loss_last is None
    kept = {*RECORD_KEPT, *(("state", "reason") if idle and going_on.state in UNSAID else ())}
    known = {key: value for key, value in going_on if value not in (None, [], {}) and key not in kept}
    if "state" not in kept:  # how it ended, and nothing of how it had seemed to end
        known |= {key: getattr(going_on, key) for key in ("state", "reason", "exit_code", "oom")}
    for key in ("framework", "model", "job_id"):
        if getattr(last, key) is None:
            known[key] = getattr(going_on, key)
    if steps and steps >= (usage.get("steps_planned") or steps + 1) and going_on.state in UNSAID:
        known |= {"state": State.COMPLETED, "reason": None}
    merged = last.model_copy(
        update={
            **known,
            "config": {**going_on.config, **last.config},
            "usage": Usage.model_validate(usage),
            "evidence": list(found.values()),
        }
    )
    return [*earlier, merged, *(r.model_copy(update={"key": _renumbered(r.key, last.key)}) for r in new)]


def _renumbered(key: str, last: str) -> str:
    """The key of a run that follows the last one."""
    name, _, number = key.rpartition(":")
    return f"{name}:{int(number) + int(last.rpartition(':')[2])}"


def parse_job(paths: Sequence[Path]) -> list[Record]:
    """The runs of one job whose output went to several files; their keys are those of the first."""
    logs = [parse_log(path).records for path in paths]
    main = max(logs, key=lambda records: (sum(_n_known(record) for record in records), len(records)))
    *earlier, last = main
    for records in logs:
        if records is not main:
            last = joined(last, records[-1])
    return [r.model_copy(update={"key": _key(paths[0], number)}) for number, r in enumerate([*earlier, last])]


def drafts(log: LogReader, module: ModuleType) -> list[Draft]:
    """The runs as a parser reads them, with where they ran and how they ended."""
    found: list[Draft] = module.parse(log)
    for draft in found:
        if draft.get("framework") == SCHEDULER:  # a table of other jobs too
            continue
        place(draft, draft.span)
        cards(draft, draft.span)
        take_model(draft, log.whole)
        if draft.get("state") is None:
            end(draft, draft.span)
    if found and found[-1].get("elapsed_s") is None and found[-1].get("framework") != SCHEDULER:
        report(found[-1])  # seff, which some epilogues print at the end of the job's own log
    return found


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _surest(log: LogReader) -> ModuleType:
    return max(all_parsers(), key=lambda module: module.sniff(log.head, log.tail))


def joined(record: Record, other: Record) -> Record:
    """The record, with what only another file of its job says; of their ends, the surer one."""
    usage = {key: value for key, value in other.usage if value is not None} | {
        key: value for key, value in record.usage if value not in (None, [])
    }
    known: dict[str, Any] = {key: value for key, value in record if value not in (None, [], {})}
    values: dict[str, Any] = {key: value for key, value in other if value is not None} | known
    surer = min((record, other), key=lambda one: SUREST.index(one.state))
    values |= {key: getattr(surer, key) for key in ("state", "reason", "exit_code")}
    values["framework"] = record.framework
    values |= {
        "usage": Usage.model_validate(usage),
        "config": {**other.config, **record.config},
        "logs": [*record.logs, *other.logs],
        "evidence": [*record.evidence, *other.evidence],
    }
    return Record.model_validate(values)


def _n_known(record: Record) -> int:
    return sum(value not in (None, []) for _, value in record.usage)


def _key(path: Path, number: int) -> str:
    name = str(path.resolve()).removesuffix(".gz").encode(errors="surrogateescape")
    return f"log:{hashlib.sha256(name).hexdigest()[:16]}:{number}"
