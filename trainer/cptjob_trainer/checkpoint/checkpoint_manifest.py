"""The manifest of a checkpoint: created last and once; without it a directory is nothing.

It holds the loop's state, the lineage, and size and digest of every file, under a digest of its
own, so that a torn or edited one is told from a whole one.
"""

import errno
import hashlib
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from cptjob_trainer.disk import file_digest
from cptjob_trainer.errors import CheckpointError, ConfigError, OutputError

MANIFEST: Final = "manifest.json"
FORMAT: Final = "cptjob-checkpoint"
VERSION: Final = 1

# Errors that tell of a broken file. Any other (no permission, too many files open, a stale handle of
# a network volume) tells of the moment: to pass over a whole checkpoint for it would throw work away.
_BROKEN: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EBADMSG, errno.EUCLEAN}
)


def is_complete(path: Path) -> bool:
    """Whether directory `path` has a manifest. Raises OutputError when that cannot be told."""
    try:
        os.stat(path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno not in _BROKEN:
            raise _unreadable(path / MANIFEST, error) from error
    return True


def _unreadable(file: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{file} cannot be read: {error.strerror}; that does not make the checkpoint broken: make it "
        "readable and run again, or delete its directory to go on from an older one"
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of directory `path`, if whole; else a CheckpointError says what is wrong.

    Raises OutputError when it could not be read at this moment, ConfigError when it is of a newer
    program.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        if error.errno not in _BROKEN:
            raise _unreadable(path / MANIFEST, error) from error
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST} is not that of a checkpoint")
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointError(f"{MANIFEST} does not have the digest that it states")
    if manifest.get("version") != VERSION:
        # Not skipped: going on without it would begin anew, and delete it in the end.
        raise ConfigError(
            f"{path / MANIFEST} has format version {manifest.get('version')}, this program reads "
            f"{VERSION}; use the program that wrote it, or another output"
        )
    try:
        _check(path, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} lacks an entry") from error
    return manifest


def _check(path: Path, manifest: dict[str, Any]) -> None:
    """Raises CheckpointError for what is of another directory, or would lead out of this one."""
    if path.name != f"step-{manifest['step']}.{manifest['generation']}":
        raise CheckpointError(
            f"{MANIFEST} is of step {manifest['step']}, generation {manifest['generation']}"
        )
    read = {chunk["file"] for tensor in manifest["tensors"].values() for chunk in tensor["chunks"]}
    for name in sorted({*read, *manifest["files"]}):
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise CheckpointError(f"{MANIFEST} names {name!r}, which is no file of its directory")
    if unlisted := read - manifest["files"].keys():
        raise CheckpointError(f"{MANIFEST} lists no digest of {', '.join(sorted(unlisted))}")


def faults(path: Path, manifest: dict[str, Any], names: list[str] | None = None) -> list[str]:
    """What is wrong with files of a checkpoint: missing, other size or digest; [] when whole.

    Raises OutputError when one could not be read at this moment.
    """
    files = manifest["files"]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        reports = pool.map(
            lambda name: _fault(path / name, files[name]), files if names is None else names
        )
        return [report for report in reports if report]


def _fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, not {expected['bytes']}"
        if file_digest(path).sha256 != expected["sha256"]:
            return f"{path.name} does not have the digest that the manifest states"
    except OSError as error:
        if error.errno not in _BROKEN:
            raise _unreadable(path, error) from error
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def size_of(manifest: dict[str, Any]) -> int:
    """Bytes of all files that a manifest names."""
    return sum(file["bytes"] for file in manifest["files"].values())


def seal(manifest: dict[str, Any]) -> bytes:
    """`manifest` as JSON with its own digest in it, a line for each field, file and tensor."""
    fields = []
    for key, value in {**manifest, "digest": _digest(manifest)}.items():
        if key in ("files", "tensors"):
            rows = (f"  {json.dumps(name)}: {json.dumps(value[name])}" for name in value)
            fields.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            fields.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def _digest(manifest: dict[str, Any]) -> str:
    plain = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def software() -> dict[str, str]:
    """Versions of this program, and of that on which exact continuation depends."""
    packages = ("cptjob", "torch", "transformers", "peft", "safetensors", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
