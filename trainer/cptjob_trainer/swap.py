"""Folders that are replaced at once: whoever looks finds the old one or the new one, whole."""

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cptjob_trainer import failpoints
from cptjob_trainer.disk import amount, is_full, sync_directory
from cptjob_trainer.errors import OutputError, StorageFullError

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


def replace(target: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Let `write` fill a folder beside `target`, and put that in its place at once.

    `needed` bytes are told when there is no room. Raises OutputError, StorageFullError.
    """
    fresh = target.with_name(f".{target.name}.tmp")
    with writing(target, fresh, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir()
        write(fresh)
        sync_directory(fresh)
        failpoints.hit("output.model_swap")
        _swap(fresh, target)
        sync_directory(target.parent)
        if fresh.exists():
            shutil.rmtree(fresh, ignore_errors=True)


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
def writing(target: Path, fresh: Path | None = None, needed: int = 0) -> Iterator[None]:
    """Faults of writing, as ours; `fresh` is removed then."""
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
