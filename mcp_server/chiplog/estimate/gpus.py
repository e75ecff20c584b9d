"""GPUs of `data/gpus.toml`: the memory a process can use, how fast each computes, and which of them a name means."""

from __future__ import annotations

import difflib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from chiplog.errors import NotFoundError, PlanError
from chiplog.schema import Frozen

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "float8": "fp8"}
NEAR = 0.12  # a "16 GB" T4 offers 14.6 GiB, 9 % less
PROFILE = re.compile(r"(?<![\w.])(?:mig[ -]*)?(\dg\.\d+gb)(?:\+\w+)?(?!\w)")
MEMORY = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) ?g(?:i?b)?(?!\w)")
PCIE = (16.0, 32.0)  # GB/s one way of 16 lanes: before 2020 the third generation, then the fourth
FORM = re.compile(r"(sxm|pcie|nvl)\d?")
NOISE = re.compile(r"nvidia|tesla|geforce|quadro|amd|instinct|gpu|dgx|hgx|generation|edition|vram|hbm\d\w?|\d+w")


class Gpu(Frozen):
    """A GPU, or a MIG slice of one."""

    key: str = Field(description="As in data/gpus.toml; of a MIG slice card:profile, such as a100-80gb-sxm:3g.40gb.")
    name: str
    memory_bytes: int = Field(description="What a process can use, its CUDA context included: torch's total_memory.")
    nominal_gb: float = Field(description="The number that the card is sold by.")
    bandwidth_bytes_s: float
    link_bytes_s: float = Field(description="One way, to the other cards of a node: NVLink or the like, else PCIe.")
    power_w: float | None = Field(description="The card's limit; null for MIG slices and chips that share one.")
    flops: dict[str, float] = Field(description="Dense peak FLOP/s by dtype: fp32, tf32, bf16, fp16, fp8, int8.")
    year: int
    tensor_cores: bool
    usable: Literal["measured", "nominal"] = Field(description="memory_bytes was seen, or is that of a card like it.")

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s in a dtype, by torch's name or the short one. Raises PlanError if the card has none."""
        short = DTYPES.get(dtype, dtype)
        own = "fp32" if short in {"bf16", "tf32"} - self.flops.keys() else short  # as torch computes these there
        if own not in self.flops:
            raise PlanError(f"{self.name} has no known rate in {dtype}: use {', '.join(self.flops)}")
        return self.flops[own]


class Spoken(NamedTuple):
    """What a name says of a GPU; what it leaves open is null."""

    model: str
    form: str | None
    memory_gb: float | None
    profile: str | None


@cache
def gpus() -> dict[str, Gpu]:
    """Every card by its key, and every MIG slice."""
    entries = dict(_data()["cards"])
    for group in _data()["mig"].values():
        for key in group["cards"]:
            for profile, part in group["profiles"].items():
                entries[f"{key}:{profile}"] = _slice(entries[key], profile, part, group["card_sms"])
    return {
        key: Gpu(
            key=key,
            name=entry["names"][0],
            memory_bytes=entry["usable_mib"] * 2**20,
            nominal_gb=entry["nominal_gb"],
            bandwidth_bytes_s=entry["bandwidth_gb_s"] * 1e9,
            link_bytes_s=entry.get("link_gb_s", PCIE[entry["year"] >= 2020]) * 1e9,
            power_w=entry.get("power_w"),
            flops={dtype: rate * 1e12 for dtype, rate in entry["tflops"].items()},
            year=entry["year"],
            tensor_cores=entry.get("tensor_cores", True),
            usable=entry["usable"],
        )
        for key, entry in entries.items()
    }


def gpu(name: str, memory_gb: float | None = None) -> Gpu:
    """The GPU that a name means; `memory_gb`, as sold or as usable, decides between several (not between MIG slices).

    Of cards alike in memory, the first in the catalogue: the SXM. Raises NotFoundError for none, or several memories.
    """
    asked = _parse(name)
    fits = [key for key, spoken in _spoken().items() if asked.model in {each.model for each in spoken}]
    if not fits:
        raise NotFoundError(f"there is no GPU {name!r} in the catalogue. {_known(asked.model)}")
    formed = [key for key in fits if asked.form in {None, *(each.form for each in _spoken()[key])}]
    found = _nearest(formed, asked.memory_gb)
    if asked.profile:
        found = [f"{key}:{asked.profile}" for key in found if f"{key}:{asked.profile}" in gpus()]
        fits = [key for key in gpus() if ":" in key and key.partition(":")[0] in fits] or fits
    else:
        found = _nearest(found, memory_gb)
    if not found:
        of = f" of {memory_gb:g} GB" if memory_gb and not asked.profile else ""
        raise NotFoundError(f"there is no {name!r}{of} in the catalogue: use one of {', '.join(fits)}")
    if len(sizes := {gpus()[key].nominal_gb for key in found}) > 1:
        they = " or ".join(f"{each:g}" for each in sorted(sizes))
        raise NotFoundError(f"{name!r} may be any of {', '.join(found)}: name one, or say that it has {they} GB")
    return gpus()[found[0]]


def any_of(name: str, memory_gb: float | None = None) -> Gpu:
    """As `gpu`, but of cards of several memories the first, which computes as the others do, nearly.

    Raises NotFoundError where there is none.
    """
    try:
        return gpu(name, memory_gb)
    except NotFoundError:
        asked = _parse(name)
        if asked.profile or asked.memory_gb or memory_gb:
            raise
        found = [key for key, spoken in _spoken().items() if asked.model in {each.model for each in spoken}]
        if not found:
            raise
        return gpus()[found[0]]


def _parse(name: str) -> Spoken:
    text = re.sub(r"[_:]", " ", name.lower())
    text = re.sub(r"^\s*\d{1,4} ?x ?(?=[a-z])|(?<=\S) x ?\d{1,4}\s*$", "", text)  # how many of it
    profile, text = PROFILE.search(text), PROFILE.sub(" ", text)
    memory, text = MEMORY.search(text), MEMORY.sub(" ", text)
    words = re.findall(r"[a-z0-9]+", text)
    form = next((found[1] for word in words if (found := FORM.fullmatch(word))), None)
    model = "".join(word for word in words if not NOISE.fullmatch(word) and not FORM.fullmatch(word))
    return Spoken(model, form, memory and float(memory[1]), profile and profile[1])


def _nearest(keys: list[str], memory_gb: float | None) -> list[str]:
    """Those one of whose names says a memory nearest to this one; none if none is near."""
    if memory_gb is None:
        return keys
    away = {key: min(abs(memory_gb / each.memory_gb - 1) for each in _spoken()[key] if each.memory_gb) for key in keys}
    return [key for key, far in away.items() if far <= NEAR and far == min(away.values())]


def _known(model: str) -> str:
    names = {spoken[0].model: gpus()[key].name for key, spoken in reversed(_spoken().items())}
    near = [names[each] for each in difflib.get_close_matches(model, names, n=3)]
    return (f"Did you mean {' or '.join(near)}? " if near else "") + f"Known: {', '.join(sorted(names.values()))}"


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "data" / "gpus.toml").read_text(encoding="utf-8"))


@cache
def _spoken() -> dict[str, list[Spoken]]:
    return {key: [_parse(each) for each in [*card["names"], key]] for key, card in _data()["cards"].items()}


def _slice(card: dict[str, Any], profile: str, part: dict[str, Any], card_sms: int) -> dict[str, Any]:
    return card | {
        "names": [f"{card['names'][0]} MIG {profile}"],
        "nominal_gb": float(profile[3:-2]),
        "usable_mib": part["usable_mib"],
        "usable": part.get("usable", "measured"),
        "bandwidth_gb_s": card["bandwidth_gb_s"] * part["eighths"] / 8,
        "power_w": None,
        "tflops": {dtype: rate * part["sms"] / card_sms for dtype, rate in card["tflops"].items()},
    }
