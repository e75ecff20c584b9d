"""One pass over the rows of a split: what each would teach a model, and how many tokens it takes."""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import Field, PrivateAttr

from chiplog.checks.row_index import Place, RowIndex
from chiplog.estimate.tokens import token_stats
from chiplog.schema import Frozen
from chiplog.trainer_files import load_trainer_file

Row = dict[str, Any]
MAX_COLUMNS = 100
COUNTED = 20_000  # samples of a split; where their lengths spread as much as their mean, the total is known to 1.2 %
LONGEST = 8  # rows of most characters, which are counted beside a random sample: the longest decides the memory


class TokenCounts(Frozen):
    """Tokens of the samples of a split, as the model's tokenizer and chat template make them."""

    total: int = Field(description="Tokens of all samples, prompts included, without padding.")
    label: int = Field(description="Tokens to be learnt: the answers and their end tokens.")
    mean: float = Field(description="Tokens a sample, mean.")
    p50: int = Field(description="Tokens a sample, median.")
    p95: int = Field(description="Tokens a sample, 95th percentile.")
    max: int = Field(description="Tokens of the longest sample.")
    sampled: int | None = Field(
        default=None, description="Samples counted, at random, where there are very many; null: all."
    )
    total_low: int | None = Field(
        default=None, description="Lower end of the total's 90 % interval; null: all counted."
    )
    total_high: int | None = Field(default=None, description="Upper end.")
    _lengths: array[int] = PrivateAttr(default_factory=lambda: array("I"))

    @property
    def lengths(self) -> array[int]:
        """Tokens of each sample that was counted, in their order; no part of what is compared and written."""
        return self._lengths

    @property
    def in_words(self) -> str:
        """The total, with its interval where it was estimated."""
        return f"about {self.total} ({self.total_low} to {self.total_high})" if self.sampled else str(self.total)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenCounts) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


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
class Lengths:
    """Tokens of a split's samples, in their order: of all, or of a random `most` where there are more.

    Algorithm R of Vitter, Random Sampling with a Reservoir, ACM TOMS 11 (1985).
    """

    most: int
    seed: int = 0
    n_rows: int = 0  # samples that came by
    tokens: array[int] = field(default_factory=lambda: array("I"))
    labels: array[int] = field(default_factory=lambda: array("I"))

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def wants(self) -> bool:
        """Whether the next sample is to be counted, and then given to `add`."""
        self.n_rows += 1
        if self.n_rows <= self.most:
            return True
        if (slot := self._random.randrange(self.n_rows)) >= self.most:
            return False
        del self.tokens[slot], self.labels[slot]
        return True

    def add(self, example: Any) -> None:
        """The first token is learnt by none: nothing stands before it."""
        self.tokens.append(len(example.ids))
        self.labels.append(len(example.ids) - max(example.n_prompt, 1))


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
    lengths: Lengths = field(default_factory=lambda: Lengths(COUNTED))
    longest: list[tuple[int, int, Row]] = field(default_factory=list)  # heap: characters, number of the row, row
    longest_tokens: int = 0  # of those, where only a sample was counted

    @property
    def tokens(self) -> TokenCounts | None:
        """None where no tokens were counted, or a sample could not be."""
        if not self.lengths.tokens or self.uncounted.n:
            return None
        n, rows = len(self.lengths.tokens), self.lengths.n_rows
        found = token_stats(self.lengths.tokens, self.lengths.labels, n_rows=rows, longest=self.longest_tokens)
        drawn = (n, found.total_low, found.total_high) if n < rows else (None, None, None)
        counts = TokenCounts(
            total=found.total, label=found.label_total, mean=round(found.mean, 2), p50=found.quantiles.p50,
            p95=found.quantiles.p95, max=found.quantiles.max, sampled=drawn[0], total_low=drawn[1], total_high=drawn[2],
        )  # fmt: skip
        counts._lengths = self.lengths.tokens
        return counts


def read_samples(
    rows: Iterable[Row], split: str, index: RowIndex, count: Callable[[Row], Any] | None, limit: int | None = None
) -> Samples:
    """Puts each usable row into the index. `count` gives a row's token ids, as a ChatTokenizer does; None counts none.

    Of very many rows a random sample is counted, and those with most characters, so that the longest is known.
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
    if count and found.lengths.n_rows > found.lengths.most:
        examples = (_count(row, Place(split, number), found, count) for _, number, row in found.longest)
        found.longest_tokens = max((len(example.ids) for example in examples if example), default=0)
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
    kept = (len(sample.content), place.row, row)
    (heapq.heappush if len(found.longest) < LONGEST else heapq.heappushpop)(found.longest, kept)
    if found.lengths.wants() and (example := _count(row, place, found, count)):
        found.lengths.add(example)


def _count(row: Row, place: Place, found: Samples, count: Callable[[Row], Any]) -> Any:
    """What the tokenizer makes of a row; None where it refuses, which is noted."""
    try:
        return count(row)
    except Exception as error:  # ChatError, or anything: a chat template is a program
        found.uncounted.add(f"{place}: {error}")
        return None


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
