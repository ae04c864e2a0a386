"""Writes a result's model: `OUT/model/` and `OUT/adapter/`, or a checkpoint's model anywhere.

Weights are safetensors with the base's names and dtypes; configuration and tokenizer are the base's
own files, byte for byte. The same tensors give the same bytes. Each folder is swapped in whole.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from cptjob_trainer import failpoints, swap
from cptjob_trainer.checkpoint.dcp import StoredTensors
from cptjob_trainer.disk import FileDigest, file_digest, sync_file, write_json
from cptjob_trainer.model import model_files
from cptjob_trainer.model.safetensors_file import Entry, aligned, write_safetensors
from cptjob_trainer.results.result_weights import Weight, base_state, plan, whole

SHARD_BYTES: Final = 5_000_000_000
_MODEL_PREFIX: Final = "model."


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

    `rank` is LoRA's; `base` is where the model lies that the adapter belongs to, as
    `AutoPeftModel.from_pretrained` loads it.
    """
    tensors = {
        "base_model.model." + name.replace(".default.", "."): whole(value)
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
    files: dict[str, FileDigest] = {}

    def write(folder: Path) -> None:
        failpoints.hit("output.adapter")
        entries = aligned(Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
        values = (tensors[entry.name] for entry in entries)
        files["adapter_config.json"] = write_json(folder / "adapter_config.json", config)
        files["adapter_model.safetensors"] = write_safetensors(
            folder / "adapter_model.safetensors", entries, values, {"format": "pt"}
        )

    swap.replace(out / "adapter", write)
    return Published(out / "adapter", files)


def export(
    checkpoint: Path,
    manifest: dict[str, Any],
    base: Path,
    target: Path,
    *,
    lora_scale: float | None = None,
) -> Published:
    """Write a whole checkpoint, whose manifest is given, as a Hugging Face directory `target`,
    which must not exist. Raises OutputError, StorageFullError.
    """
    state: Mapping[str, torch.Tensor] = StoredTensors(checkpoint, manifest, _MODEL_PREFIX)
    if lora_scale is not None:
        state = {**base_state(base), **state}
    published = _publish_weights(target, base, state, lora_scale, 0, SHARD_BYTES)
    assert published is not None
    return published


def _publish_weights(
    target: Path,
    base: Path,
    state: Mapping[str, torch.Tensor],
    lora_scale: float | None,
    rank: int,
    shard_bytes: int,
) -> Published | None:
    weights = plan(base, state, lora_scale)
    if rank != 0:
        for _ in _stream(weights, shard_bytes):
            pass
        return None
    files: dict[str, FileDigest] = {}

    def write(folder: Path) -> None:
        files.update(_copy_files(base, folder))
        files.update(_write_shards(folder, weights, shard_bytes))

    swap.replace(target, write, sum(weight.entry.bytes for weight in weights))
    return Published(target, dict(sorted(files.items())))


def _shards(weights: list[Weight], shard_bytes: int) -> list[list[Weight]]:
    """`weights` cut into files of at most `shard_bytes`, each in the order for a file."""
    cut: list[list[Weight]] = [[]]
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


def _stream(weights: list[Weight], shard_bytes: int) -> Iterator[torch.Tensor]:
    """All values in the order in which rank 0 writes them."""
    for shard in _shards(weights, shard_bytes):
        for weight in shard:
            yield weight.value()


def _write_shards(folder: Path, weights: list[Weight], shard_bytes: int) -> dict[str, FileDigest]:
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
        files["model.safetensors.index.json"] = write_json(
            folder / "model.safetensors.index.json", index
        )
    return files


def _next(values: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield next(values)


def _copy_files(base: Path, folder: Path) -> dict[str, FileDigest]:
    """Configuration, tokenizer, chat template and licence, byte for byte; of links, what they
    lead to.
    """
    files: dict[str, FileDigest] = {}
    for name in model_files.copied(base):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, copy)
        sync_file(copy)
        files[str(name)] = file_digest(copy)
    return files
