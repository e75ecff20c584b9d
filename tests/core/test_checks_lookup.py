"""Names of models and data sets: what they find, and what is said where they find nothing or too much."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiplog.checks.lookup import (
    find_near,
    list_models,
    missing_dataset,
    missing_model,
    resolve_dataset,
    resolve_model,
)
from chiplog.errors import NotFoundError
from tests.conftest import make_model, make_words


def test_a_name_far_from_all_lists_what_is_there_and_none_says_how_to_make_one(tmp_path: Path):
    error = missing_dataset(Path("xyz"), [tmp_path])
    assert str(error).startswith(f"there is no data set xyz, and none under {tmp_path}: make one with create_dataset")
    for i in range(12):
        make_words(tmp_path / f"words_{i:02}.json")
    lines = str(missing_dataset(Path("xyz"), [tmp_path])).splitlines()
    assert lines[0] == f"there is no data set xyz. Under {tmp_path} there are"
    assert lines[1:] == [*(f"  {tmp_path / f'words_{i:02}.json'}" for i in range(10)), "  and 2 more"]


def test_near_names_are_the_likest_first_and_folders_count(tmp_path: Path):
    for name in ("words_5L.json", "words_5L_chat/train.json", "words_8L.json", "other.json"):
        make_words(tmp_path / name)
    assert find_near(Path("words_5L.jsonl"), [tmp_path])[0] == tmp_path / "words_5L.json"
    near = find_near(Path("words_5L"), [tmp_path])
    assert near == [tmp_path / "words_5L.json", tmp_path / "words_5L_chat", tmp_path / "words_8L.json"]


def test_a_data_set_is_found_by_path_name_or_bare_name(tmp_path: Path):
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    make_words(root / "lab" / "words.json")
    make_words(elsewhere / "numbers.json")
    file = root / "lab" / "words.json"
    for name in (str(file), "data/lab/words.json", "lab/words.json", "words.json", "lab/words", "words", "lab"):
        assert resolve_dataset(name, [root], tmp_path) == (file.parent if name == "lab" else file)
    assert resolve_dataset("numbers.json", [root], elsewhere) == elsewhere / "numbers.json"
    for name in ("numbers", "x" * 5_000, "a\0b", "~nobody/words.json"):
        with pytest.raises(NotFoundError):
            resolve_dataset(name, [root], tmp_path)


def test_a_name_of_two_data_sets_is_refused_with_both(tmp_path: Path):
    for folder in ("a", "b"):
        make_words(tmp_path / folder / "words.json")
    with pytest.raises(NotFoundError, match=r"words may be any of 2: give the path of one\n.*a/words\.json\n.*b/words"):
        resolve_dataset("words", [tmp_path])


def test_models_are_listed_four_deep_and_once_a_model(tmp_path: Path):
    for name in ("a/b/c/d", "a/b/c/d/e", "flat", "1/2/3/4/5", ".hidden/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    for revision in ("new", "old"):
        make_model(tmp_path / "models--org--name" / "snapshots" / revision)
    both = [tmp_path / "models--org--name" / "snapshots" / revision for revision in ("new", "old")]
    assert list_models([tmp_path]) == [tmp_path / "a/b/c/d", tmp_path / "flat", *both]
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("old\n")
    assert list_models([tmp_path]) == [tmp_path / "a/b/c/d", tmp_path / "flat", both[1]]


def test_a_model_is_found_by_path_by_name_and_by_its_name_on_the_hub(tmp_path: Path):
    root = tmp_path / "models"
    plain, nested = root / "tiny", root / "lab" / "small"
    cached = root / "models--org--name" / "snapshots" / "abc"
    for folder in (plain, nested, cached):
        make_model(folder)
    names = {
        plain: [str(plain), "tiny", "models/tiny"],
        nested: ["lab/small", "small"],
        cached: ["org/name", "name", str(cached), str(cached.parents[1]), "models--org--name"],
    }
    for folder, called in names.items():
        assert {resolve_model(name, [root], tmp_path) for name in called} == {folder}
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "linked").symlink_to(plain)
    assert resolve_model("linked", [tmp_path / "link"], tmp_path) == plain


def test_a_folder_without_a_model_gives_way_to_one_with_it(tmp_path: Path):
    make_model(tmp_path / "models" / "tiny")
    (tmp_path / "tiny").mkdir()
    assert resolve_model("tiny", [tmp_path / "models"], tmp_path) == tmp_path / "models" / "tiny"
    (tmp_path / "models" / "half").mkdir()  # a download that broke off: check_model can say so
    assert resolve_model("half", [tmp_path / "models"], tmp_path) == tmp_path / "models" / "half"


def test_a_name_of_two_models_is_refused_with_both(tmp_path: Path):
    for name in ("a/tiny", "b/tiny"):
        make_model(tmp_path / name)
    with pytest.raises(NotFoundError, match=r"tiny may be any of 2: give the path of one\n.*a/tiny\n.*b/tiny"):
        resolve_model("tiny", [tmp_path], tmp_path)


def test_a_missing_model_lists_what_is_there_and_the_command_that_downloads_it(tmp_path: Path):
    make_model(tmp_path / "Llama-3.2-3B")
    with pytest.raises(NotFoundError) as error:
        resolve_model("meta-llama/Llama-3.2-1B", [tmp_path], tmp_path)
    assert str(error.value).splitlines() == [
        f"there is no model meta-llama/Llama-3.2-1B under {tmp_path}. There are",
        f"  Llama-3.2-3B  ({tmp_path / 'Llama-3.2-3B'})",
        f"To download it: hf download meta-llama/Llama-3.2-1B --local-dir {tmp_path / 'Llama-3.2-1B'}",
    ]


@pytest.mark.parametrize("name", ["my model", "models/my model", "/elsewhere/my model"])
def test_a_name_that_is_not_the_hub_s_gets_a_command_with_its_placeholder_explained(name: str, tmp_path: Path):
    root = tmp_path / "models"
    assert str(missing_model(name, [root])) == (
        f"there is no model {name} under {root}. There are none. To download it: "
        f"hf download 'ORG/my model' --local-dir '{root / 'my model'}' (ORG: who publishes it on huggingface.co)"
    )
