"""A record while its log is still being read: figures, each with the line it comes from."""

from __future__ import annotations

from typing import Any

from chiplog.ledger.reader import Found, Span
from chiplog.ledger.units import LARGEST, size
from chiplog.record import Evidence, OutOfMemory, Record, State, Usage

MOST_EVIDENCE = 40


class Draft:
    """What is known of one run so far; what is not known is not there."""

    def __init__(self, span: Span, framework: str | None) -> None:
        self.span = span
        self.values: dict[str, Any] = {"framework": framework}
        self.config: dict[str, Any] = {}
        self.usage: dict[str, Any] = {}
        self.evidence: dict[str, Evidence] = {}
        self.progress = span.start  # where the last sign of work stands
        self.per_epoch = False  # whether its steps count anew each epoch
        self.done: Found | None = None  # where it says that it came to its end

    def set(self, name: str, value: Any, found: Found | None = None, printed: str | None = None) -> bool:
        """Notes a figure, if it is one: null is passed over. Says whether it was noted."""
        if value is None or value == "":
            return False
        if name in Usage.model_fields:
            self.usage[name] = value
        elif name in Record.model_fields:
            self.values[name] = value
        else:
            self.config[name] = value
        if found and len(self.evidence) < MOST_EVIDENCE:
            self.evidence[name] = Evidence(
                of=name, file=str(self.span.log.path), offset=found.offset, line=found.line, printed=printed
            )
        return True

    def get(self, name: str) -> Any:
        """A figure, or null."""
        for place in (self.usage, self.values, self.config):
            if name in place:
                return place[name]
        return None

    def default(self, name: str, value: Any, found: Found | None = None) -> bool:
        """Notes a figure that nothing better was said of."""
        return self.get(name) is None and self.set(name, value, found)

    def peak(self, text: str, kind: str, found: Found) -> None:
        """Notes a peak of memory, `12.3 GB` as torch prints it (a GB is 2^30 bytes), if it is larger than the last."""
        value = size(text, binary=True)
        if value and value < LARGEST and (self.get("mem_kind") != kind or value > self.get("peak_mem_bytes")):
            self.set("peak_mem_bytes", round(value), found, printed=text.replace(",", ""))
            self.set("mem_kind", kind)

    def worked(self, found: Found | None) -> None:
        """A sign of work: what stands before it did not end the run."""
        if found:
            self.progress = max(self.progress, found.offset)

    def record(self, key: str) -> Record:
        """The record, as far as it is known."""
        oom = self.values.get("oom")
        assert oom is None or isinstance(oom, OutOfMemory)
        return Record(
            **{"state": State.INCOMPLETE, **self.values, "key": key, "logs": [str(self.span.log.path)]},
            config=self.config,
            usage=Usage(**self.usage),
            evidence=list(self.evidence.values()),
        )
