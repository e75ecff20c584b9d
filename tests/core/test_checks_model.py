"""check_model: a sound folder is silent, every fault has a check that fires, and a missing model says how to get it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiplog.checks.model import ModelReport, check_model
from chiplog.checks.safetensors_header import HeaderError, Tensor, read_header
from chiplog.errors import NotFoundError
from tests.conftest import make_model, write_safetensors

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same model in two files with an index."""
    (model / "model.safetensors").unlink()
    write_safetensors(model / SHARDS[0], {EMBEDDING: (95, 4)})
    write_safetensors(model / SHARDS[1], {NORM: (1, 4)})
    write_index(model, {EMBEDDING: SHARDS[0], NORM: SHARDS[1]}, 4 * (95 * 4 + 4))
    return model


def write_index(model: Path, weight_map: object, total_size: object) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def change(file: Path, **values: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def header_file(file: Path, header: object, n_bytes: int, length: int | None = None) -> None:
    """A safetensors file with any header, right or wrong."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(n_bytes))


def problems(report: ModelReport) -> list[tuple[str, str, str]]:
    return [(check.level, check.subject, check.found) for check in report.problems]


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


def test_shards_count_together(sharded: Path):
    report = check_model(sharded)
    assert problems(report) == []
    assert (report.shards, report.n_params) == (2, 95 * 4 + 4)
    assert report.weight_bytes == sum((sharded / shard).stat().st_size for shard in SHARDS)


def test_the_header_agrees_with_what_safetensors_wrote(tmp_path: Path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 3), np.float16), "b": np.zeros((), np.int64)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors") == {"a": Tensor("F16", (2, 3), 12), "b": Tensor("I64", (), 8)}


def test_dtypes_stand_in_the_order_of_their_elements(model: Path):
    header = {
        EMBEDDING: {"dtype": "BF16", "shape": [95, 4], "data_offsets": [0, 760]},
        NORM: {"dtype": "F32", "shape": [4], "data_offsets": [760, 776]},
    }
    header_file(model / "model.safetensors", header, 776)
    report = check_model(model)
    assert (report.ok, report.dtypes, report.n_params) == (True, ["BF16", "F32"], 384)


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


INDEX = "model.safetensors.index.json"
INDEX_FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a lost shard": (remove(SHARDS[1]), "failed", f"{SHARDS[1]} is missing"),
    "a cut shard": (lambda f: cut(f / SHARDS[1], 1), "failed", f"{SHARDS[1]} has"),
    "no weight_map": (lambda f: write_index(f, None, 0), "failed", f"{INDEX} has no weight_map"),
    "a path for a shard": (
        lambda f: write_index(f, {EMBEDDING: "../x"}, 0),
        "failed",
        "a shard that is no file of this",
    ),
    "a tensor in no shard": (
        lambda f: write_index(f, {EMBEDDING: SHARDS[0], NORM: SHARDS[1], "head": SHARDS[1]}, 1_536),
        "failed",
        f"places 1 tensors where they are not: head is not in {SHARDS[1]}",
    ),
    "a tensor not listed": (
        lambda f: write_safetensors(f / SHARDS[1], {NORM: (1, 4), "head": (1, 1)}),
        "warning",
        "1 tensors are in no shard that the index gives for them: head",
    ),
    "another size": (
        lambda f: write_index(f, {EMBEDDING: SHARDS[0], NORM: SHARDS[1]}, 1_537),
        "warning",
        f"{INDEX} says total_size 1,537, the tensors have 1,536 bytes",
    ),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_shards_and_index_that_disagree_are_a_fault(name: str, sharded: Path):
    break_it, level, found = INDEX_FAULTS[name]
    break_it(sharded)
    report = check_model(sharded)
    ((found_level, subject, words),) = problems(report)
    assert (found_level, subject in ("index", "weights")) == (level, True)
    assert found in words


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "eight exabytes": ({}, 0, 2**63, "where its header alone needs 9,223,372,036,854,775,816"),
    "no object": ([], 0, None, "no JSON object"),
    "a gap": (
        {"a": F32 | {"data_offsets": [4, 12]}},
        12,
        None,
        "has a at byte 4 of its data, where byte 0 should follow",
    ),
    "an overlap": (
        {"a": F32, "b": F32 | {"data_offsets": [4, 12]}},
        12,
        None,
        "has b at byte 4 .* byte 8 should follow",
    ),
    "bytes too many": ({"a": F32}, 9, None, "where its header needs"),
    "another shape": ({"a": F32 | {"shape": [3]}}, 8, None, r"gives a 8 bytes, which is not F32 of shape \[3\]"),
    "a wild shape": ({"a": F32 | {"shape": [10**30]}}, 8, None, "a shape or place that no tensor has"),
    "a thousand dimensions": ({"a": F32 | {"shape": [2**62] * 1_000}}, 8, None, "a shape or place that no tensor has"),
    "a wild place": ({"a": F32 | {"data_offsets": [-8, 0]}}, 8, None, "a shape or place that no tensor has"),
    "another dtype": ({"a": F32 | {"dtype": "F99"}}, 8, None, "holds a as F99"),
    "no dtype": ({"a": {"shape": [2]}}, 8, None, "does not say dtype, shape and data_offsets of a"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_without_reading_what_it_promises(name: str, tmp_path: Path):
    header, n_bytes, length, words = HEADERS[name]
    header_file(tmp_path / "a.safetensors", header, n_bytes, length)
    with pytest.raises(HeaderError, match=words):
        read_header(tmp_path / "a.safetensors")


def test_a_header_longer_than_may_be_is_refused_unread(tmp_path: Path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 10**8 + 1))
        file.truncate(2 * 10**8)  # sparse: takes no disk
    with pytest.raises(HeaderError, match="has a header of 100,000,001 bytes, more than"):
        read_header(tmp_path / "a.safetensors")


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


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=JSON
    | st.dictionaries(
        st.text(),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F32", "x"]),
                "shape": st.lists(st.integers()),
                "data_offsets": st.lists(st.integers(), max_size=3),
            },
        ),
    )
)
def test_no_header_makes_it_raise(header: object, model: Path):
    header_file(model / "model.safetensors", header, 8)
    assert check_model(model).n_params in (None, 0, 2)
