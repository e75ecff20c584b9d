"""check_model's weights: shards and index agree, and a header that lies is refused without reading what it promises."""

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


def header_file(file: Path, header: object, n_bytes: int, length: int | None = None) -> None:
    """A safetensors file with any header, right or wrong."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(n_bytes))


def problems(report: ModelReport) -> list[tuple[str, str, str]]:
    return [(check.level, check.subject, check.found) for check in report.problems]


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["vocab_size", "weight_map", "metadata"]) | st.text(), inner)
    ),
)


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
