"""Every fault that can be foreseen, as one tree.

    CPTJobError                 70  a fault of ours, or one that nobody foresaw
    ├── UsageError              64  the command line is wrong
    ├── DataError               65  a document or data set is broken; carries faults
    ├── MissingInputError       66  a model, data set or file is not there
    ├── ClusterError            69  the cluster cannot be reached, or does not allow it
    ├── OutputError             73  the output cannot be created or written
    │   └── StorageFullError    74  the output's storage is full
    ├── CheckpointError         75  a checkpoint cannot be read or written
    ├── CoordinatorLostError    75  the coordinator went away while the job ran
    ├── GangError               75  the launchers of the job did not come together
    ├── OutputBusyError         75  another job holds the output
    ├── RankLostError           75  another process of the run is gone; it knows why
    ├── TooLongError            75  what was waited for did not come in time
    ├── UnreadableError         75  a file cannot be read at this moment
    ├── ConfigError             78  the configuration asks for what cannot be done
    │   ├── ManifestError       78  a manifest is broken; carries faults
    │   ├── MismatchError       78  the checkpoints belong to another run
    │   └── RefusedError        78  the API server refuses a job, or a change of it
    └── Stopped                143  a clean stop, after saving; not a failure

The numbers are exit codes (sysexits.h where one fits). A message says what is wrong, where, and
what to do about it; a person sees the message and never a traceback.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

# A restart cannot help these: the same input gives the same fault.
NEVER_RETRIED = frozenset({64, 65, 66, 78})

# How many faults a message shows before it only counts them.
SHOWN_FAULTS = 20


class CPTJobError(Exception):
    """Root of the tree. `exit_code` is what a process that dies of it returns."""

    exit_code: ClassVar[int] = 70


class UsageError(CPTJobError):
    """A command or an environment variable that makes no sense."""

    exit_code = 64


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a file. `line` counts from 1; 0 means the file as a whole."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line > 0 else self.file
        return f"{place}: {self.message}"


class FaultyError(CPTJobError):
    """Broken contents. Give it a message, or faults, or both (the message comes first)."""

    def __init__(self, message: str = "", faults: Iterable[Fault] = (), *, more: int = 0) -> None:
        """`more` counts faults that were found but not kept."""
        self.message = message
        self.faults = list(faults)
        self.more = more
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message] if self.message else []
        lines += [str(fault) for fault in self.faults[:SHOWN_FAULTS]]
        hidden = len(self.faults[SHOWN_FAULTS:]) + self.more
        if hidden:
            lines.append(f"... and {hidden} more")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.message, self.faults, self.more)


def _restore(kind: type[FaultyError], message: str, faults: list[Fault], more: int) -> FaultyError:
    """Faults must survive the trip from a worker process, which pickles exceptions."""
    return kind(message, faults, more=more)


class DataError(FaultyError):
    """A data set, document or model file with broken contents."""

    exit_code = 65


class MissingInputError(CPTJobError):
    """An input that is named but not there."""

    exit_code = 66


class ClusterError(CPTJobError):
    """The cluster cannot be reached, or does not allow what is asked."""

    exit_code = 69


class OutputError(CPTJobError):
    """The output cannot be created or written."""

    exit_code = 73


class StorageFullError(OutputError):
    """No space is left where the output goes."""

    exit_code = 74


class CheckpointError(CPTJobError):
    """A checkpoint that cannot be read or written as it should."""

    exit_code = 75


class OutputBusyError(CPTJobError):
    """Another live job holds the output."""

    exit_code = 75


class CoordinatorLostError(CPTJobError):
    """The coordinator, and the store it hosts, went away while the job ran."""

    exit_code = 75


class GangError(CPTJobError):
    """The launchers of the job did not come together."""

    exit_code = 75


class RankLostError(CPTJobError):
    """Another process of the run is gone. Why, that one says, or the signal that ended it."""

    exit_code = 75


class TooLongError(CPTJobError):
    """What was waited for has not come in the given time."""

    exit_code = 75


class UnreadableError(CPTJobError):
    """A file that cannot be read at this moment, which does not make its contents broken."""

    exit_code = 75


class ConfigError(CPTJobError):
    """A configuration that is well formed and asks for what cannot be done."""

    exit_code = 78


class ManifestError(FaultyError, ConfigError):
    """A manifest with faults, each with its line."""

    exit_code = 78


class MismatchError(ConfigError):
    """The output holds checkpoints of another model, other data or other settings."""

    exit_code = 78


class RefusedError(ConfigError):
    """The API server refuses a job, or a change of it; the message says why."""

    exit_code = 78


class Stopped(CPTJobError):
    """A clean stop after saving. The message says how to continue."""

    exit_code = 143
