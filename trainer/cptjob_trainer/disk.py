"""Files that last: created once or not at all, synced, digested, and what a full volume says."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cptjob_trainer.errors import UnreadableError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What some network volumes answer: they have no hard links, or sync no directories.
_NO_LINKS: Final = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
)
_NO_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP})
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_BLOCK: Final = 1 << 20


def is_full(error: BaseException) -> bool:
    """True when `error` says that the volume, a quota or a file size limit leaves no room."""
    return isinstance(error, OSError) and error.errno in _FULL


def is_missing(error: BaseException) -> bool:
    """True when `error` says that there is no such file.

    Any other fault of reading (a stale handle, no permission, a fault of the network) may pass.
    """
    return isinstance(error, OSError) and error.errno in _MISSING


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """What to raise for a fault of reading `path` other than a missing file."""
    return UnreadableError(
        f"{path}: cannot be read at this moment: {error.strerror}; check the volume and the "
        "permissions, and run again"
    )


def create(path: Path, content: bytes) -> None:
    """Create `path`, content and all, durably, at once; raises FileExistsError when it is there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write_synced(temporary, content)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _create_in_place(path, content)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make creations and deletions of names in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make the contents of an existing file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


def file_digest(path: Path) -> FileDigest:
    """Size and SHA-256 of an existing file. Raises OSError."""
    digest = hashlib.sha256()
    size = 0
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileDigest(size, digest.hexdigest())


def write_json(path: Path, value: Mapping[str, Any]) -> FileDigest:
    """Create `path` with `value` as JSON, its keys sorted, and make it durable. Raises OSError."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    _write_synced(path, text.encode())
    return file_digest(path)


def amount(count: float) -> str:
    """Bytes for people: 999 bytes, 1.5 MB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def _create_in_place(path: Path, content: bytes) -> None:
    """For volumes without hard links: a torn file would hold the name for good, so it is removed."""
    try:
        _write_synced(path, content)
    except FileExistsError:
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
