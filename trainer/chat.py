"""From a row of a data set to the token ids that a model sees.

Training, evaluation and the planner's token counts all go through this file, so they share one prompt. It needs
jinja2 and tokenizers only: the planner loads it by its path on machines without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Message = dict[str, str]
Shape = Literal["chat", "instruct", "text"]

# Columns that hold what is asked and what should be answered, the first pair that a row has.
INSTRUCT = [
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
]
# Beside an instruction, what it is about: Alpaca's name and Dolly's. Beside any question, a system message.
ABOUT, SYSTEM = ("input", "context"), ("system", "system_prompt")
# Columns that hold a whole chat.
CHATS = ("messages", "conversations", "conversation")
# ShareGPT's names of the roles, and Gemma's.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# The day that Llama 3's own templates write when they have no clock.
TODAY = datetime(2024, 7, 26)


class ChatError(ValueError):
    """A row, a prompt or a model folder that cannot be turned into token ids; the message says what to do."""


@dataclass(frozen=True)
class Example:
    """Token ids of one sample, prompt first; the first `n_prompt` are given, the others are to be learnt."""

    ids: list[int]
    n_prompt: int


def shape_of(row: Mapping[str, Any]) -> Shape:
    """What kind of row this is: "chat", "instruct" or "text". Raises ChatError for columns it does not know."""
    if any(column in row for column in CHATS):
        return "chat"
    if any(asked in row and answer in row for asked, answer in INSTRUCT):
        return "instruct"
    if "text" in row:
        return "text"
    pairs = ", ".join(f"{asked} with {answer}" for asked, answer in INSTRUCT)
    raise ChatError(
        f"a row has the columns {', '.join(row) or '(none)'}; expected {', '.join(CHATS)}, {pairs}, or text"
    )


def messages_of(row: Mapping[str, Any], system_prompt: str | None = None, prompt: str = "{input}") -> list[Message]:
    """A chat or instruct row as messages, `{"role", "content"}` each.

    `prompt` is what the user says; `{input}` in it stands for the row's input, which in a chat is the last user
    message before the last answer. `system_prompt` comes first unless the row has a system message of its own.
    Raises ChatError for unknown columns, for a value that is no text and for a prompt without `{input}`.
    """
    if "{input}" not in prompt:
        raise ChatError(f"prompt {prompt!r} does not contain {{input}}: every sample would ask the same")
    match shape_of(row):
        case "chat":
            messages = _chat(row)
        case "instruct":
            messages = _instruct(row)
        case "text":
            raise ChatError("a row with the column text has no prompt to answer: it can be trained on, not evaluated")
    before = messages[: _last_answer(messages)]
    asked = max((i for i, message in enumerate(before) if message["role"] == "user"), default=None)
    if asked is not None:
        # replace, never format: the row's own text may hold braces
        content = prompt.replace("{input}", messages[asked]["content"])
        messages[asked] = {"role": "user", "content": content}
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def answer_of(messages: list[Message]) -> str | None:
    """The last assistant message, which training learns and evaluation expects; None where there is none."""
    last = _last_answer(messages)
    return messages[last]["content"] if last < len(messages) else None


class ChatTokenizer:
    """The tokenizer and the chat template of a model folder in Hugging Face format.

    Templates that ask for the date (Llama 3's do, through `strftime_now`) always get 26 July 2024: a run that
    trains before midnight and evaluates after it must not change its prompt. All else is as in transformers.
    """

    def __init__(self, model_dir: str | Path):
        """Raises ChatError when `tokenizer.json` is missing or unreadable; the template is read when first used."""
        self.model_dir = Path(model_dir)
        file = self.model_dir / "tokenizer.json"
        if not file.is_file():
            raise ChatError(f"{file} is missing: download the model with its tokenizer, or save it with transformers")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ChatError(f"{file} cannot be read ({error}): download it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = self._read("special_tokens_map.json") | self._read("tokenizer_config.json")
        self._special = {name: token for name in self._config if (token := self._token(name)) is not None}

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """What the model is given: all messages before the last answer, then the opening of its turn."""
        return self._encode(self._render(messages[: _last_answer(messages)], add_generation_prompt=True))

    def example(self, messages: list[Message]) -> Example:
        """The prompt and the last answer through its end-of-turn token; `ids[:n_prompt]` are the `prompt_ids`.

        Raises ChatError when there is no answer.
        """
        last = _last_answer(messages)
        if last == len(messages):
            raise ChatError("a sample has no assistant message: there is nothing to learn from it")
        prompt = self._render(messages[:last], add_generation_prompt=True)
        whole = self._render(messages[: last + 1], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ChatError(
                f"the chat template of {self.model_dir} writes a prompt differently once it is answered: "
                "the model would be trained on another prompt than it is asked"
            )
        prompt_ids, ids = self._encode(prompt), self._encode(whole)
        if ids[: len(prompt_ids)] != prompt_ids:  # a token spans the seam, which generation could never write
            ids = prompt_ids + self._encode(whole[len(prompt) :])
        return Example(self._ended(ids, len(prompt_ids)), len(prompt_ids))

    def text_example(self, text: str) -> Example:
        """Plain text between the begin and end tokens, all of it learnt."""
        begin = [self._id(self._special["bos_token"])] if "bos_token" in self._special else []
        ids = begin + self._encode(text)
        return Example(self._ended(ids, len(ids)), 0)

    def row_example(self, row: Mapping[str, Any], system_prompt: str | None, prompt: str) -> Example:
        """The sample that a row of any shape gives. Raises ChatError as `messages_of` and `example` do."""
        if shape_of(row) == "text":
            return self.text_example(_text(row, "text"))
        return self.example(messages_of(row, system_prompt, prompt))

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @cached_property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer, the tokenizer's own first. Raises ChatError when the folder names none."""
        listed = self._read("generation_config.json").get("eos_token_id", self._read("config.json").get("eos_token_id"))
        own = [self._id(self._special["eos_token"])] if "eos_token" in self._special else []
        ids = own + (listed if isinstance(listed, list) else [] if listed is None else [listed])
        if not ids:
            raise ChatError(f"{self.model_dir} names no end token: set eos_token in tokenizer_config.json")
        return list(dict.fromkeys(ids))

    @cached_property
    def pad_id(self) -> int:
        """Id that fills up a batch; the end token where the tokenizer has none of its own. It is always masked."""
        return self._id(self._special["pad_token"]) if "pad_token" in self._special else self.eos_ids[0]

    @cached_property
    def _template(self):
        file = self.model_dir / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self._config.get("chat_template")
        if isinstance(source, list) and all(isinstance(each, dict) for each in source):
            source = next((each.get("template") for each in source if each.get("name") == "default"), None)
        if not isinstance(source, str):
            raise ChatError(
                f"{self.model_dir} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): take the model's instruct variant, or copy its template into the folder"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise ChatError(f"the chat template of {self.model_dir} cannot be read: {error}") from error

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (TemplateError, TypeError) as error:  # TypeError: {{ 1 + 'a' }}
            raise ChatError(f"the chat template of {self.model_dir} refuses these messages: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _ended(self, ids: list[int], n_before: int) -> list[int]:
        """`ids` through the last end token after the first `n_before`; with one added where there is none."""
        ends = [i for i in range(n_before, len(ids)) if ids[i] in self.eos_ids]
        return ids[: ends[-1] + 1] if ends else [*ids, self.eos_ids[0]]

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ChatError(f"{self.model_dir}: the special token {token!r} is not in tokenizer.json")
        return found

    def _token(self, name: str) -> str | None:
        value = self._config[name] if name.endswith("_token") else None
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _read(self, name: str) -> dict[str, Any]:
        file = self.model_dir / name
        try:
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise ChatError(f"{file} is not JSON ({error}): download it again") from error
        if not isinstance(values, dict):
            raise ChatError(f"{file} is no JSON object: download it again")
        return values


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the answer; here it writes what it holds."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # jinja2's own escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise TemplateError(message)


def _last_answer(messages: list[Message]) -> int:
    """Index of the last assistant message; past the end where there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))


def _chat(row: Mapping[str, Any]) -> list[Message]:
    column = next(column for column in CHATS if column in row)
    return _turns(row[column], column)


def _turns(turns: Any, column: str) -> list[Message]:
    """A list of objects with role and content, or with from and value as ShareGPT has them, as messages."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ChatError(
            f"the column {column} holds {turns!r:.80}; expected a list of objects with role and content, "
            "or with from and value"
        )
    role, content = ("from", "value") if "from" in turns[0] else ("role", "content")
    spoken = [(_text(turn, role), _text(turn, content)) for turn in turns]
    return [{"role": ROLES.get(who, who), "content": said} for who, said in spoken]


def _instruct(row: Mapping[str, Any]) -> list[Message]:
    asked, answer = next(pair for pair in INSTRUCT if pair[0] in row and pair[1] in row)
    if isinstance(row[asked], list) and isinstance(row[answer], list):  # both as messages, as TRL has them too
        return _turns(row[asked], asked) + _turns(row[answer], answer)
    question = _text(row, asked)
    about = next((column for column in ABOUT if asked == "instruction" and row.get(column)), None)
    if about:
        question = f"{question}\n\n{_text(row, about)}"
    system = next((column for column in SYSTEM if row.get(column)), None)
    messages = [{"role": "system", "content": _text(row, system)}] if system else []
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": _text(row, answer)}]


def _text(row: Mapping[str, Any], column: str) -> str:
    """Text, whole or in parts as some chats have it: `[{"type": "text", "text": "Hello"}]`."""
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(_text(part, "text") for part in value)
    if not isinstance(value, str):
        raise ChatError(f"the column {column} holds {value!r:.80}; expected text")
    return value
