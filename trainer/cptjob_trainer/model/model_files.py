"""The files that a result takes over from its base model: configuration, tokenizer, licence.

A link among them is followed within the directory, and to a blob of a Hugging Face cache, whose
snapshots are links. Any other might hand out a file of this machine with the model: it is refused.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from cptjob_trainer.errors import DataError, MissingInputError
from cptjob_trainer.model.tokenizer_files import CONFIG_FILES, SLOW_FILES

# What of a base directory is copied. Anything else (weights in whatever format, code, data, the
# base's own card) has no place in a result.
_COPIED: Final = (
    "config*.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer.json",
    *SLOW_FILES,
    "merges.txt",
    "added_tokens.json",
    *CONFIG_FILES,
    "licen[cs]e*",
    "copying*",
    "notice*",
    "use_policy*",
)
_TEMPLATES: Final = "additional_chat_templates"


def copied(base: Path) -> list[Path]:
    """The files' paths in the directory `base`, in order.

    Raises DataError for a link that leads out, MissingInputError for one that leads nowhere.
    """
    entries = [entry for entry in base.iterdir() if _belongs(entry.name)]
    entries += (base / _TEMPLATES).glob("*.jinja")
    names = sorted(entry.relative_to(base) for entry in entries)
    return [name for name in names if _is_file(base, name)]


def _belongs(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in _COPIED)


def _is_file(base: Path, name: Path) -> bool:
    path = base / name
    if path.is_symlink() and not path.exists():
        raise MissingInputError(
            f"{path}: a link to {path.readlink()}, which is not there; copy the file itself here"
        )
    if not path.is_file():
        return False
    target = path.resolve()
    if not target.is_relative_to(base.resolve()) and not _is_blob(target):
        raise DataError(
            f"{path}: leads to {target}, outside of the model's directory; copy the file itself "
            "here (cp -L does so with a whole directory)"
        )
    return True


def _is_blob(target: Path) -> bool:
    """Whether a file lies where a Hugging Face cache has those that its snapshots link to."""
    return target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir()
