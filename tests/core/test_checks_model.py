"""check_model: a sound folder is silent, every fault has a check that fires, and a missing model says how to get it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiplog.checks.model import ModelReport, check_model
from chiplog.errors import NotFoundError
from tests.conftest import make_model

EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def change(file: Path, **values: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def test_a_sound_model_is_reported_whole_and_silently(model: Path):
    found = check_model(model)
    assert found == ModelReport(
        ok=True,
        checks=found.checks,
        path=model,
        model_type="llama",
        architecture="LlamaForCausalLM",
        vocab_size=95,
        context_length=256,
        depth=1,
        width=4,
        n_params=95 * 4,
        dtypes=["F32"],
        weight_bytes=(model / "model.safetensors").stat().st_size,
        shards=1,
        tokenizer="WordLevel",
        chat_template=True,
    )
    assert [(check.subject, check.level, check.found) for check in found.checks] == [
        ("config", "ok", "llama, 1 layers of width 4"),
        ("weights", "ok", "1 tensors, every file whole"),
        ("embedding", "ok", "95 x 4"),
        ("tokenizer", "ok", "WordLevel with 95 tokens"),
        ("chat template", "ok", "writes a question and its answer"),
    ]


def cut(file: Path, n_bytes: int = 100) -> None:
    file.write_bytes(file.read_bytes()[:-n_bytes])


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes) -> Callable[[Path], object]:
    def put(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return put


def set_in(name: str, **values: object) -> Callable[[Path], object]:
    return lambda folder: change(folder / name, **values)


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def widen_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = 95
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
# What is done to the folder; then level, subject, what is found, and what mends it.
FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str, str]] = {
    "no config": (
        remove("config.json"),
        "failed",
        "config",
        "config.json is missing",
        "hf download ORG/NAME config.json",
    ),
    "config no JSON": (write("config.json", b"{"), "failed", "config", "config.json is not JSON", "download it again"),
    "config a list": (write("config.json", b"[]"), "failed", "config", "config.json is no JSON object", "download it"),
    "no model_type": (set_in("config.json", model_type=None), "failed", "config", "names no model_type", "download it"),
    "a width of text": (
        set_in("config.json", hidden_size="4"),
        "failed",
        "config",
        "hidden_size is no whole",
        "mend it",
    ),
    "another vocabulary": (
        set_in("config.json", vocab_size=96),
        "failed",
        "embedding",
        f"{EMBEDDING} has the shape [95, 4], where config.json says [96, 4]",
        "from the same model",
    ),
    "a cut file": (
        lambda folder: cut(folder / "model.safetensors"),
        "failed",
        "weights",
        " bytes where its header needs ",
        "hf download ORG/NAME model.safetensors --local-dir",
    ),
    "an empty file": (write("model.safetensors", b""), "failed", "weights", "has 0 bytes where its header", "download"),
    "git-lfs weights": (
        write("model.safetensors", LFS),
        "failed",
        "weights",
        "is a git-lfs pointer",
        "run `git lfs pull`",
    ),
    "git-lfs config": (write("config.json", LFS), "failed", "config", "is a git-lfs pointer", "run `git lfs pull`"),
    "git-lfs tokenizer": (write("tokenizer.json", LFS), "failed", "tokenizer", "is a git-lfs pointer", "git lfs pull"),
    "a link to nothing": (dangling, "failed", "weights", "model.safetensors is a link to nothing", "download it again"),
    "no weights": (
        remove("model.safetensors"),
        "failed",
        "weights",
        "neither model.safetensors nor",
        "download it again",
    ),
    "only .bin": (only_bin, "failed", "weights", ", only pytorch_model.bin", "convert them: python -c"),
    "two sets of weights": (
        write("model.safetensors.index.json", b"{}"),
        "warning",
        "index",
        "model.safetensors is loaded, and model.safetensors.index.json lies beside it",
        "delete model.safetensors.index.json",
    ),
    "no tokenizer": (remove("tokenizer.json"), "failed", "tokenizer", "tokenizer.json is missing", "download it again"),
    "a broken tokenizer": (
        write("tokenizer.json", b"{}"),
        "failed",
        "tokenizer",
        "cannot be read (",
        "download it again",
    ),
    "a tokenizer that is too large": (
        widen_tokenizer,
        "failed",
        "vocabulary",
        "the tokenizer's ids go up to 95, the embedding has 95 rows",
        "from the same model",
    ),
    "no chat template": (
        set_in("tokenizer_config.json", chat_template=None),
        "failed",
        "chat template",
        "has no chat template",
        "take the model's instruct variant or its template",
    ),
    "a wrong chat template": (
        set_in("tokenizer_config.json", chat_template="{{ 1 + 'a' }}"),
        "failed",
        "chat template",
        "unsupported operand",
        "take the model's instruct variant or its template",
    ),
    "an unfinished download": (
        write(".cache/huggingface/download/x.incomplete", b""),
        "warning",
        "downloads",
        "1 unfinished downloads: x.incomplete",
        "finish them with `hf download`, or delete them",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fires_its_own_check_and_says_how_to_mend_it(name: str, model: Path):
    break_it, level, subject, found, mend = FAULTS[name]
    break_it(model)
    report = check_model(model)
    (check,) = report.problems
    assert (check.level, check.subject) == (level, subject)
    assert found in check.found
    assert mend in str(check.mend)
    assert report.ok == (level == "warning")


def test_a_cut_file_says_how_many_bytes_it_has_and_how_many_it_needs(model: Path):
    size = (model / "model.safetensors").stat().st_size
    cut(model / "model.safetensors")
    (check,) = check_model(model).problems
    assert check.found == f"model.safetensors has {size - 100:,} bytes where its header needs {size:,}"


def test_no_chat_template_is_a_warning_where_none_is_needed(model: Path):
    change(model / "tokenizer_config.json", chat_template=None)
    report = check_model(model, needs_chat=False)
    assert (report.ok, report.chat_template) == (True, False)
    assert [check.level for check in report.problems] == ["warning"]


def test_a_template_in_a_file_of_its_own_counts(model: Path):
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    change(model / "tokenizer_config.json", chat_template=None)
    (model / "chat_template.jinja").write_text(template)
    assert check_model(model).chat_template


def test_a_tokenizer_in_another_format_says_how_to_convert_it(model: Path):
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    (check,) = check_model(model).problems
    assert check.found == "there is tokenizer.model and no tokenizer.json"
    assert "AutoTokenizer.from_pretrained('.').save_pretrained('.')" in str(check.mend)


def test_a_multimodal_configuration_is_read_where_it_describes_the_language_model(model: Path):
    config = json.loads((model / "config.json").read_text())
    text = {key: config.pop(key) for key in ("hidden_size", "vocab_size", "num_hidden_layers")}
    (model / "config.json").write_text(json.dumps(config | {"text_config": text}))
    report = check_model(model)
    assert (report.ok, report.vocab_size, report.depth, report.width) == (True, 95, 1, 4)


def test_the_download_command_of_a_model_in_the_hub_s_cache_names_it(tmp_path: Path):
    folder = tmp_path / "hub" / "models--meta-llama--Llama-3.2-1B" / "snapshots" / "abc"
    make_model(folder)
    cut(folder / "model.safetensors")
    (folder.parents[1] / "blobs").mkdir()
    (folder.parents[1] / "blobs" / "0.incomplete").touch()
    command = f"hf download meta-llama/Llama-3.2-1B model.safetensors --cache-dir {tmp_path / 'hub'} --force-download"
    assert [check.mend for check in check_model(folder).problems] == [
        f"download it again: {command}",
        "finish them with `hf download`, or delete them",
    ]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(NotFoundError, match=r"there is no model .*tiny"):
        check_model(tmp_path / "tiny")


FILES = ["config.json", "model.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["vocab_size", "weight_map", "metadata"]) | st.text(), inner)
    ),
)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_in_a_file_make_it_raise(name: str, content: bytes, model: Path):
    if name == INDEX:
        (model / "model.safetensors").unlink(missing_ok=True)
    (model / name).write_bytes(content)
    report = check_model(model)
    assert report.ok == all(check.ok for check in report.checks)
    assert report.model_dump_json()
