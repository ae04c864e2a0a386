"""Named points where a test kills the process, so that a crash can be placed exactly.

    CPTJOB_FAILPOINT="checkpoint.before_publish:2"   the second time it is passed, in any rank
    CPTJOB_FAILPOINT="checkpoint.write:7:1"          the seventh time, in rank 1 only

The process is ended with SIGKILL: no handler runs, nothing is flushed, as when a machine is lost.
A worker that torch elastic has started again (`TORCHELASTIC_RESTART_COUNT` above 0) is left alone,
or it would die at the same point for ever.
"""

import os
import signal
from typing import Final

from cptjob_trainer.errors import UsageError

VARIABLE: Final = "CPTJOB_FAILPOINT"

NAMES: Final = frozenset(
    {
        # prepare
        "prepare.validate",
        "prepare.tokenize",
        "prepare.publish",
        # the training loop
        "train.start",
        "train.step",
        "train.evaluate",
        # checkpoints, in the order in which a run passes them
        "checkpoint.claim",
        "checkpoint.claimed",
        "checkpoint.clean",
        "checkpoint.load",
        "checkpoint.stage",
        "checkpoint.write",
        "checkpoint.written",
        "checkpoint.before_publish",
        "checkpoint.after_publish",
        "checkpoint.retention",
        "checkpoint.retained",
        # output
        "output.model",
        "output.model_swap",
        "output.adapter",
        "output.report",
        "output.manifest",
    }
)

_hits: dict[str, int] = {}


def hit(name: str) -> None:
    """Pass the point `name`; the process ends here when the environment asks for it."""
    if name not in NAMES:
        raise ValueError(f"failpoint {name!r} is not in failpoints.NAMES")
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, count, rank = _parse(wanted)
    if point != name:
        return
    _hits[name] = _hits.get(name, 0) + 1
    if _hits[name] == count and _here(rank):
        os.kill(os.getpid(), signal.SIGKILL)


def _parse(text: str) -> tuple[str, int, int | None]:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts[1:]):
        raise UsageError(f'{VARIABLE}={text!r} is not "name:count" or "name:count:rank"')
    if parts[0] not in NAMES:
        raise UsageError(
            f"{VARIABLE}={text!r} names no failpoint; known: {', '.join(sorted(NAMES))}"
        )
    return parts[0], int(parts[1]), int(parts[2]) if len(parts) == 3 else None


def _here(rank: int | None) -> bool:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return False
    return rank is None or rank == int(os.environ.get("RANK", "0"))
