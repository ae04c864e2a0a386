"""The weights of a model directory: which files they are, whether whole, and what tells them apart.

Only heads and samples are read. Needs neither torch nor transformers.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cptjob_trainer.errors import DataError, MissingInputError
from cptjob_trainer.json_file import json_object
from cptjob_trainer.model import foreign_files, model_config, safetensors_header
from cptjob_trainer.model.foreign_files import ends, head
from cptjob_trainer.model.safetensors_header import ForeignFileError, Header, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# How much of each tensor goes into the fingerprint, at its start, its middle and its end.
_SAMPLE = 1024
# Files up to this size are digested whole.
_SMALL_FILE = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The input embedding's names, over the architectures of transformers.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# Architectures whose table has rows beyond the vocabulary.
_SPARE_ROWS = ("mllama", "moshi")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def files(path: Path, names: list[str]) -> tuple[Path, ...]:
    """The files of weights among the `names` of a directory. Raises MissingInputError, DataError."""
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
    pickles = [name for name in names if ends(name, _PICKLES)]
    if pickles:
        return DataError(
            f"{path / pickles[0]}: weights as a pickle can run code and are refused; convert them: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('{path}-converted')\", copy the tokenizer "
            f"there and name {path}-converted as the model"
        )
    return foreign_files.among(path, names) or MissingInputError(
        f"{path}: the weights are missing ({SINGLE}); copy them here"
    )


def _weight_map(path: Path) -> dict[str, str]:
    weights = json_object(path / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise DataError(f"{path / INDEX}: has no weight_map; copy the file again")
    for name in weights.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{path / INDEX}: names a file outside the directory: {name!r}")
    return weights


def header(path: Path) -> Header:
    """Read and check the head of a safetensors file. Raises MissingInputError, DataError."""
    try:
        with path.open("rb") as file:
            found = safetensors_header.read(file)
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except ForeignFileError as error:
        raise DataError(f"{path}: {_not_safetensors(head(path), path.stat().st_size)}") from error
    except ValueError as error:
        raise DataError(f"{path}: the safetensors header is broken; copy the file again") from error
    if found.needed > found.size:
        raise DataError(
            f"{path}: the file is truncated: {found.size} bytes, its header speaks of "
            f"{found.needed}; copy it again"
        )
    return found


def _not_safetensors(first: bytes, size: int) -> str:
    compression = foreign_files.compressed(first)
    if compression is not None:
        return f"compressed ({compression}), not safetensors; unpack it first"
    if size < 8:
        return "the file is empty or truncated; copy it again"
    if first.startswith(b"version "):
        return "a Git LFS pointer, not the weights; fetch them with git lfs pull"
    return "not a safetensors file, truncated or encrypted; copy or decrypt it"


def check_index(path: Path, names: list[str], headers: dict[Path, Header]) -> None:
    """Every tensor lies where the index says, if there is one. Raises DataError."""
    if INDEX not in names:
        return
    present = {file.name: {t.name for t in header.tensors} for file, header in headers.items()}
    for tensor, file in _weight_map(path).items():
        if tensor not in present[file]:
            raise DataError(
                f"{path / file}: tensor {tensor} is missing, which {INDEX} promises; copy the "
                "model again"
            )


def check_widths(path: Path, config: dict[str, Any], headers: dict[Path, Header]) -> None:
    """The configuration's sizes are those of the embedding table, if one has a known name. Raises
    DataError.
    """
    spare = str(config.get("model_type")).startswith(_SPARE_ROWS)
    said = {
        "vocabulary": None if spare else model_config.vocab_size(config),
        "hidden size": model_config.embedding_width(config),
    }
    tables = [
        (file, tensor)
        for file, header in headers.items()
        for tensor in header.tensors
        if _EMBEDDING.search(tensor.name) and tensor.dtype in DTYPES and len(tensor.shape) == 2
    ]
    for file, tensor in tables:
        for (what, wanted), found in zip(said.items(), tensor.shape, strict=True):
            if wanted not in (None, found):
                raise DataError(
                    f"{path / 'config.json'}: gives a {what} of {wanted}, and {tensor.name} in "
                    f"{file.name} has {found}; copy config.json and weights of one model"
                )


def numbers_by_type(headers: Iterable[Header]) -> dict[str, int]:
    """How many numbers there are of each dtype."""
    counts: dict[str, int] = {}
    for header in headers:
        for tensor in header.tensors:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numbers
    return counts


def fingerprint(config: dict[str, Any], headers: dict[Path, Header]) -> str:
    """Tells one model from another: configuration, and of each file of weights size, header and data.

    Small files are digested whole. Of a larger one, the start, middle and end of each tensor are: to
    read hundreds of GB at each start would take minutes, and a further trained or merged model
    differs all over the tensors that were trained.
    """
    digest = hashlib.sha256()
    # Written by whoever saved the model last; no part of what it computes.
    ignored = ("transformers_version", "_name_or_path")
    said = {name: value for name, value in config.items() if name not in ignored}
    digest.update(json.dumps(said, sort_keys=True).encode())
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
