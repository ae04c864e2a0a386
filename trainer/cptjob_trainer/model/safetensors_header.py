"""The head of a safetensors file: eight bytes of length, then JSON about each tensor.

Read here without the library, so that the client can count weights, and with checks, so that a
truncated or foreign file is told before anything is read from it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

# Far above any real header; a wrong first eight bytes give a huge number.
MAX_HEADER = 100 << 20

# Bytes per number, of the types whose size is checked.
ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


class ForeignFileError(ValueError):
    """The file does not begin as a safetensors file does, or ends within its head."""


@dataclass(frozen=True)
class Tensor:
    """`start` and `end` are bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """`raw` is the JSON; `size` that of the file, `needed` what the tensors take, in bytes."""

    raw: bytes
    size: int
    tensors: tuple[Tensor, ...]

    @property
    def needed(self) -> int:
        return max((tensor.end for tensor in self.tensors), default=8 + len(self.raw))


def read(file: BinaryIO) -> Header:
    """Read the head of a file that is opened at its start. A file may still be too short for its
    tensors (`needed`). Raises ForeignFileError, ValueError for a broken head, OSError.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    raw = file.read(length) if 2 <= length <= min(MAX_HEADER, size) else b""
    if len(raw) != length or not raw.startswith(b"{"):
        raise ForeignFileError("not a safetensors file")
    try:
        return Header(raw, size, tuple(_tensors(json.loads(raw), 8 + length)))
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"the safetensors header is broken: {error}") from error


def _tensors(table: dict[str, Any], data: int) -> Iterator[Tensor]:
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        shape = tuple(int(size) for size in entry["shape"])
        start, end = (int(at) for at in entry["data_offsets"])
        dtype = str(entry["dtype"])
        fits = dtype not in ITEM_SIZES or end - start == prod(shape) * ITEM_SIZES[dtype]
        if not 0 <= start <= end or not fits:
            raise ValueError(f"the safetensors header is broken: tensor {name}")
        yield Tensor(name, dtype, shape, data + start, data + end)
