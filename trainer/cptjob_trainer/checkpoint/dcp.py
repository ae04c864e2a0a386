"""Tensors of a run into files and back, with torch.distributed.checkpoint (DCP).

Each rank saves its share and loads what it needs by itself (dcp_storage.py); nothing is sent. Which
rank writes what, every rank computes alike.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from cptjob_trainer.checkpoint.dcp_storage import SafetensorsReader, SafetensorsWriter
from cptjob_trainer.disk import is_full
from cptjob_trainer.errors import CheckpointError, Stopped
from cptjob_trainer.model.safetensors_file import DTYPES, TORCH_DTYPES, opened


def check_savable(tensors: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what cannot be saved."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}, not a tensor; "
                "what is not a tensor belongs into the loop state"
            )
        if value.dtype not in DTYPES or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(
                f"{name} is a {value.layout} tensor of {value.dtype}, which cannot be saved"
            )
        if "@" in name:
            raise CheckpointError(
                f"the tensor name {name!r} contains '@', which marks pieces of tensors"
            )


def share(tensors: Mapping[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """What `rank` writes of `tensors`, so that all ranks together write everything once.

    Of a sharded DTensor each rank writes its shard. What is the same everywhere is dealt out by
    size. Every rank computes the same answer; nothing is sent.
    """
    loads = [0] * world
    mine: dict[str, torch.Tensor] = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            if _writes(tensor):
                mine[name] = tensor
            continue
        writer = loads.index(min(loads))
        loads[writer] += tensor.numel() * tensor.element_size()
        if writer == rank:
            mine[name] = tensor
    return mine


def _writes(tensor: DTensor) -> bool:
    """True unless another rank writes the same shard."""
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return False
    copies = zip(place, tensor.placements, strict=True)
    return all(at == 0 for at, placement in copies if placement.is_replicate())


def local_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that this rank holds of `tensors`."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def write(path: Path, staged: dict[str, torch.Tensor], rank: int) -> dict[str, Any]:
    """Write one rank's file; {"index"}, or {"fault", "full"} when that failed."""
    writer = SafetensorsWriter(path, rank)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        # Another machine may not see rank 0's new directory yet.
        path.mkdir(exist_ok=True)
        with _alone():
            save(staged, storage_writer=writer, planner=planner, no_dist=True)
    except Exception as error:
        return {"fault": str(error), "full": is_full(error)}
    return {"index": writer.index}


def join(indexes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One index of all ranks' files. Raises ValueError when a tensor is not whole."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for index in indexes:
        files.update(index["files"])
        for name, tensor in index["tensors"].items():
            known = tensors.setdefault(name, {**tensor, "chunks": []})
            known["chunks"].extend(tensor["chunks"])
    for name, tensor in tensors.items():
        have = sum(math.prod(chunk["sizes"]) for chunk in tensor["chunks"])
        if have != math.prod(tensor["shape"]):
            raise ValueError(
                f"{name} has {math.prod(tensor['shape'])} elements, the ranks wrote {have}"
            )
    return {"files": dict(sorted(files.items())), "tensors": dict(sorted(tensors.items()))}


def check_fit(path: Path, saved: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError with the names, shapes and dtypes that differ, all in one."""
    wrong = [f"{name} is missing" for name in sorted(tensors.keys() - saved.keys())]
    wrong += [f"{name} is not part of this run" for name in sorted(saved.keys() - tensors.keys())]
    for name in sorted(tensors.keys() & saved.keys()):
        theirs = f"{saved[name]['dtype']} {saved[name]['shape']}"
        ours = f"{DTYPES.get(tensors[name].dtype, tensors[name].dtype)} {list(tensors[name].shape)}"
        if theirs != ours:
            wrong.append(f"{name} is {theirs} there and {ours} in this run")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the checkpoint {path} does not fit: {'; '.join(wrong[:5])}{more}")


def read(path: Path, manifest: dict[str, Any], state: dict[str, Any]) -> None:
    """Fill `state` from the files of a checkpoint. Raises CheckpointError."""
    reader = SafetensorsReader(path, manifest)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _alone(), torch.no_grad():
            load(state, storage_reader=reader, planner=planner, no_dist=True)
    except Stopped:
        raise  # by a signal, in the middle of it
    except Exception as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint whose names begin with `prefix`, without it, each put together
    when it is asked for.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], prefix: str) -> None:
        self._path = path
        self._tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in manifest["tensors"].items()
            if name.startswith(prefix)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        whole = torch.empty(tensor["shape"], dtype=TORCH_DTYPES[tensor["dtype"]])
        for chunk in tensor["chunks"]:
            with opened(self._path / chunk["file"]) as file:
                region = zip(chunk["offsets"], chunk["sizes"], strict=True)
                place = tuple(slice(start, start + size) for start, size in region)
                whole[place] = file.get_tensor(chunk["key"])
        return whole


@contextmanager
def _alone() -> Iterator[None]:
    """DCP in this process only: without its warning about that, and with its errors unwrapped."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        raise failure.failures[0][0] from failure
