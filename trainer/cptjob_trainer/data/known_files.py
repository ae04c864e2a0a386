"""Data files whose shards are known without reading them, as long as they are as they were.

    files.json    which shards the chunks of each file became, and what the file system said of it

A file is taken for unchanged by its size, times and inode. That would miss a second change so soon
after the first that the clock of the file system still shows the same time. So a file is remembered
only when its last change was well over when its reading began, as in git's index. The time of the
last change of the inode cannot be set back, other than that of the contents.
"""

import json
import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final, Self

from cptjob_trainer.data.documents import Chunk

FILE: Final = "files.json"
# Changes whenever a record means something else.
_VERSION: Final = 1
# More than any file system's clock is coarse, and than clocks of machines that share one differ.
SETTLED_SECONDS: Final = 10.0


@dataclass(frozen=True)
class State:
    """What a file system says of a file; the times in nanoseconds."""

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Raises OSError. Opened, so that a network volume asks its server."""
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def settled(self, now: int) -> bool:
        """Whether any later change will show in the times."""
        return max(self.modified, self.changed) + SETTLED_SECONDS * 1e9 < now


class KnownFiles:
    """The keys of chunks: those that an earlier preparation left, and those that this one finds."""

    def __init__(self, directory: Path, options: str) -> None:
        """Reads what was left in `directory` by shards that were made with the same `options`."""
        self._options = options
        self._before = _read(directory / FILE, options)
        self._after: dict[str, dict[str, Any]] = {}

    def begin(self, path: Path) -> None:
        """To be called before a file is read. Raises OSError."""
        state = State.of(path)
        if state.settled(time.time_ns()):
            self._after[str(path)] = {"state": list(astuple(state)), "chunks": {}}

    def key(self, chunk: Chunk) -> str | None:
        """The key of a chunk's shard, if its file is as it was."""
        path = str(chunk.path)
        before, after = self._before.get(path), self._after.get(path)
        if before is None or after is None or before["state"] != after["state"]:
            return None
        found = before["chunks"].get(_place(chunk))
        return found if isinstance(found, str) else None

    def note(self, chunk: Chunk, key: str) -> None:
        """The shard that a chunk became."""
        after = self._after.get(str(chunk.path))
        if after is not None:
            after["chunks"][_place(chunk)] = key

    def changed(self) -> dict[str, Any] | None:
        """What is to be left in the place of what was there; None when it is the same."""
        if self._after == self._before:
            return None
        return {"version": _VERSION, "options": self._options, "files": self._after}


def _place(chunk: Chunk) -> str:
    return f"{chunk.start}-{chunk.end}"


def _read(path: Path, options: str) -> dict[str, dict[str, Any]]:
    """Nothing where the file is missing, broken, or about other shards."""
    try:
        value = json.loads(path.read_bytes())
        if (value["version"], value["options"]) != (_VERSION, options):
            return {}
        return {
            name: {"state": list(entry["state"]), "chunks": dict(entry["chunks"])}
            for name, entry in value["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
