"""The capitalization study: its data and its marks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.helpers import ROOT, load
from trainer.rows import file_hash, read_rows, split_names

SPLITS = ["train", "validation", "test"]


def make(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tasks" / "capitalization" / "data.py"
    command = [sys.executable, str(script), "--train-percent", "80", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("form", "name"), [("--no-chat", "words_5L_80P_1000.json"), ("--chat", "words_5L_80P_1000_c")])
def test_the_same_arguments_make_the_same_bytes_and_no_word_is_in_two_splits(form: str, name: str, tmp_path: Path):
    answers = []
    for i in (1, 2, 2):  # the last finds its own file
        done = make(tmp_path / str(i), "--words-len", "5", "--n", "1000", form)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    path = tmp_path / "1" / name
    assert answers[0] == {
        "path": str(path),
        "rows": {"train": 800, "validation": 100, "test": 100},
        "sha256": file_hash(path),
    }
    assert [answer["sha256"] for answer in answers] == [answers[0]["sha256"]] * 3
    assert [file.name for file in (tmp_path / "1").iterdir()] == [name]

    assert split_names(path) == SPLITS
    rows = [row for split in SPLITS for row in read_rows(path, split)]
    pairs = [[m["content"] for m in row["messages"]] if "messages" in row else list(row.values()) for row in rows]
    words = {word for word, _ in pairs}
    assert len(words) == 1000
    assert all(len(word) == 5 and word.isalpha() and word.islower() for word in words)
    assert all(answer == word[0].upper() + word[1:] for word, answer in pairs)


def test_another_seed_makes_other_words_and_never_replaces_the_file(tmp_path: Path):
    assert make(tmp_path, "--words-len", "5", "--n", "1000").returncode == 0
    before = (tmp_path / "words_5L_80P_1000.json").read_bytes()
    done = make(tmp_path, "--words-len", "5", "--n", "1000", "--seed", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is there with other content" in done.stderr
    assert (tmp_path / "words_5L_80P_1000.json").read_bytes() == before


@pytest.mark.parametrize(("length", "there_are"), [("5", 9979), ("8", 29851)])
def test_more_words_than_there_are_is_an_error_with_their_number(length: str, there_are: int, tmp_path: Path):
    done = make(tmp_path, "--words-len", length, "--n", str(there_are + 1))
    assert done.returncode == 1
    expected = f"error: there are {there_are} words of {length} letters, fewer than {there_are + 1}: ask for fewer\n"
    assert (done.stdout, done.stderr) == ("", expected)
    assert not list(tmp_path.iterdir())


def test_an_oracle_scores_full_marks_and_a_constant_scores_chance(tmp_path: Path):
    score = load("tasks/capitalization/evaluate.py").score
    make(tmp_path, "--words-len", "5", "--n", "1000")
    rows = list(read_rows(tmp_path / "words_5L_80P_1000.json", "test"))
    right = {"exact_match": True, "includes": True}
    assert all(score(f" {row['output']}\n", row["output"]) == right for row in rows)
    constant = [score(rows[0]["output"], row["output"]) for row in rows]
    assert sum(marks["exact_match"] for marks in constant) == sum(marks["includes"] for marks in constant) == 1
    assert not any(any(score(row["input"], row["output"]).values()) for row in rows)  # upper and lower case differ
    assert score("The answer is Sines.", "Sines") == {"exact_match": False, "includes": True}


def test_the_built_in_score_marks_as_the_study_does():
    built_in = load("recipes/evaluate.py").built_in_score
    study = load("tasks/capitalization/evaluate.py").score
    for output in ("Sines", " Sines ", "sines", "Sines!", ""):
        assert built_in(output, "Sines") == study(output, "Sines")


def test_a_base_model_learns_from_the_prompt_that_the_recipe_sends(tmp_path: Path):
    import random

    from trainer.chat import ChatTokenizer, messages_of

    made = load("tasks/capitalization/make_base_models.py")
    made.write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 258}')
    tokenizer = ChatTokenizer(tmp_path)
    sample = made.sample(random.Random(0), tokenizer)
    asked, answer = tokenizer.decode(sample.ids[: sample.n_prompt]), tokenizer.decode(sample.ids[sample.n_prompt :])
    assert asked.endswith(answer) and asked.removesuffix(answer) in made.ASKED
    row = {"input": answer, "output": answer}
    assert tokenizer.example(messages_of(row, None, asked.removesuffix(answer) + "{input}")) == sample
