"""What a folder of checkpoints holds, and what follows from it: which one is continued, which are
deleted.

    checkpoints/
      generation-<g>.json             who took over the run, from which step (generations.py)
      step-<N>.<g>/rank-*.safetensors what each rank holds (dcp_storage.py)
      step-<N>.<g>/manifest.json      says that it is complete (checkpoint_manifest.py)
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cptjob_trainer.checkpoint import generations
from cptjob_trainer.checkpoint.checkpoint_manifest import MANIFEST, is_complete, read_manifest
from cptjob_trainer.disk import sync_directory
from cptjob_trainer.errors import CheckpointError

_DIRECTORY: Final = re.compile(r"step-(\d+)\.(\d+)")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A checkpoint directory whose manifest is whole; its files are unread. `inputs` is what a
    person calls those values of the lineage that are fingerprints.
    """

    path: Path
    step: int
    generation: int
    lineage: dict[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        """Of two checkpoints the newer has the greater one."""
        return self.step, self.generation


@dataclass(frozen=True)
class Scan:
    """What a folder holds: checkpoints that count, those made void by a claim, and the broken."""

    counted: list[Stored]
    void: list[Stored]
    broken: list[tuple[Path, str]]

    def of(self, lineage: dict[str, Any]) -> list[Stored]:
        """The checkpoints of one run that count, newest first."""
        mine = [stored for stored in self.counted if stored.lineage == lineage]
        return sorted(mine, key=lambda stored: stored.order, reverse=True)

    def others(self, lineage: dict[str, Any]) -> list[Stored]:
        """The checkpoints of other runs that count."""
        return [stored for stored in self.counted if stored.lineage != lineage]

    def last_written(self) -> Stored | None:
        """Of the checkpoints that count the one that was written last."""
        return max(self.counted, key=lambda stored: (stored.generation, stored.step), default=None)

    def taken_over(self, lineage: dict[str, Any]) -> Stored | None:
        """The newest checkpoint of another run, when one wrote here after the run of `lineage`."""
        others = self.others(lineage)
        if _last_written(others) <= _last_written(self.of(lineage)):
            return None
        return max(others, key=lambda stored: stored.order)

    def unwanted(
        self, lineage: dict[str, Any], keep: int, unusable: Collection[Path] = ()
    ) -> list[Path]:
        """All but the newest `keep` of the run, oldest first, then the broken; `unusable` ones
        count for nothing.
        """
        mine = [stored.path for stored in self.of(lineage) if stored.path not in unusable]
        kept = set(mine[:keep])
        complete = sorted(self.counted + self.void, key=lambda stored: stored.order)
        paths = [stored.path for stored in complete] + [path for path, _ in self.broken]
        return [path for path in paths if path not in kept]


def _last_written(stored: list[Stored]) -> tuple[int, int]:
    return max(((each.generation, each.step) for each in stored), default=(-1, -1))


_PEAK: Final = "training.learningRate"
_FLOOR: Final = "training.schedule.minLearningRate"


def mismatch(stored: Stored, lineage: dict[str, Any], named: Mapping[str, str]) -> str:
    """One sentence naming each value that differs between a checkpoint and the run.

    `named` has a person's words for the run's values that say nothing to a person.
    """
    absent = object()
    theirs, ours = dict(_leaves(stored.lineage)), dict(_leaves(lineage))
    every = sorted(theirs.keys() | ours.keys())
    keys = [key for key in every if theirs.get(key, absent) != ours.get(key, absent)]
    if _PEAK in keys and _FLOOR in keys and _ratio(theirs) == _ratio(ours):
        keys.remove(_FLOOR)  # it only follows the peak
    told = (
        _named(key, stored.inputs[key], named[key])
        if key in named and key in stored.inputs
        else _valued(key, theirs, ours, named.get(key))
        for key in keys
    )
    return f"the checkpoint {stored.path} belongs to another run: {'; '.join(told)}"


def _ratio(lineage: Mapping[str, Any]) -> float | None:
    peak, floor = lineage.get(_PEAK), lineage.get(_FLOOR)
    return round(floor / peak, 9) if peak and floor is not None else None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects, by dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _named(key: str, theirs: str, ours: str) -> str:
    if theirs == ours:
        return f"{key} is {ours} in both, and what that holds, or how it is used, has changed"
    return f"{key} is {theirs} in the checkpoint and {ours} in this job"


def _valued(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str | None) -> str:
    told = [json.dumps(values[key]) if key in values else "absent" for values in (theirs, ours)]
    words = "" if name is None else f" ({name})"
    return f"{key} is {told[0]} in the checkpoint and {told[1]} in this job{words}"


def lineage_digest(lineage: dict[str, Any]) -> str:
    """A short name for a lineage, for claims."""
    text = json.dumps(lineage, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# -- on the disk -----------------------------------------------------------------------------------


def scan(directory: Path, known: dict[Path, Stored] | None = None) -> Scan:
    """Sort the checkpoints of `directory`, by manifests and claims alone.

    Manifests never change, so those in `known` are not read again; new ones are put there. Raises
    CheckpointError for an unreadable claim, ConfigError for a manifest of a newer program,
    OutputError for one that cannot be read at this moment.
    """
    known = {} if known is None else known
    found = Scan([], [], [])
    claimed = generations.claims(directory)
    for path in sorted(directory.iterdir()):
        if not _DIRECTORY.fullmatch(path.name) or not is_complete(path):
            continue
        try:
            stored = known[path] = known.get(path) or read_stored(path)
        except CheckpointError as error:
            found.broken.append((path, str(error)))
            continue
        last = generations.limit(claimed, stored.generation, lineage_digest(stored.lineage))
        (found.counted if last is None or stored.step <= last else found.void).append(stored)
    return found


def read_stored(path: Path) -> Stored:
    """The checkpoint in a directory of its own. Raises CheckpointError."""
    manifest = read_manifest(path)
    return Stored(
        path,
        manifest["step"],
        manifest["generation"],
        manifest["lineage"],
        manifest.get("inputs", {}),
    )


def newest_generation(directory: Path) -> int:
    """The newest generation that claimed the run or wrote a checkpoint; 0 when none did."""
    matches = (_DIRECTORY.fullmatch(path.name) for path in directory.iterdir())
    return max([generations.newest(directory), *(int(match[2]) for match in matches if match)])


def remove_incomplete(directory: Path, generation: int) -> list[Path]:
    """Remove what generations before `generation` left half-written; the checkpoints among it."""
    removed = []
    for path in sorted(directory.iterdir()):
        match = _DIRECTORY.fullmatch(path.name)
        if match and int(match[2]) < generation and not is_complete(path):
            remove(path)
            removed.append(path)
        elif path.name.startswith(".generation-"):
            path.unlink(missing_ok=True)
    return removed


def remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first: what a crash leaves of it does not count."""
    try:
        (path / MANIFEST).unlink(missing_ok=True)
        sync_directory(path)
        shutil.rmtree(path)
    except OSError as error:
        # What could not be deleted costs room, not the run.
        _log.warning("cannot delete %s: %s", path, error)
