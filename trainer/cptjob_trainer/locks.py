"""The lock that tells whether a live process holds an output folder."""

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cptjob_trainer.errors import OutputBusyError, OutputError


class OutputLock:
    """An exclusive `flock` on `OUT/.lock`, held from `with` to its end or to the death of the
    process.

    The kernel drops the lock when the last holder dies, so a lock file left by a killed run is no
    hindrance.
    """

    def __init__(self, output: Path, uid: str) -> None:
        self.path = output / ".lock"
        self._uid = uid
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock; raises OutputBusyError at once when another process has it."""
        if self._fd is not None:
            return
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = self._busy_message(fd)
            os.close(fd)
            raise OutputBusyError(message) from None
        except OSError as error:
            os.close(fd)
            raise OutputError(
                f"cannot lock {self.path}: {error.strerror}; "
                "put the output on a volume that has file locks"
            ) from error
        self._fd = fd
        self._describe(fd)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(
                f"cannot write the output folder {self.path.parent}: {error.strerror}; "
                "choose another one or change its permissions"
            ) from error

    def _describe(self, fd: int) -> None:
        # For people who meet the lock; the lock itself is the kernel's. A full disk is no reason to
        # stop here.
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "uid": self._uid,
        }
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, (json.dumps(holder) + "\n").encode(), 0)
        except OSError:
            pass

    def _busy_message(self, fd: int) -> str:
        holder = _holder(fd)
        who = (
            f"by process {holder['pid']} on {holder['host']} since {holder['started']} "
            f"(job {holder['uid']})"
            if holder
            else "by another process"
        )
        return (
            f"the output folder {self.path.parent} is in use {who}; "
            "wait for it, stop it, or give another --output"
        )


def _holder(fd: int) -> dict[str, Any] | None:
    try:
        value = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError):
        return None
    known = isinstance(value, dict) and {"pid", "host", "started", "uid"} <= value.keys()
    return value if known else None
