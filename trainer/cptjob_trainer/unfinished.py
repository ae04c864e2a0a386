"""Names for what is not finished yet.

Several pods may write into one directory, and each is process 1 of its own. So a name holds the
host, the process and a random number; what a dead process of this host left behind is found by it.
"""

import os
import shutil
import socket
import uuid
from pathlib import Path


def _prefix() -> str:
    return f".{socket.gethostname()}."


def path_in(directory: Path) -> Path:
    """A path that nothing has and nobody else will choose; nothing is made there."""
    return directory / f"{_prefix()}{os.getpid()}.{uuid.uuid4().hex}.tmp"


def remove_leftovers(directory: Path) -> None:
    """Remove what processes of this machine that are dead left in `directory`."""
    prefix = _prefix()
    for entry in directory.iterdir():
        if not entry.name.startswith(prefix):
            continue
        process_id = entry.name[len(prefix) :].partition(".")[0]
        if process_id.isdigit() and Path(f"/proc/{process_id}").exists():
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
