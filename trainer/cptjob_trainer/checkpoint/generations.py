"""Who may continue a run: numbered claims, each made once, each saying what it continues.

A process that takes over a run claims the next generation by creating `generation-<g>.json`, which
only one can do. Its claim records the checkpoint that it continues. From then on a checkpoint that
an older generation publishes *beyond* that step is void: the run has gone on without it, on another
path.

A claim binds checkpoints of its own lineage only (model, data, seed, ...). Data of another lineage,
left by `onMismatch: StartNew`, are neither made void nor revived by it.
"""

import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cptjob_trainer import failpoints
from cptjob_trainer.disk import create
from cptjob_trainer.errors import CheckpointError, OutputBusyError

_CLAIM = re.compile(r"generation-(\d+)\.json")


@dataclass(frozen=True)
class Claim:
    """One generation of a run. `step` is the step it continues, -1 when it began anew."""

    generation: int
    uid: str
    lineage: str
    step: int
    continues: str | None
    host: str
    pid: int
    time: str


def claims(directory: Path) -> list[Claim]:
    """All claims in `directory`, oldest first. An unreadable one is an error: no guessing."""
    found = [_read(path) for path in directory.iterdir() if _CLAIM.fullmatch(path.name)]
    return sorted(found, key=lambda claim: claim.generation)


def newest(directory: Path) -> int:
    """The newest generation, 0 when none was claimed. Reads names only: cheap before each save."""
    matches = (_CLAIM.fullmatch(name) for name in os.listdir(directory))
    return max((int(match[1]) for match in matches if match), default=0)


def claim(
    directory: Path, generation: int, uid: str, lineage: str, step: int, continues: str | None
) -> Claim:
    """Claim `generation`; raises OutputBusyError when another process did so first."""
    mine = Claim(
        generation=generation,
        uid=uid,
        lineage=lineage,
        step=step,
        continues=continues,
        host=socket.gethostname(),
        pid=os.getpid(),
        time=now(),
    )
    failpoints.hit("checkpoint.claim")
    path = directory / f"generation-{generation}.json"
    try:
        create(path, json.dumps(asdict(mine), indent=1).encode() + b"\n")
    except FileExistsError:
        raise OutputBusyError(
            f"another process has just taken over this run ({path}); "
            "only one may continue it: wait for it or stop it, then start again"
        ) from None
    failpoints.hit("checkpoint.claimed")
    return mine


def limit(all_claims: list[Claim], generation: int, lineage: str) -> int | None:
    """The last step to which checkpoints of `generation` count; None when no claim limits them."""
    later = [c.step for c in all_claims if c.generation > generation and c.lineage == lineage]
    return min(later, default=None)


def now() -> str:
    """The time in UTC as ISO text, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> Claim:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
        read = Claim(**value)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; it tells which checkpoints count. "
            "Restore it, or give another output"
        ) from error
    return read
