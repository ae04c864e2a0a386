"""Safetensors files as this project writes them: from a stream of tensors, digested on the way.

Digests are SHA-256 of the whole file, taken while it is written: with the SHA instructions of
today's processors it runs at 1.7 GB/s a core, twice as fast as BLAKE2b, and `sha256sum` checks it
without us.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import safe_open

from cptjob_trainer.disk import FileDigest
from cptjob_trainer.model import safetensors_header

DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
TORCH_DTYPES: Final = {name: dtype for dtype, name in DTYPES.items()}
# Small enough to stay in the processor's cache between the digest and the write, large enough to
# need few calls.
_BLOCK: Final = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file, known before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    values: Iterable[torch.Tensor],
    metadata: dict[str, str] | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> FileDigest:
    """Write one safetensors file from a stream of tensors, one in memory at a time, and make it
    durable.

    `values` yields the tensors of `entries` in that order, on any device, of the entry's dtype and
    shape. The same entries and values give the same bytes. The file must not exist. Raises OSError.
    """
    digest = hashlib.sha256()
    size = 0
    with open(path, "xb", buffering=0) as file:

        def put(block: memoryview | bytes) -> None:
            nonlocal size
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[file.write(view) or 0 :]
            size += len(block)

        put(header(entries, metadata))
        for entry, value in zip(entries, values, strict=True):
            if value.dtype != entry.dtype or tuple(value.shape) != entry.shape:
                raise ValueError(
                    f"{entry.name} is {value.dtype} {tuple(value.shape)}, planned {entry}"
                )
            data = bytes_of(value)
            for start in range(0, len(data), _BLOCK):
                put(data[start : start + _BLOCK])
            after_each()
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def header(entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> bytes:
    """The head of a safetensors file: its length in 8 little-endian bytes, then padded JSON."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.name in table:
            raise ValueError(f"two tensors named {entry.name}")
        end = offset + entry.bytes
        table[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def aligned(entries: Iterable[Entry]) -> list[Entry]:
    """`entries` in the order for a file: widest dtype first, so all are aligned; then by name."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file, as safetensors' own reader gives it."""
    with safe_open(path, framework="pt", device="cpu") as file:
        yield file


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file, offsets counted from its start.

    Raises ValueError when the header is broken.
    """
    return {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
        for tensor in safetensors_header.read(file).tensors
    }


def bytes_of(value: torch.Tensor) -> memoryview:
    """The values of a tensor as bytes, without a copy where it lies whole on the CPU."""
    plain = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().data
