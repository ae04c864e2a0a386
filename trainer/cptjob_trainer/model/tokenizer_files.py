"""Which files make a tokenizer, and what tells two of them apart. Standard library only."""

import hashlib
from pathlib import Path

from cptjob_trainer.errors import MissingInputError

# Files that a slow tokenizer may consist of.
SLOW_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
CONFIG_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def fingerprint(model: Path) -> str:
    """Digest of all files that make the tokenizer. Raises MissingInputError when there is none."""
    names = ("tokenizer.json", *SLOW_FILES, "merges.txt", "added_tokens.json", *CONFIG_FILES)
    present = [name for name in names if (model / name).is_file()]
    if not set(present) & {"tokenizer.json", *SLOW_FILES}:
        raise MissingInputError(
            f"{model}: the tokenizer is missing (tokenizer.json); copy it from the base model"
        )
    digest = hashlib.sha256()
    for name in present:
        digest.update(name.encode() + b"\0" + hashlib.sha256(read(model / name)).digest())
    return digest.hexdigest()[:32]


def read(path: Path) -> bytes:
    """A file's contents. Raises MissingInputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror}") from error
