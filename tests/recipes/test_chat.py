"""The prompt: rows as messages, messages as the token ids that transformers gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trainer.chat import ChatError, ChatTokenizer, messages_of, shape_of

USER = {"role": "user", "content": "  sines <b> {input} "}
ANSWER = {"role": "assistant", "content": "Sines"}
SYSTEM = {"role": "system", "content": "Capitalize the word."}
SINGLE = [USER, ANSWER]
MULTI = [SYSTEM, USER, ANSWER, {"role": "user", "content": "and\ncosines?"}, {"role": "assistant", "content": "Co é"}]

# Written after the templates of these families, with what is hard in them: whitespace control, loops that break,
# namespaces, the `generation` tag, tojson.
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|start|>system<|stop|>
{{ system_message }}<|end|>
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}
    {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}"""
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] }}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}

{% else %}
{{ message['content'] + '<|end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}{% endif %}"""
LOOPS = """{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% if ns.n > 9 %}{% break %}{% endif %}
{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ {'b': m.role, 'a': '<é>'} | tojson }}{{ m.content }}{{ eos_token }}{% endfor %}
{% if tools is not none %}tools{% endif %}{% if add_generation_prompt %}3{{ {'b': 'assistant'} | tojson }}{% endif %}"""
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "loops": LOOPS}


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of a model's tokenizer, whose template a test may change."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(llama / name, tmp_path)
    return tmp_path


def with_template(folder: Path, template: str | None) -> Path:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("chat_template")
    file.write_text(json.dumps(config | ({"chat_template": template} if template else {})))
    return folder


@pytest.mark.parametrize("messages", [SINGLE, [SYSTEM, *SINGLE], MULTI], ids=["single", "system", "multi-turn"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_and_answers_have_the_token_ids_that_transformers_gives(folder: Path, template: str, messages: list):
    from transformers import AutoTokenizer

    with_template(folder, TEMPLATES[template])
    theirs, ours = AutoTokenizer.from_pretrained(folder), ChatTokenizer(folder)
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert ours.prompt_ids(messages) == prompt
    if template == "loops":  # its generation prompt does not begin the answer as such prompts must
        return
    whole = theirs.apply_chat_template(messages, return_dict=False)
    example = ours.example(messages)
    end = len(whole) - 1 - whole[::-1].index(theirs.eos_token_id)
    assert (example.ids, example.n_prompt) == (whole[: end + 1], len(prompt))
    assert ours.decode(example.ids[example.n_prompt :]).strip() == messages[-1]["content"]


def test_a_jinja_file_stands_before_the_template_in_the_configuration(folder: Path):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}>")
    assert ChatTokenizer(folder).prompt_ids([{"role": "user", "content": "ab"}]) == ChatTokenizer(folder)._encode("ab>")


def test_a_template_that_asks_for_the_date_gets_the_same_on_every_day(folder: Path):
    with_template(folder, "{{ strftime_now('%d %b %Y') }}")
    tokenizer = ChatTokenizer(folder)
    assert tokenizer.decode(tokenizer.prompt_ids(SINGLE)) == "26 Jul 2024"


def test_a_template_that_rewrites_the_prompt_of_an_answered_chat_is_refused(folder: Path):
    with_template(folder, "{{ messages | length }}{{ 'A' if add_generation_prompt }}")
    with pytest.raises(ChatError, match="writes a prompt differently once it is answered"):
        ChatTokenizer(folder).example(SINGLE)


def test_an_answer_without_an_end_token_gets_one(folder: Path):
    with_template(folder, "{% for m in messages %}{{ m.content }}>{% endfor %}")
    tokenizer = ChatTokenizer(folder)
    example = tokenizer.example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert example.ids == [*tokenizer._encode("a>b>"), tokenizer.eos_ids[0]]
    assert example.n_prompt == 2


def test_no_token_spans_prompt_and_answer(folder: Path):
    from tokenizers import Tokenizer, models

    with_template(folder, "{% for m in messages %}{{ m.content }}{% endfor %}")
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|end|>": 3}
    Tokenizer(models.BPE(vocabulary, [("a", "b")])).save(str(folder / "tokenizer.json"))
    example = ChatTokenizer(folder).example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert (example.ids, example.n_prompt) == ([0, 1, 3], 1)


def test_text_is_learnt_whole_between_the_begin_and_end_tokens(llama: Path):
    tokenizer = ChatTokenizer(llama)
    example = tokenizer.row_example({"text": "ab"}, None, "{input}")
    begin, end = (tokenizer._tokenizer.token_to_id(f"<|{name}|>") for name in ("begin", "end"))
    assert (example.ids, example.n_prompt) == ([begin, *tokenizer._encode("ab"), end], 0)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "a {b}", "output": "A"},
        {"instruction": "a {b}", "input": "", "output": "A"},
        {"prompt": "a {b}", "completion": "A"},
        {"prompt": "a {b}", "response": "A", "id": 3},
        {"question": "a {b}", "answer": "A"},
        {"messages": [{"role": "user", "content": "a {b}"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "a {b}"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"role": "user", "content": "a {b}"}, {"role": "assistant", "content": "A"}], "id": 1},
        {"messages": [{"from": "human", "value": "a {b}"}, {"from": "chatgpt", "value": "A"}]},
        {"conversation": [{"role": "user", "content": "a {b}"}, {"role": "model", "content": "A"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "{b}"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ]
        },
        {"prompt": [{"role": "user", "content": "a {b}"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"instruction": "a {b}", "context": "", "response": "A", "category": "qa"},
        {"question": "a {b}", "response": "A"},
        {"query": "a {b}", "response": "A"},
        {"problem": "a {b}", "solution": "A"},
        {"system_prompt": "", "question": "a {b}", "response": "A"},
    ],
    ids="+".join,
)
def test_every_shape_of_row_gives_the_same_chat(row: dict):
    assert messages_of(row, "Be brief.", "Say {input}!") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say a {b}!"},
        {"role": "assistant", "content": "A"},
    ]


def test_an_instruction_with_an_input_asks_both():
    row = {"instruction": "Capitalize.", "input": "sines", "output": "Sines"}
    assert messages_of(row)[0]["content"] == "Capitalize.\n\nsines"


def test_a_system_column_and_what_an_instruction_is_about_come_along():
    row = {"system": "Be brief.", "instruction": "Capitalize.", "context": "sines", "response": "Sines"}
    assert messages_of(row, "Be long.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capitalize.\n\nsines"},
        {"role": "assistant", "content": "Sines"},
    ]


def test_a_chat_keeps_its_own_system_message_and_only_its_last_question_is_put_into_the_prompt():
    asked = messages_of({"messages": MULTI}, "Another.", "Say {input}!")
    assert asked == [*MULTI[:3], {"role": "user", "content": "Say and\ncosines?!"}, MULTI[4]]
    assert MULTI[3]["content"] == "and\ncosines?"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"word": "a", "label": 1}, "columns word, label; expected messages, conversations, conversation, instr"),
        ({"input": "a", "output": 3}, "column output holds 3; expected text"),
        ({"messages": "hello"}, "column messages holds 'hello'; expected a list"),
        ({"messages": [{"role": "user"}]}, "column content holds None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "column content holds .*image"),
        ({"text": "a"}, "can be trained on, not evaluated"),
    ],
)
def test_a_row_that_is_no_chat_is_refused_in_words(row: dict, words: str):
    with pytest.raises(ChatError, match=words):
        messages_of(row)


def test_a_prompt_without_the_input_is_refused():
    with pytest.raises(ChatError, match="does not contain"):
        messages_of({"input": "a", "output": "A"}, None, "Capitalize the word.")


def test_a_model_folder_without_tokenizer_or_template_says_what_to_do(folder: Path, tmp_path: Path):
    with pytest.raises(ChatError, match="take the model's instruct variant"):
        ChatTokenizer(with_template(folder, None)).prompt_ids(SINGLE)
    with pytest.raises(ChatError, match=r"tokenizer\.json is missing: download the model"):
        ChatTokenizer(tmp_path / "nowhere")


def test_the_file_needs_neither_torch_nor_transformers(llama: Path):
    import subprocess
    import sys

    import trainer.chat

    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('chat', sys.argv[1])\n"
        "chat = importlib.util.module_from_spec(spec); sys.modules['chat'] = chat; spec.loader.exec_module(chat)\n"
        "row = {'input': 'a', 'output': 'A'}\n"
        "assert chat.ChatTokenizer(sys.argv[2]).row_example(row, None, '{input}').n_prompt\n"
        "assert not {'torch', 'transformers', 'numpy', 'trainer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(trainer.chat.__file__), str(llama)], check=True)


def test_the_shape_of_a_row_is_told_by_its_columns():
    rows = [{"messages": []}, {"question": "a", "answer": "b", "text": "c"}, {"text": "c"}]
    assert [shape_of(row) for row in rows] == ["chat", "instruct", "text"]
