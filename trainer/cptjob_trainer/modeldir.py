"""Checks a model directory before anything expensive starts. Needs neither torch nor transformers.

A usable directory holds `config.json` of a causal language model that the installed transformers
knows, weights as safetensors (one file, or shards with an index), and a tokenizer.
"""

import ast
import hashlib
import importlib.util
import json
import os
import re
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cptjob_trainer import model_config, safetensors_header, tokenizer_files
from cptjob_trainer.errors import ConfigError, DataError, MissingInputError
from cptjob_trainer.safetensors_header import ForeignFileError, Header, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# How much of each tensor goes into the fingerprint, at its start, its middle and its end.
_SAMPLE = 1024
# Files up to this size are digested whole.
_SMALL_FILE = 64 << 20

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".zst", ".gz")
_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".nemo": "NeMo",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ENCRYPTED = {
    b"age-encryption.org/": "age",
    b"-----BEGIN AGE": "age",
    b"-----BEGIN PGP": "PGP",
    b"Salted__": "openssl",
}
_ENCRYPTED_SUFFIXES = (".age", ".gpg", ".pgp", ".asc", ".enc", ".crypt")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}

# The input embedding's names, over the architectures of transformers.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# Architectures whose table has rows beyond the vocabulary.
_SPARE_ROWS = ("mllama", "moshi")

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    architecture = _architecture(path, config)
    files = _weights(path, names)
    headers = {file: _header(file) for file in files}
    _check_index(path, names, headers)
    _check_widths(path, config, headers)
    counts = _numbers_by_type(headers.values())
    main_type = max(counts, key=lambda name: counts[name], default="F32")
    return ModelInfo(
        path=path,
        config=config,
        architecture=architecture,
        files=files,
        parameters=sum(counts.values()),
        dtype=_DTYPES.get(main_type, main_type),
        max_positions=model_config.max_positions(config),
        vocab_size=model_config.vocab_size(config),
        fingerprint=_fingerprint(path, headers),
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
        raise _not_a_directory(path)
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


def _not_a_directory(path: Path) -> DataError:
    """A file where a directory is needed; most likely an archive."""
    head = _head(path)
    for magic, name in _ENCRYPTED.items():
        if head.startswith(magic):
            return DataError(f"{path}: the model is encrypted ({name}); decrypt it first")
    if _suffix(path.name, _ENCRYPTED_SUFFIXES):
        return DataError(f"{path}: the model is encrypted; decrypt it first")
    compressed = any(head.startswith(magic) for magic in _COMPRESSED)
    if compressed or _suffix(path.name, _ARCHIVES):
        return DataError(
            f"{path}: the model is compressed; unpack it and name the directory with config.json"
        )
    kind = _OTHER_FORMATS.get(path.suffix.lower())
    if kind:
        return DataError(f"{path}: {_convert(kind)}")
    return DataError(f"{path}: a file; name the directory that holds config.json and the weights")


def _convert(kind: str) -> str:
    return (
        f"the model is in {kind} format; convert it to a Hugging Face directory with safetensors "
        "and name that"
    )


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error


def _suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _refuse_encrypted(path: Path, names: list[str]) -> None:
    """An encrypted file may have kept its name, so what it starts with decides."""
    for name in names:
        file = path / name
        if not file.is_file():
            continue
        head = _head(file)
        found = [kind for magic, kind in _ENCRYPTED.items() if head.startswith(magic)]
        if found or _suffix(name, _ENCRYPTED_SUFFIXES):
            how = f" ({found[0]})" if found else ""
            raise DataError(f"{file}: the model is encrypted{how}; decrypt it first")


# --- config.json -------------------------------------------------------------------------------------


def _config(path: Path, names: list[str]) -> dict[str, Any]:
    if "config.json" not in names:
        raise _no_config(path, names)
    return _json(path / "config.json")


def _no_config(path: Path, names: list[str]) -> DataError | MissingInputError:
    """Name what lies there instead of a model."""
    for name in names:
        if _suffix(name, _ARCHIVES):
            return DataError(
                f"{path / name}: the model is compressed; unpack it into this directory"
            )
        kind = _OTHER_FORMATS.get(Path(name).suffix.lower())
        if kind:
            return DataError(f"{path / name}: {_convert(kind)}")
    if "adapter_config.json" in names:
        return DataError(
            f"{path}: an adapter, not a model; merge it into its base model and name the result"
        )
    return MissingInputError(
        f"{path}: config.json is missing; name the directory that holds it and the weights"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; copy the file again")
    return value


def _refuse_remote_code(path: Path, config: dict[str, Any]) -> None:
    if config.get("auto_map"):
        raise DataError(
            f"{path / 'config.json'}: the model wants to run code of its own (auto_map), which is "
            "never done; use a model that transformers knows, and remove auto_map if this one is"
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


# --- weights -----------------------------------------------------------------------------------------


def _weights(path: Path, names: list[str]) -> tuple[Path, ...]:
    if INDEX in names:
        wanted = sorted(set(_weight_map(path).values()))
        missing = [name for name in wanted if name not in names]
        if missing:
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" * (len(missing) > 3))
            raise MissingInputError(
                f"{path / INDEX}: names weights that are missing: {some}; copy them here"
            )
        return tuple(path / name for name in wanted)
    if SINGLE in names:
        return (path / SINGLE,)
    raise _no_safetensors(path, names)


def _no_safetensors(path: Path, names: list[str]) -> DataError | MissingInputError:
    if any(name.endswith(".safetensors") for name in names):
        return MissingInputError(
            f"{path}: {INDEX} is missing, which says what lies in which file; copy it here"
        )
    pickles = [name for name in names if _suffix(name, _PICKLES)]
    if pickles:
        return DataError(
            f"{path / pickles[0]}: weights as a pickle can run code and are refused; convert them: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('.').save_pretrained('converted')\" and copy the tokenizer"
        )
    for name in names:
        if _suffix(name, _ARCHIVES):
            return DataError(
                f"{path / name}: the model is compressed; unpack it into this directory"
            )
        kind = _OTHER_FORMATS.get(Path(name).suffix.lower())
        if kind:
            return DataError(f"{path / name}: {_convert(kind)}")
    return MissingInputError(f"{path}: the weights are missing ({SINGLE}); copy them here")


def _weight_map(path: Path) -> dict[str, str]:
    weights = _json(path / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise DataError(f"{path / INDEX}: has no weight_map; copy the file again")
    for name in weights.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{path / INDEX}: names a file outside the directory: {name!r}")
    return weights


def _header(path: Path) -> Header:
    """Read and check the header of a safetensors file."""
    try:
        with path.open("rb") as file:
            header = safetensors_header.read(file)
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except ForeignFileError as error:
        raise DataError(f"{path}: {_not_safetensors(_head(path), path.stat().st_size)}") from error
    except ValueError as error:
        raise DataError(f"{path}: the safetensors header is broken; copy the file again") from error
    if header.needed > header.size:
        raise DataError(
            f"{path}: the file is truncated: {header.size} bytes, its header speaks of "
            f"{header.needed}; copy it again"
        )
    return header


def _not_safetensors(first: bytes, size: int) -> str:
    for magic, name in _COMPRESSED.items():
        if first.startswith(magic):
            return f"compressed ({name}), not safetensors; unpack it first"
    if size < 8:
        return "the file is empty or truncated; copy it again"
    if first.startswith(b"version "):
        return "a Git LFS pointer, not the weights; fetch them with git lfs pull"
    return "not a safetensors file, truncated or encrypted; copy or decrypt it"


def _check_index(path: Path, names: list[str], headers: dict[Path, Header]) -> None:
    if INDEX not in names:
        return
    present = {file.name: {t.name for t in header.tensors} for file, header in headers.items()}
    for tensor, file in _weight_map(path).items():
        if tensor not in present[file]:
            raise DataError(
                f"{path / file}: tensor {tensor} is missing, which {INDEX} promises; copy the "
                "model again"
            )


def _check_widths(path: Path, config: dict[str, Any], headers: dict[Path, Header]) -> None:
    """The configuration's sizes are those of the embedding table, if one has a known name."""
    spare = str(config.get("model_type")).startswith(_SPARE_ROWS)
    said = {
        "vocabulary": None if spare else model_config.vocab_size(config),
        "hidden size": model_config.embedding_width(config),
    }
    tables = [
        (file, tensor)
        for file, header in headers.items()
        for tensor in header.tensors
        if _EMBEDDING.search(tensor.name) and tensor.dtype in _DTYPES and len(tensor.shape) == 2
    ]
    for file, tensor in tables:
        for (what, wanted), found in zip(said.items(), tensor.shape, strict=True):
            if wanted not in (None, found):
                raise DataError(
                    f"{path / 'config.json'}: gives a {what} of {wanted}, and {tensor.name} in "
                    f"{file.name} has {found}; copy config.json and weights of one model"
                )


def _numbers_by_type(headers: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for header in headers:
        for tensor in header.tensors:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numbers
    return counts


# --- the fingerprint ---------------------------------------------------------------------------------


def _fingerprint(path: Path, headers: dict[Path, Header]) -> str:
    """Tells one model from another: configuration, and of each file of weights size, header and data.

    Small files are digested whole. Of a larger one, the start, middle and end of each tensor are: to
    read hundreds of GB at each start would take minutes, and a further trained or merged model
    differs all over the tensors that were trained.
    """
    digest = hashlib.sha256()
    config = _json(path / "config.json")
    # Written by whoever saved the model last; no part of what it computes.
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file, header in headers.items():
        digest.update(f"\0{file.name}\0{header.size}\0".encode())
        digest.update(header.raw)
        with file.open("rb") as opened:
            if header.size <= _SMALL_FILE:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
                continue
            for tensor in header.tensors:
                for at in _samples(tensor):
                    digest.update(os.pread(opened.fileno(), _SAMPLE, at))
    return digest.hexdigest()[:32]


def _samples(tensor: Tensor) -> list[int]:
    middle = (tensor.start + tensor.end) // 2
    return sorted({tensor.start, middle, max(tensor.start, tensor.end - _SAMPLE)})
