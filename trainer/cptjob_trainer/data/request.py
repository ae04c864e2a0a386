"""What decides the rows of prepared data, as one digest that takes no reading of the corpus.

`prepare` writes it into prepared.json, and `cptjob estimate` finds by it the data that was prepared
for a job, whatever its epochs, batch and weights: those decide how often rows are drawn, not which
there are. Standard library only.
"""

import hashlib
import json
import os
from pathlib import Path

from cptjob_trainer.config import DatasetInput, TrainerConfig
from cptjob_trainer.errors import MissingInputError
from cptjob_trainer.model import tokenizer_files

EXTENSION = ".jsonl"

# Files up to three times this are digested whole, of larger ones the start, the middle and the end.
_SAMPLE = 1 << 20


def digest(config: TrainerConfig) -> str:
    """Tells apart data, split, tokenizer, architecture, length and prompt. Raises
    MissingInputError when an input cannot be read.
    """
    training = config.training
    parts = [
        [_data(dataset) for dataset in config.datasets],
        [_data(dataset) for dataset in config.validation.datasets],
        config.validation.split_percent,
        config.data.model_dump(mode="json") | {"max_bad_lines": config.data.max_bad_lines > 0},
        tokenizer_files.fingerprint(config.model.path),
        tokenizer_files.read(config.model.path / "config.json").decode("utf-8", "replace"),
        training.max_length,
        training.system_prompt,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def names(path: Path) -> list[str]:
    """What lies in a directory of data, in order, but for hidden files. Raises OSError."""
    entries = sorted(os.listdir(path))
    return [name for name in entries if not name.startswith(".") and name != "lost+found"]


def files(path: Path) -> list[Path]:
    """The files of a data set, as far as they are usable at all. Raises MissingInputError."""
    try:
        if not path.is_dir():
            return [path]
        return [path / name for name in names(path) if name.endswith(EXTENSION)]
    except OSError as error:
        raise MissingInputError(f"{path}: the data set cannot be read: {error.strerror}") from error


def _data(dataset: DatasetInput) -> list[str]:
    """The role decides whether a part is held out; names and weights decide nothing about rows."""
    return [dataset.role, *(_contents(path) for path in files(dataset.path))]


def _contents(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            result = hashlib.sha256(f"{size}\n".encode())
            places = [0, _SAMPLE, 2 * _SAMPLE]
            if size > 3 * _SAMPLE:
                places = [0, (size - _SAMPLE) // 2, size - _SAMPLE]
            for place in places:
                result.update(os.pread(file.fileno(), _SAMPLE, place))
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror}") from error
    return result.hexdigest()
