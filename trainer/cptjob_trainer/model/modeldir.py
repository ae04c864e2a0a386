"""Checks a model directory before anything expensive starts. Needs neither torch nor transformers.

A usable directory holds `config.json` of a causal language model that the installed transformers
knows, weights as safetensors (one file, or shards with an index), and a tokenizer.
"""

import ast
import importlib.util
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cptjob_trainer.errors import ConfigError, DataError, MissingInputError
from cptjob_trainer.json_file import json_object
from cptjob_trainer.model import (
    foreign_files,
    model_config,
    model_files,
    model_weights,
    tokenizer_files,
)


@dataclass(frozen=True)
class ModelInfo:
    """A usable model directory. `dtype` is that of most numbers, in torch's words; `files` are the
    weights; `max_positions` is None where the model has no limit of its own.
    """

    path: Path
    config: dict[str, Any]
    architecture: str
    files: tuple[Path, ...]
    parameters: int
    dtype: str
    max_positions: int | None
    vocab_size: int | None
    fingerprint: str
    tokenizer_fingerprint: str


def check_model(path: Path) -> ModelInfo:
    """Read everything but the weights. Raises MissingInputError, DataError or ConfigError."""
    names = _listing(path)
    _refuse_encrypted(path, names)
    config = _config(path, names)
    _refuse_remote_code(path, config)
    _refuse_adapter(path, names)
    _refuse_quantized(path, config)
    model_files.copied(path)  # raises for what no result could take over
    architecture = _architecture(path, config)
    files = model_weights.files(path, names)
    headers = {file: model_weights.header(file) for file in files}
    model_weights.check_index(path, names, headers)
    model_weights.check_widths(path, config, headers)
    counts = model_weights.numbers_by_type(headers.values())
    main_type = max(counts, key=lambda name: counts[name], default="F32")
    return ModelInfo(
        path=path,
        config=config,
        architecture=architecture,
        files=files,
        parameters=sum(counts.values()),
        dtype=model_weights.DTYPES.get(main_type, main_type),
        max_positions=model_config.max_positions(config),
        vocab_size=model_config.vocab_size(config),
        fingerprint=model_weights.fingerprint(config, headers),
        tokenizer_fingerprint=tokenizer_files.fingerprint(path),
    )


# --- the directory -----------------------------------------------------------------------------------


def _listing(path: Path) -> list[str]:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise MissingInputError(
            f"{path}: there is no model directory; check model.storageUri and the volume"
        ) from error
    except OSError as error:
        raise MissingInputError(f"{path}: the model cannot be read: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise foreign_files.instead_of_directory(path)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise MissingInputError(
            f"{path}: the model directory cannot be read: {error.strerror}; check its permissions"
        ) from error
    names = [name for name in names if not name.startswith(".") and name != "lost+found"]
    if not names:
        raise MissingInputError(f"{path}: the model directory is empty; put a model there")
    return names


def _refuse_encrypted(path: Path, names: list[str]) -> None:
    for name in names:
        fault = foreign_files.encrypted(path / name) if (path / name).is_file() else None
        if fault is not None:
            raise fault


# --- config.json -------------------------------------------------------------------------------------


def _config(path: Path, names: list[str]) -> dict[str, Any]:
    if "config.json" not in names:
        raise _no_config(path, names)
    return json_object(path / "config.json")


def _no_config(path: Path, names: list[str]) -> DataError | MissingInputError:
    """Name what lies there instead of a model."""
    fault = foreign_files.among(path, names)
    if fault is not None:
        return fault
    if "adapter_config.json" in names:
        return DataError(
            f"{path}: an adapter, not a model; merge it into its base model and name the result"
        )
    return MissingInputError(
        f"{path}: config.json is missing; name the directory that holds it and the weights"
    )


def _refuse_remote_code(path: Path, config: dict[str, Any]) -> None:
    if config.get("auto_map"):
        raise DataError(
            f"{path / 'config.json'}: the model wants to run code of its own (auto_map), which is "
            "never done; use a model that transformers knows, and remove auto_map if this one is"
        )


def _refuse_adapter(path: Path, names: list[str]) -> None:
    """transformers would load it into the model, which is then none that could be written again."""
    if "adapter_config.json" in names:
        raise DataError(
            f"{path / 'adapter_config.json'}: an adapter beside the model; merge it into the model, "
            "or move it away to train the model without it"
        )


def _refuse_quantized(path: Path, config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        raise DataError(
            f"{path / 'config.json'}: the weights are quantized (quantization_config), and such "
            "cannot be trained; name the model that they were made from"
        )


def _architecture(path: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    model_type = config.get("model_type")
    known = causal_lm_classes()
    if architecture is None and isinstance(model_type, str) and model_type in known:
        return known[model_type][0]
    classes = {name for group in known.values() for name in group}
    if not isinstance(architecture, str) or architecture not in classes:
        raise DataError(
            f"{path / 'config.json'}: architecture {architecture or model_type or 'unknown'} is not "
            "supported; a causal language model of transformers is needed, such as LlamaForCausalLM"
        )
    if model_type is None:
        raise DataError(
            f"{path / 'config.json'}: model_type is missing; copy the file again, or name the "
            "architecture's, such as llama"
        )
    if model_type not in known:
        raise DataError(
            f"{path / 'config.json'}: model_type {model_type} is not supported; a causal language "
            "model of transformers is needed, such as llama"
        )
    return architecture


@lru_cache(maxsize=1)
def causal_lm_classes() -> dict[str, tuple[str, ...]]:
    """model_type -> causal language model classes of the installed transformers.

    Read from its source: importing it takes seconds, and torch with it.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("transformers is not installed; install the extra [trainer]")
    source = Path(spec.submodule_search_locations[0]) / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES":
            pairs = ast.literal_eval(node.value.args[0])
            return {
                model: (names,) if isinstance(names, str) else tuple(names)
                for model, names in pairs
            }
    raise ConfigError(f"{source}: names no causal language models; install another transformers")
