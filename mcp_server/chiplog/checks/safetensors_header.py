"""The header of a safetensors file: names, shapes and places of its tensors, without the tensors.

Eight bytes hold its length, then JSON, then the data: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

# The reference implementation refuses longer headers (safetensors/src/tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 64  # more than any tensor has; bounds the product below
# safetensors 0.8, Dtype::bitsize
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class HeaderError(ValueError):
    """A file that is no whole safetensors file; the message says what is wrong with it."""


class Tensor(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; they fill it to its last byte. Raises HeaderError, or OSError."""
    size = file.stat().st_size
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if length > size - 8:
            raise HeaderError(f"has {size:,} bytes where its header alone needs {8 + length:,}")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(f"has a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
        header = _parse(data.read(length))
    header.pop("__metadata__", None)
    places = sorted((_place(name, entry) for name, entry in header.items()), key=lambda place: place[1:3])
    end = 0
    for name, begin, stop, _ in places:
        if begin != end:
            raise HeaderError(f"has {name} at byte {begin:,} of its data, where byte {end:,} should follow")
        end = stop
    if size != 8 + length + end:
        raise HeaderError(f"has {size:,} bytes where its header needs {8 + length + end:,}")
    return {name: tensor for name, _, _, tensor in places}


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeaderError("has a header that is not JSON") from error
    if not isinstance(header, dict):
        raise HeaderError("has a header that is no JSON object")
    return header


def _place(name: str, entry: Any) -> tuple[str, int, int, Tensor]:
    """Name, first byte, byte after the last, and the tensor itself."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(stop)]}:
            pass
        case _:
            raise HeaderError(f"does not say dtype, shape and data_offsets of {name}")
    if dtype not in BITS:
        raise HeaderError(f"holds {name} as {dtype}, which is no dtype of safetensors 0.8")
    numbers = [*shape, begin, stop]
    if len(shape) > MAX_DIMS or not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
        raise HeaderError(f"gives {name} a shape or place that no tensor has")
    tensor = Tensor(dtype, tuple(shape), stop - begin)
    if tensor.n_elements * BITS[dtype] != 8 * tensor.n_bytes:
        raise HeaderError(f"gives {name} {tensor.n_bytes:,} bytes, which is not {dtype} of shape {shape}")
    return name, begin, stop, tensor
