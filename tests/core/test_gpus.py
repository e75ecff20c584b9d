"""The catalogue of GPUs: names resolve to one card or say why not, and its figures fit together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from chiplog.errors import NotFoundError, PlanError
from chiplog.estimate import gpus as module
from chiplog.estimate.gpus import gpu, gpus

DATA = tomllib.loads((Path(module.__file__).parent / "data" / "gpus.toml").read_text(encoding="utf-8"))
CARDS = {key: card for key, card in gpus().items() if ":" not in key}
SLICES = [
    (group, key, profile)
    for group, entry in DATA["mig"].items()
    for key in entry["cards"]
    for profile in entry["profiles"]
]


@pytest.mark.parametrize(
    ("name", "memory_gb", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", None, "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", None, "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", None, "a100-40gb-pcie"),
        ("A100 80GB", 80, "a100-80gb-sxm"),
        ("A100-SXM4-80G", 80, "a100-80gb-sxm"),
        ("A100 80 GB", None, "a100-80gb-sxm"),
        ("A100 40GB", 40, "a100-40gb-sxm"),
        ("A100", 80, "a100-80gb-sxm"),
        ("A100", 79.25, "a100-80gb-sxm"),
        ("a100", 39.4, "a100-40gb-sxm"),
        ("nvidia_a100-sxm4-40gb", None, "a100-40gb-sxm"),
        ("H100", 80, "h100-80gb-sxm"),
        ("H100", 94, "h100-94gb-nvl"),
        ("H100 80GB (DGX)", 80, "h100-80gb-sxm"),
        ("H100 96GB HBM2e 500W", 96, "h100-96gb"),
        ("NVIDIA H100 80GB HBM3", None, "h100-80gb-sxm"),
        ("NVIDIA H100 PCIe", None, "h100-80gb-pcie"),
        ("NVIDIA H100 NVL", None, "h100-94gb-nvl"),
        ("NVIDIA H200", 141, "h200-141gb-sxm"),
        ("H200", 141, "h200-141gb-sxm"),
        ("NVIDIA GH200 480GB", None, "gh200-96gb"),
        ("NVIDIA GH200 480GB", 96, "gh200-96gb"),
        ("NVIDIA L40S", 48, "l40s-48gb"),
        ("NVIDIA L40S", 44.4, "l40s-48gb"),
        ("Tesla T4", None, "t4-16gb"),
        ("T4 16GB", 16, "t4-16gb"),
        ("A10G", 24, "a10g-24gb"),
        ("V100", 32, "v100-32gb-sxm"),
        ("NVIDIA RTX 6000 Ada Generation", None, "rtx-6000-ada"),
        ("RTX A6000", None, "rtx-a6000"),
        ("NVIDIA GeForce RTX 4090", None, "rtx-4090"),
        ("rtx4090", None, "rtx-4090"),
        ("AMD Instinct MI250X/MI250", None, "mi250x-gcd"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, "h100-80gb-sxm:3g.40gb"),
        ("NVIDIA A100-PCIE-40GB MIG 3g.20gb", None, "a100-40gb-pcie:3g.20gb"),
        ("a100_3g.20gb", None, "a100-40gb-sxm:3g.20gb"),
        ("NVIDIA H200 MIG 1g.18gb", 141, "h200-141gb-sxm:1g.18gb"),
    ],
)
def test_what_logs_and_people_write_names_one_card(name: str, memory_gb: float | None, key: str):
    assert gpu(name, memory_gb).key == key


def test_every_name_and_key_in_the_catalogue_names_its_own_card():
    assert {key: {gpu(name).key for name in DATA["cards"][key]["names"]} for key in CARDS} == {
        key: {key} for key in CARDS
    }
    assert {key: gpu(key).key for key in gpus()} == {key: key for key in gpus()}
    assert {key: gpu(key, card.nominal_gb).key for key, card in CARDS.items()} == {key: key for key in CARDS}
    assert {each.key: gpu(each.name).key for each in gpus().values()} == {key: key for key in gpus()}


def test_a_name_that_leaves_the_memory_open_is_refused_with_the_cards_it_may_be():
    with pytest.raises(NotFoundError) as error:
        gpu("A100")
    assert str(error.value) == (
        "'A100' may be any of a100-80gb-sxm, a100-80gb-pcie, a100-40gb-sxm, a100-40gb-pcie: "
        "name one, or say that it has 40 or 80 GB"
    )


def test_an_unknown_name_is_refused_with_the_nearest_and_all_that_are_known():
    with pytest.raises(NotFoundError, match=r"no GPU 'NVIDIA L40X'.*Did you mean NVIDIA L40S? .*Known: .*Tesla T4"):
        gpu("NVIDIA L40X")


@pytest.mark.parametrize("name", ["", "GPU", "12 GB VRAM class", "NVIDIA GeForce RTX 4090 Laptop GPU", "A1000", "cpu"])
def test_what_names_no_known_card_is_never_taken_for_one(name: str):
    with pytest.raises(NotFoundError, match="no GPU"):
        gpu(name)


def test_a_memory_that_no_such_card_has_is_refused_with_those_there_are():
    with pytest.raises(NotFoundError, match="no 'A100' of 64 GB in the catalogue: use one of a100-80gb-sxm, "):
        gpu("A100", 64)
    with pytest.raises(NotFoundError, match="no 'A100-SXM4-40GB' of 80 GB"):
        gpu("A100-SXM4-40GB", 80)
    with pytest.raises(NotFoundError, match=r"MIG 5g.50gb' in the catalogue: use one of h100-80gb-sxm:1g.10gb, "):
        gpu("NVIDIA H100 80GB HBM3 MIG 5g.50gb")


def test_peaks_go_by_short_names_and_torch_s_and_emulated_dtypes_by_fp32():
    a100, t4 = gpu("A100 80GB"), gpu("T4")
    assert a100.peak("bf16") == a100.peak("bfloat16") == 312e12
    assert a100.peak("float32") == 19.5e12
    assert t4.peak("bf16") == t4.peak("tf32") == t4.peak("fp32") == 8.1e12
    with pytest.raises(PlanError, match="A100-SXM4-80GB has no known rate in fp8: use fp32, tf32, bf16, fp16, int8"):
        a100.peak("fp8")


def test_usable_memory_is_what_torch_reports():
    gib = {name: round(gpu(name).memory_bytes / 2**30, 1) for name in ("A100 80GB", "H100 80GB", "H200", "L40S", "T4")}
    assert gib == {"A100 80GB": 79.3, "H100 80GB": 79.1, "H200": 139.8, "L40S": 44.4, "T4": 14.6}


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.key)
def test_the_figures_of_a_card_fit_together(card):
    assert 0.88 * card.nominal_gb * 2**30 < card.memory_bytes <= card.nominal_gb * 1.08e9
    assert min(card.flops.values()) == card.flops["fp32"]
    assert {"bf16", "tf32"} <= set(card.flops) or card.year < 2020 or card.name.startswith("AMD")
    assert card.flops.get("int8", 1e18) >= card.flops.get("fp8", 0) >= 0
    assert 1e11 < card.bandwidth_bytes_s < 1e13 and 2016 <= card.year <= 2026
    assert card.tensor_cores or card.flops.get("fp16", 0) <= 2.1 * card.flops["fp32"]


def test_cards_have_names_of_their_own_and_sources():
    names = [re.sub(r"\W", "", name.lower()) for card in DATA["cards"].values() for name in card["names"]]
    assert len(names) == len(set(names))
    assert all(card["source"] for card in DATA["cards"].values())


@pytest.mark.parametrize(("group", "key", "profile"), SLICES, ids=str)
def test_as_many_mig_slices_as_the_guide_says_fit_their_card(group: str, key: str, profile: str):
    card, part = gpus()[key], gpus()[f"{key}:{profile}"]
    entry = DATA["mig"][group]
    n = entry["profiles"][profile]["instances"]
    assert n * part.memory_bytes <= card.memory_bytes
    assert n * part.peak("bf16") <= card.peak("bf16") and n * part.bandwidth_bytes_s <= card.bandwidth_bytes_s
    assert part.nominal_gb <= card.nominal_gb and part.tensor_cores
