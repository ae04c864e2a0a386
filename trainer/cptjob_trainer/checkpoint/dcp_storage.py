"""Storage for torch.distributed.checkpoint (DCP): safetensors files and JSON, no pickle.

DCP plans which piece of which tensor is written and read; this module moves the bytes. DCP's own
file storage keeps its index in `.metadata`, a pickle, which runs code when a stranger's file is
read, and its ranks exchange plans as pickles. Here each rank saves and loads for itself, and the
ranks join their indexes as JSON (dcp.py).

Each rank writes one file `rank-NNNNN.safetensors` with its pieces, under the tensor's name, or
`name@row,column` for a piece that begins there.
"""

import errno
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cptjob_trainer import failpoints
from cptjob_trainer.model.safetensors_file import (
    DTYPES,
    TORCH_DTYPES,
    Entry,
    aligned,
    bytes_of,
    opened,
    read_header,
    write_safetensors,
)


class SafetensorsWriter(StorageWriter):
    """DCP's writer of one rank's file. After `dcp.save`, `index` is the JSON index of that file.

    It writes a file and no more: whoever calls publishes it.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        self.rank = rank
        self.index: dict[str, Any] = {"files": {}, "tensors": {}}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.index = {"files": {}, "tensors": {}}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # A shard without rows is nothing to write; a tensor without elements still has a name.
        kept = [item for item in plan.items if _entry(item).bytes or not _shape(item).numel()]
        items = {_entry(item).name: item for item in kept}
        entries = aligned(_entry(item) for item in items.values())
        results: list[WriteResult] = []
        if entries:
            ordered = [items[entry.name] for entry in entries]
            name = _rank_file(self.rank)
            digest = write_safetensors(
                self.directory / name,
                entries,
                _values(ordered, planner),
                after_each=lambda: failpoints.hit("checkpoint.write"),
            )
            self.index["files"][name] = {"bytes": digest.bytes, "sha256": digest.sha256}
            results = [WriteResult(item.index, _entry(item).bytes, name) for item in ordered]
            for item in ordered:
                self._note(item, name)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _note(self, item: WriteItem, file: str) -> None:
        data, entry = item.tensor_data, _entry(item)
        assert data is not None
        chunk = {
            "offsets": list(data.chunk.offsets),
            "sizes": list(data.chunk.sizes),
            "file": file,
            "key": entry.name,
        }
        self.index["tensors"][item.index.fqn] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(data.size),
            "chunks": [chunk],
        }

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _key_of(fqn: str, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> str:
    """The name in a file of the piece of tensor `fqn` that begins at `offsets`."""
    if tuple(sizes) == tuple(shape):
        return fqn
    return f"{fqn}@{','.join(str(offset) for offset in offsets)}"


def _rank_file(rank: int) -> str:
    """The name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def _shape(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None
    return item.tensor_data.size


def _entry(item: WriteItem) -> Entry:
    data = item.tensor_data
    if item.type == WriteItemType.BYTE_IO or data is None:
        raise TypeError(
            f"{item.index.fqn} is not a tensor; only tensors are saved beside the loop state"
        )
    if data.properties.dtype not in DTYPES:
        raise TypeError(
            f"{item.index.fqn} has {data.properties.dtype}, which safetensors cannot hold"
        )
    key = _key_of(item.index.fqn, data.chunk.offsets, data.chunk.sizes, data.size)
    return Entry(key, data.properties.dtype, tuple(data.chunk.sizes))


def _values(items: list[WriteItem], planner: SavePlanner) -> Iterator[torch.Tensor]:
    for item in items:
        value = planner.resolve_data(item)
        assert isinstance(value, torch.Tensor)
        yield value


class SafetensorsReader(StorageReader):
    """DCP's reader of one directory and the JSON index that `SafetensorsWriter` made of it.

    Only the pieces that this rank needs are read.
    """

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.directory = directory
        self._tensors: dict[str, Any] = index["tensors"]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({fqn: _tensor_metadata(tensor) for fqn, tensor in self._tensors.items()})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, dict[str, Any]]]] = {}
        for item in plan.items:
            chunk = self._chunk(item.storage_index)
            by_file.setdefault(chunk["file"], []).append((item, chunk))
        for name, reads in sorted(by_file.items()):
            path = self.directory / name
            with open(path, "rb", buffering=0) as file, opened(path) as mapped:
                table = read_header(file)
                for item, chunk in reads:
                    _read(file, mapped, table[chunk["key"]], item, chunk, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, index: MetadataIndex) -> dict[str, Any]:
        wanted = list(index.offset or ())
        chunks: list[dict[str, Any]] = self._tensors[index.fqn]["chunks"]
        if index.index is not None and chunks[index.index]["offsets"] == wanted:
            return chunks[index.index]
        return next(chunk for chunk in chunks if chunk["offsets"] == wanted)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _tensor_metadata(tensor: dict[str, Any]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=TORCH_DTYPES[tensor["dtype"]]),
        size=torch.Size(tensor["shape"]),
        chunks=[
            ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
            for chunk in tensor["chunks"]
        ],
    )


def _read(
    file: BinaryIO,
    mapped: Any,
    stored: dict[str, Any],
    item: ReadItem,
    chunk: dict[str, Any],
    planner: LoadPlanner,
) -> None:
    """Fill the tensor that `item` asks for.

    Whole rows lie together in the file and are read straight into place, at three times the speed
    of copying out of a mapping. Anything else goes through safetensors' slices.
    """
    if item.type != LoadItemType.TENSOR:
        raise TypeError(f"{item.dest_index.fqn} is not a tensor")
    target = planner.resolve_tensor(item).detach()
    sizes, lengths, offsets = chunk["sizes"], list(item.lengths), list(item.storage_offsets)
    dtype = TORCH_DTYPES[stored["dtype"]]
    if lengths[1:] == sizes[1:]:
        straight = target.device.type == "cpu" and target.is_contiguous() and target.dtype == dtype
        source = target if straight else torch.empty(lengths, dtype=dtype)
        row = math.prod(sizes[1:]) * dtype.itemsize
        file.seek(stored["data_offsets"][0] + (offsets[0] * row if offsets else 0))
        _fill(file, source)
    else:
        region = zip(offsets, lengths, strict=True)
        source = mapped.get_slice(chunk["key"])[
            tuple(slice(start, start + length) for start, length in region)
        ]
    if source is not target:
        target.copy_(source)
    planner.commit_tensor(item, target)


def _fill(file: BinaryIO, tensor: torch.Tensor) -> None:
    view = bytes_of(tensor)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, "the file ends before the tensor does", file.name)
        view = view[count:]
