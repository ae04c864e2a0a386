"""The launcher's temporary folder: all that it has outside the output, in one place.

It is not in the output, so that a worker can say there that the output's disk is full. A launcher
that was killed leaves its folder, and the next one on this machine removes it.
"""

import hashlib
import os
import shutil
import socket
import tempfile
from functools import cache
from pathlib import Path

# A socket's path has 107 bytes at most; the fork server's is so much longer than the folder's.
_SOCKET_PATH = 107 - len("/pymp-12345678/listener-12345678")


@cache
def directory() -> Path:
    """The folder, made and used by all of `tempfile` in this process from the first call on."""
    parent = Path(tempfile.gettempdir())
    # Containers may share /tmp, and each counts its processes from 1.
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
    prefix = f"cptjob-{host}-"
    for left in parent.glob(f"{prefix}*"):
        process_id = left.name.removeprefix(prefix).partition("-")[0]
        if not Path(f"/proc/{process_id}").exists():
            shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    if len(os.fsencode(made)) <= _SOCKET_PATH:
        tempfile.tempdir = str(made)
    return made


def remove() -> None:
    """Remove the folder, if there is one; what is not stopped yet may fail to write there."""
    if directory.cache_info().currsize:
        shutil.rmtree(directory(), ignore_errors=True)
