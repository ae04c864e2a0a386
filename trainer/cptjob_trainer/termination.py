"""How a process of a job ends: one line, one exit code, one small file that says both.

The file is Kubernetes' termination message: whoever started the process reads why it ended without
parsing a log. The launcher gathers the files of its workers and passes the root cause on, where
torch's own launcher would flatten every failure to exit code 1.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cptjob_trainer.errors import CPTJobError, RankLostError, Stopped

#: Where the message goes; Kubernetes' default path is used when it exists and this is not set.
LOG_VARIABLE = "CPTJOB_TERMINATION_LOG"
DEFAULT_LOG = Path("/dev/termination-log")
#: Set to 1 to see the traceback of an error that would otherwise be one line.
DEBUG_VARIABLE = "CPTJOB_DEBUG"
#: Kubernetes cuts the file at 4096 bytes; a cut JSON could not be read back.
MAX_MESSAGE_BYTES = 3000

#: Exit code of an error nobody foresaw (sysexits EX_SOFTWARE).
INTERNAL_ERROR = 70
#: Exit code of a clean stop after saving.
STOPPED = Stopped.exit_code
_LOST = RankLostError.__name__


@dataclass(frozen=True)
class Termination:
    """Why a process ended.

    ``time`` is in seconds since the epoch; ``rank`` is None for a process that is not a worker.
    """

    exit_code: int
    reason: str
    message: str
    rank: int | None = None
    time: float = 0.0

    def to_json(self) -> str:
        value = asdict(self)
        value["exitCode"] = value.pop("exit_code")
        value["message"] = _shorten(self.message)
        return json.dumps(value, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Termination":
        """Raises ValueError when ``text`` is not a termination message."""
        value: Any = json.loads(text)
        try:
            rank = value.get("rank")
            return Termination(
                exit_code=int(value["exitCode"]),
                reason=str(value["reason"]),
                message=str(value["message"]),
                rank=None if rank is None else int(rank),
                time=float(value.get("time", 0.0)),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a termination message: {text[:80]!r}") from error


def _shorten(message: str) -> str:
    encoded = message.encode()
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return message
    return encoded[:MAX_MESSAGE_BYTES].decode(errors="ignore") + " ..."


def describe(error: BaseException) -> Termination:
    """The termination that ``error`` stands for, in the process that raised it."""
    rank = os.environ.get("RANK")
    if isinstance(error, CPTJobError):
        code, message = error.exit_code, str(error)
    else:
        code, message = INTERNAL_ERROR, _describe_unforeseen(error)
    return Termination(
        exit_code=code,
        reason=type(error).__name__,
        message=message,
        rank=int(rank) if rank and rank.isdigit() else None,
        time=time.time(),
    )


def _describe_unforeseen(error: BaseException) -> str:
    first_line = str(error).strip().split("\n")[0]
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"{text}; out of memory: lower training.batchSizePerDevice or training.maxLength, "
            "or set training.activationCheckpointing: Full"
        )
    return f"{text} (unforeseen; the log of this process has the traceback)"


def from_signal(number: int, rank: int | None = None) -> Termination:
    """The termination of a process that a signal ended before it could say anything."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = " (often: out of memory)" if number == signal.SIGKILL else ""
    who = "the process" if rank is None else f"rank {rank}"
    return Termination(
        128 + number, "Killed", f"{who} was ended by {name}{hint}", rank, time.time()
    )


def log_path() -> Path | None:
    """The file this process leaves its termination message in, or None when there is none."""
    named = os.environ.get(LOG_VARIABLE)
    if named:
        return Path(named)
    return DEFAULT_LOG if DEFAULT_LOG.exists() else None


def write(termination: Termination, path: Path | None = None) -> None:
    """Leaves the message at ``path`` (default: `log_path`). Never raises: the process is ending."""
    path = path or log_path()
    if path is None:
        return
    try:
        # In a container this is a bind mount: it can be written to, not renamed over.
        path.write_text(termination.to_json())
    except OSError as error:
        print(f"could not write {path}: {error}", file=sys.stderr)


def read(path: Path) -> Termination | None:
    """The message at ``path``; None when there is none, or no whole one."""
    try:
        return Termination.from_json(path.read_text())
    except (OSError, ValueError):
        return None


def root_cause(
    terminations: Iterable[Termination], *, stop_asked: bool = False
) -> Termination | None:
    """The one that explains the others.

    A rank whose peer died fails with a broken connection, by an error that says so or by one that
    nobody foresaw: any other error or a death by signal goes before it. A clean stop explains
    nothing while there is a failure, but where a stop was asked for it does explain broken
    connections: a rank that does not yet listen ends at once. Among equals the earliest.
    """

    def order(termination: Termination) -> tuple[int, float]:
        if termination.exit_code == 0:
            kind = 4
        elif termination.exit_code == STOPPED:
            kind = 1 if stop_asked else 3
        elif termination.exit_code == INTERNAL_ERROR or termination.reason == _LOST:
            kind = 2
        else:
            kind = 0
        return kind, termination.time

    return min(terminations, key=order, default=None)


@contextmanager
def guard() -> Iterator[None]:
    """Ends the process as its error says: one line on stderr, the termination file, the exit code.

    An error nobody foresaw leaves its traceback in the log as well. SystemExit passes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        termination = describe(error)
        foreseen = isinstance(error, CPTJobError)
        if not foreseen or os.environ.get(DEBUG_VARIABLE) == "1":
            traceback.print_exc()
        prefix = "" if termination.exit_code == STOPPED else "error: "
        print(f"{prefix}{termination.message}", file=sys.stderr, flush=True)
        write(termination)
        sys.exit(termination.exit_code)
