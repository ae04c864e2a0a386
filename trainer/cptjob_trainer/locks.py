"""The locks that tell whether a live process holds an output folder."""

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cptjob_trainer.disk import is_full
from cptjob_trainer.errors import OutputBusyError, OutputError, StorageFullError

#: Held by the launcher while it trains.
TRAINING = ".lock"
#: Held by a client while it runs a job, and so before and after training as well.
CLIENT = ".client.lock"


class OutputLock:
    """An exclusive `flock` on a file of an output folder, held from `with` to its end or to the
    death of the process.

    The kernel drops the lock when the last holder dies, so a lock file left by a killed run is no
    hindrance.
    """

    def __init__(self, output: Path, uid: str, name: str = TRAINING) -> None:
        self.path = output / name
        self._uid = uid
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises OutputBusyError at once when another process has it, OutputError where there is no
        way to lock, StorageFullError where there is no room for the file.
        """
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
            if is_full(error):
                raise StorageFullError(
                    f"no space left on {self.path.parent}; free some and run the same command"
                ) from error
            raise OutputError(
                f"cannot write the output folder {self.path.parent}: {error.strerror}; "
                "choose another one with --output or change its permissions"
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
