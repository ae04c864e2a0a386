"""What a run leaves: `OUT/model/`, `OUT/adapter/` and `OUT/manifest.json`.

The model's directory is written beside its place and swapped in whole, so whoever looks finds the
old one or the new one. Weights are safetensors with the base's names and dtypes; configuration and
tokenizer are the base's own files, byte for byte. The same tensors give the same bytes.
"""

import ctypes
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from cptjob_trainer import failpoints
from cptjob_trainer.checkpoints import amount, faults, read_manifest, scan
from cptjob_trainer.dcp_storage import (
    TORCH_DTYPES,
    Entry,
    FileDigest,
    aligned,
    file_digest,
    is_full,
    opened,
    read_header,
    write_safetensors,
)
from cptjob_trainer.errors import CheckpointError, OutputError, StorageFullError
from cptjob_trainer.generations import sync_directory

SHARD_BYTES: Final = 5_000_000_000
_MODEL_PREFIX: Final = "model."
# What of a base directory is not copied: weights in any format, their index, code, and the base's
# own card.
_NOT_COPIED: Final = re.compile(
    r"\..*|README\.md|.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|index\.json|py)"
)
_COPIED_FOLDERS: Final = frozenset({"additional_chat_templates"})
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@dataclass(frozen=True)
class Published:
    """A written directory, and each file's size and digest under its path in the directory."""

    path: Path
    files: dict[str, FileDigest]


def publish_model(
    out: Path,
    base: Path,
    state: Mapping[str, torch.Tensor],
    *,
    lora_scale: float | None = None,
    rank: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Published | None:
    """Write `state` as `OUT/model/`, loadable by `AutoModelForCausalLM.from_pretrained`.

    `base` is the directory of the model that was trained. `state` holds its parameters by their
    transformers names, in any dtype, whole or as DTensor. With DTensors it is collective: every
    rank calls it, rank 0 writes one tensor at a time, and the others get None. With `lora_scale`
    (alpha / rank) the pairs `lora_A`, `lora_B` in `state` are merged in fp32. Raises OutputError,
    StorageFullError; an existing model stays then.
    """
    return _publish_weights(out / "model", base, state, lora_scale, rank, shard_bytes)


def publish_adapter(
    out: Path,
    state: Mapping[str, torch.Tensor],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    base: str,
) -> Published:
    """Write the LoRA tensors in `state` as `OUT/adapter/`, in PEFT's format.

    `rank` is LoRA's; `base` names the model that the adapter belongs to.
    """
    tensors = {
        "base_model.model." + name.replace(".default.", "."): _whole(value)
        for name, value in state.items()
        if ".lora_" in name
    }
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }

    def write(folder: Path) -> dict[str, FileDigest]:
        failpoints.hit("output.adapter")
        entries = aligned(Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
        values = (tensors[entry.name] for entry in entries)
        weights = write_safetensors(
            folder / "adapter_model.safetensors", entries, values, {"format": "pt"}
        )
        described = _write_json(folder / "adapter_config.json", config)
        return {"adapter_config.json": described, "adapter_model.safetensors": weights}

    return _publish(out / "adapter", write)


def withdraw(out: Path, adapter: bool) -> None:
    """Before a new result is put in place: what is there is no longer complete.

    The manifest goes first, so that no crash can leave it beside another model. `adapter` says
    whether the new result has one; otherwise an older one goes too.
    """
    with _writing(out):
        (out / "manifest.json").unlink(missing_ok=True)
        sync_directory(out)
        if not adapter and (out / "adapter").exists():
            shutil.rmtree(out / "adapter")


def write_manifest(out: Path, value: Mapping[str, Any]) -> Path:
    """Write `OUT/manifest.json`, last of all: `value`, and each output file's size and SHA-256."""
    path = out / "manifest.json"
    with _writing(path):
        files = {
            str(file.relative_to(out)): _described(file_digest(file))
            for folder in ("adapter", "model")
            for file in sorted((out / folder).rglob("*"))
            if file.is_file()
        }
        failpoints.hit("output.manifest")
        temporary = out / ".manifest.json.tmp"
        temporary.unlink(missing_ok=True)
        _write_json(temporary, {**value, "files": files})
        temporary.replace(path)
        sync_directory(out)
    return path


def export(
    checkpoints: Path,
    step: int,
    base: Path,
    target: Path,
    *,
    lora_scale: float | None = None,
) -> Published:
    """Write the checkpoint of `step` as a Hugging Face directory `target`, which must not exist.

    Raises CheckpointError when there is no such checkpoint, or it is broken, OutputError when
    `target` exists.
    """
    if target.exists():
        raise OutputError(f"{target} exists; give a folder that does not")
    if not checkpoints.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {checkpoints}")
    stored = sorted(scan(checkpoints).counted, key=lambda s: (s.step, s.generation))
    found = [checkpoint for checkpoint in stored if checkpoint.step == step]
    if not found:
        steps = ", ".join(str(s) for s in sorted({s.step for s in stored})) or "none"
        raise CheckpointError(f"{checkpoints} has no checkpoint of step {step}; it has: {steps}")
    path = found[-1].path
    manifest = read_manifest(path)
    broken = faults(path, manifest)
    if broken:
        raise CheckpointError(f"the checkpoint {path} is broken: {'; '.join(broken)}")
    state: Mapping[str, torch.Tensor] = _Saved(path, manifest["tensors"])
    if lora_scale is not None:
        state = {**_base_state(base), **state}
    published = _publish_weights(target, base, state, lora_scale, 0, SHARD_BYTES)
    assert published is not None
    return published


class _Saved(Mapping[str, torch.Tensor]):
    """The model's parameters in a checkpoint, each put together when it is asked for."""

    def __init__(self, path: Path, tensors: dict[str, Any]) -> None:
        self._path = path
        self._tensors = {
            name.removeprefix(_MODEL_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_MODEL_PREFIX)
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


# -- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A tensor of the output: what it will be, and what makes it (collective with DTensors)."""

    entry: Entry
    value: Callable[[], torch.Tensor]


def _publish_weights(
    target: Path,
    base: Path,
    state: Mapping[str, torch.Tensor],
    lora_scale: float | None,
    rank: int,
    shard_bytes: int,
) -> Published | None:
    weights = _plan(base, state, lora_scale)
    if rank != 0:
        for _ in _stream(weights, shard_bytes):
            pass
        return None

    def write(folder: Path) -> dict[str, FileDigest]:
        files = _copy_files(base, folder)
        files.update(_write_shards(folder, weights, shard_bytes))
        return dict(sorted(files.items()))

    return _publish(target, write, sum(weight.entry.bytes for weight in weights))


def _plan(base: Path, state: Mapping[str, torch.Tensor], lora_scale: float | None) -> list[_Weight]:
    """Every tensor of the output, in the base's names, dtypes and layout, in the order of names."""
    skeleton = _skeleton(base)
    values = _merged(skeleton, state, lora_scale)
    for name, source in getattr(skeleton, "all_tied_weights_keys", {}).items():
        if source in values:
            values.pop(name, None)
    values.update(_untrained(skeleton, base, values.keys()))
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    unknown = values.keys() - shapes.keys()
    if unknown:
        raise OutputError(f"{base} describes no parameter {', '.join(sorted(unknown)[:5])}")
    dtype_of = _base_dtypes(base)
    planned = []
    for name, (shape, value) in _in_base_form(skeleton, shapes, values).items():
        entry = Entry(name, dtype_of(name), shape)
        planned.append(_Weight(entry, _cast(value, entry.dtype)))
    return sorted(planned, key=lambda weight: weight.entry.name)


def _cast(value: Callable[[], torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: value().to(dtype)


def _skeleton(base: Path) -> Any:
    """The model without its weights: names, ties and layout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _merged(
    skeleton: Any, state: Mapping[str, torch.Tensor], scale: float | None
) -> dict[str, Callable[[], torch.Tensor]]:
    """A maker for each parameter, with LoRA's pairs merged into theirs."""
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    adapted = {name.partition(".lora_")[0] for name in state if ".lora_" in name}
    bare = sorted(module for module in adapted if f"{module}.base_layer.weight" not in state)
    if bare and not any(f"{module}.weight" in state for module in adapted):
        raise OutputError(f"adapters without the weights they change: {', '.join(bare[:5])}")
    for name in sorted(state):
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        module = plain.removesuffix(".weight")
        pair = [f"{module}.lora_{letter}.default.weight" for letter in "AB"]
        if plain.endswith(".weight") and pair[0] in state:
            if scale is None:
                raise OutputError(f"{module} has an adapter, but no lora_scale was given")
            flipped = type(skeleton.get_submodule(module)).__name__ == "Conv1D"
            makers[plain] = _sum(state, name, pair, scale, flipped)
        else:
            makers[plain] = _get(state, name)
    return makers


def _get(state: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: _whole(state[name])


def _sum(
    state: Mapping[str, torch.Tensor], name: str, pair: list[str], scale: float, flipped: bool
) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        weight, a, b = (_whole(state[key]).float() for key in (name, *pair))
        change = (b @ a) * scale
        return weight + (change.T if flipped else change)

    return make


def _whole(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU; collective for a DTensor."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu()


def _untrained(skeleton: Any, base: Path, have: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """What the model saves and nobody trained (buffers), taken from the base."""
    ties = getattr(skeleton, "all_tied_weights_keys", {})
    missing = skeleton.state_dict().keys() - have - ties.keys()
    if not missing:
        return {}
    places = {name: path for path in _weight_files(base) for name in _header(path)}
    lost = sorted(missing - places.keys())
    if lost:
        raise OutputError(f"the trained state lacks {', '.join(lost[:5])}")
    return {name: _read_one(places[name], name) for name in missing}


def _read_one(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        with opened(path) as file:
            value: torch.Tensor = file.get_tensor(name)
            return value

    return make


def _in_base_form(
    skeleton: Any,
    shapes: dict[str, torch.Size],
    values: dict[str, Callable[[], torch.Tensor]],
) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Undo what transformers renames, splits or joins when it loads the base (experts, mostly).

    Tried first on tensors without values: where it only renames, tensors stay apart and are made
    one by one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    empty = {name: torch.empty(shapes[name], device="meta") for name in sorted(values)}
    names = {id(tensor): name for name, tensor in empty.items()}
    reverted = revert_weight_conversion(skeleton, dict(empty))
    if all(id(tensor) in names for tensor in reverted.values()):
        return {
            new: (tuple(tensor.shape), values[names[id(tensor)]])
            for new, tensor in reverted.items()
        }
    whole = revert_weight_conversion(skeleton, {name: values[name]() for name in sorted(values)})
    return {name: (tuple(tensor.shape), _held(tensor)) for name, tensor in whole.items()}


def _held(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _shards(weights: list[_Weight], shard_bytes: int) -> list[list[_Weight]]:
    """`weights` cut into files of at most `shard_bytes`, each in the order for a file."""
    cut: list[list[_Weight]] = [[]]
    room = shard_bytes
    for weight in weights:
        if cut[-1] and weight.entry.bytes > room:
            cut.append([])
            room = shard_bytes
        cut[-1].append(weight)
        room -= weight.entry.bytes
    ordered = []
    for shard in cut:
        by_name = {weight.entry.name: weight for weight in shard}
        ordered.append([by_name[entry.name] for entry in aligned(w.entry for w in shard)])
    return ordered


def _stream(weights: list[_Weight], shard_bytes: int) -> Iterator[torch.Tensor]:
    """All values in the order in which rank 0 writes them."""
    for shard in _shards(weights, shard_bytes):
        for weight in shard:
            yield weight.value()


def _write_shards(folder: Path, weights: list[_Weight], shard_bytes: int) -> dict[str, FileDigest]:
    shards = _shards(weights, shard_bytes)
    values = _stream(weights, shard_bytes)
    files: dict[str, FileDigest] = {}
    places: dict[str, str] = {}
    try:
        for number, shard in enumerate(shards, 1):
            name = (
                f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                if len(shards) > 1
                else "model.safetensors"
            )
            entries = [weight.entry for weight in shard]
            files[name] = write_safetensors(
                folder / name,
                entries,
                _next(values, len(entries)),
                {"format": "pt"},
                after_each=lambda: failpoints.hit("output.model"),
            )
            places.update({entry.name: name for entry in entries})
    except OSError:
        # Other ranks wait in the gathering of the tensors that are left.
        for _ in values:
            pass
        raise
    if len(shards) > 1:
        entries = [weight.entry for weight in weights]
        index = {
            "metadata": {
                "total_parameters": sum(e.bytes // e.dtype.itemsize for e in entries),
                "total_size": sum(e.bytes for e in entries),
            },
            "weight_map": dict(sorted(places.items())),
        }
        files["model.safetensors.index.json"] = _write_json(
            folder / "model.safetensors.index.json", index
        )
    return files


def _next(values: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield next(values)


# -- the base directory ---------------------------------------------------------------------------


def _weight_files(base: Path) -> list[Path]:
    return sorted(base.glob("*.safetensors"))


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return read_header(file)


def _base_dtypes(base: Path) -> Callable[[str], torch.dtype]:
    """The dtype that a tensor has in the base; for a name that is not there, the commonest."""
    known: dict[str, torch.dtype] = {}
    sizes: Counter[torch.dtype] = Counter()
    for path in _weight_files(base):
        for name, tensor in _header(path).items():
            dtype = known[name] = TORCH_DTYPES[tensor["dtype"]]
            if dtype.is_floating_point:
                start, end = tensor["data_offsets"]
                sizes[dtype] += end - start
    commonest = sizes.most_common(1)[0][0] if sizes else torch.float32
    return lambda name: known.get(name, commonest)


def _base_state(base: Path) -> dict[str, torch.Tensor]:
    """The base's own parameters in fp32, by their transformers names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    return dict(model.state_dict())


def _copy_files(base: Path, folder: Path) -> dict[str, FileDigest]:
    """Configuration, tokenizer, chat template and licence, byte for byte."""
    files: dict[str, FileDigest] = {}
    for source in sorted(base.rglob("*")):
        name = source.relative_to(base)
        top = name.parts[0]
        inside = len(name.parts) == 1 or top in _COPIED_FOLDERS
        if source.is_file() and inside and not _NOT_COPIED.fullmatch(name.name):
            copy = folder / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, copy)
            _sync(copy)
            files[str(name)] = file_digest(copy)
    return files


# -- whole directories ----------------------------------------------------------------------------


def _publish(
    target: Path, write: Callable[[Path], dict[str, FileDigest]], needed: int = 0
) -> Published:
    """Fill a directory beside `target` and put it in its place at once."""
    fresh = target.with_name(f".{target.name}.tmp")
    with _writing(target, fresh, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir()
        files = write(fresh)
        sync_directory(fresh)
        failpoints.hit("output.model_swap")
        _swap(fresh, target)
        sync_directory(target.parent)
        if fresh.exists():
            shutil.rmtree(fresh, ignore_errors=True)
    return Published(target, files)


def _swap(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; what `target` was before is then `fresh`."""
    if not target.exists():
        fresh.rename(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        paths = (os.fsencode(fresh), os.fsencode(target))
        if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
    # A volume that cannot exchange: for a moment neither is in place.
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(target: Path, fresh: Path | None = None, needed: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        if is_full(error):
            existing = next(p for p in (target.parent, *target.parent.parents) if p.exists())
            need = f", {amount(needed)} are needed" if needed else ""
            free = amount(shutil.disk_usage(existing).free)
            raise StorageFullError(
                f"no room to write {target}: {free} are free{need}; delete old checkpoints or put "
                "the output on another volume, then run again: training continues from the last "
                "checkpoint"
            ) from error
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> FileDigest:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return file_digest(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _described(digest: FileDigest) -> dict[str, Any]:
    return {"bytes": digest.bytes, "sha256": digest.sha256}
