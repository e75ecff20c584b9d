"""One pass over the rows of a split: what each would teach a model, and how many tokens it takes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import Field

from chiplog.checks.row_index import Place, RowIndex
from chiplog.schema import Frozen
from chiplog.trainer_files import load_trainer_file

Row = dict[str, Any]
MAX_COLUMNS = 100


class TokenCounts(Frozen):
    """Tokens of the samples of a split, as the model's tokenizer and chat template make them."""

    total: int = Field(description="Tokens of all samples, prompts included, without padding.")
    label: int = Field(description="Tokens to be learnt: the answers and their end tokens.")
    mean: float = Field(description="Tokens a sample, mean.")
    p50: int = Field(description="Tokens a sample, median.")
    p95: int = Field(description="Tokens a sample, 95th percentile.")
    max: int = Field(description="Tokens of the longest sample.")


class Sample(NamedTuple):
    """A row as a model sees it."""

    shape: str
    content: str  # all of it
    asked: str | None  # what comes before the answer; None in plain text
    empty: bool  # nothing in it could be learnt


@dataclass
class Tally:
    """How many rows are wrong in one way, and the first in words."""

    n: int = 0
    first: str = ""

    def add(self, words: object) -> None:
        self.n += 1
        self.first = self.first or str(words)


@dataclass
class Samples:
    """What the rows of one split came to."""

    rows: int = 0
    cut: bool = False  # there are more than were asked for
    unreadable: Any = None  # the RowsError that ended the reading
    columns: dict[str, None] = field(default_factory=dict)
    shapes: dict[str, Place] = field(default_factory=dict)  # the first row of each
    unusable: Tally = field(default_factory=Tally)  # rows that make no sample
    empty: Tally = field(default_factory=Tally)
    uncounted: Tally = field(default_factory=Tally)  # samples that the tokenizer refuses
    lengths: array[int] = field(default_factory=lambda: array("I"))  # tokens of each sample
    n_label: int = 0

    @property
    def tokens(self) -> TokenCounts | None:
        """Percentiles are nearest-rank. None where no tokens were counted, or not of every sample."""
        if not self.lengths or self.uncounted.n:
            return None
        ranked, total = sorted(self.lengths), sum(self.lengths)
        p50, p95 = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95))
        mean = round(total / len(ranked), 2)
        return TokenCounts(total=total, label=self.n_label, mean=mean, p50=p50, p95=p95, max=ranked[-1])


def read_samples(
    rows: Iterable[Row], split: str, index: RowIndex, count: Callable[[Row], Any] | None, limit: int | None = None
) -> Samples:
    """Puts each usable row into the index. `count` gives a row's token ids, as a ChatTokenizer does; None counts none.

    A row that cannot be read ends the pass and stands in the answer.
    """
    found, chat = Samples(), load_trainer_file("chat")
    try:
        for number, row in enumerate(rows, 1):
            if limit is not None and number > limit:
                found.cut = True
                break
            found.rows = number
            _look(row, Place(split, number), found, index, count, chat)
    except load_trainer_file("rows").RowsError as error:
        found.unreadable = error
    return found


def _look(
    row: Row, place: Place, found: Samples, index: RowIndex, count: Callable[[Row], Any] | None, chat: ModuleType
) -> None:
    if len(found.columns) < MAX_COLUMNS:
        found.columns.update(dict.fromkeys(row))
    if not any(value.strip() if isinstance(value, str) else value for value in row.values()):
        found.empty.add(place)
        return
    try:
        sample = _sample(row, chat)
    except (chat.ChatError, RecursionError) as error:  # RecursionError: brackets too deep even to be shown
        found.unusable.add(f"{place}: {error}")
        return
    found.shapes.setdefault(sample.shape, place)
    if sample.empty:
        found.empty.add(place)
        return
    index.add(place, sample.content, sample.asked)
    if count is None or found.uncounted.n:
        return
    try:
        example = count(row)
    except Exception as error:  # ChatError, or anything: a chat template is a program
        found.uncounted.add(f"{place}: {error}")
        return
    found.lengths.append(len(example.ids))
    found.n_label += len(example.ids) - example.n_prompt


def _sample(row: Row, chat: ModuleType) -> Sample:
    """Raises ChatError for a row that neither training nor evaluation could use."""
    shape = chat.shape_of(row)
    if shape == "text":
        if not isinstance(row["text"], str):
            raise chat.ChatError(f"the column text holds {row['text']!r:.80}; expected text")
        return Sample(shape, row["text"], None, not row["text"].strip())
    messages = chat.messages_of(row)
    answer = chat.answer_of(messages) or ""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return Sample(shape, repr(messages), repr(messages[:last]), not answer.strip())
