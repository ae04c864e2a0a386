"""Checkpoints of a run: saved whole or not at all, verified before use, kept as the job asks.

What lies in their folder, and which of it counts: checkpoint_folder.py.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from cptjob_trainer import failpoints
from cptjob_trainer.checkpoint import checkpoint_folder, dcp, generations
from cptjob_trainer.checkpoint.checkpoint_folder import Scan, Stored, lineage_digest, mismatch, scan
from cptjob_trainer.checkpoint.checkpoint_manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    faults,
    read_manifest,
    seal,
    size_of,
    software,
)
from cptjob_trainer.checkpoint.lineage import refused
from cptjob_trainer.disk import amount, create, is_full, sync_directory
from cptjob_trainer.errors import (
    CheckpointError,
    ConfigError,
    OutputBusyError,
    OutputError,
    StorageFullError,
)
from cptjob_trainer.ranks import Ranks

MOST_KEPT: Final = 5000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """The checkpoint to go on from, with what `save` was given."""

    step: int
    path: Path
    loop_state: dict[str, Any]
    bytes: int


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint. `bytes` counts its files; `seconds` is how long training waited."""

    step: int
    path: Path
    seconds: float
    bytes: int


class Checkpoints:
    """The checkpoints of one run in `directory`, seen from one rank.

    Making it, and `open`, `load` and `save`, are collective: all ranks call them in the same order.
    When one rank fails, all raise the same error.

    `lineage` holds what must match to continue (model, data, seed, ...), as JSON values, and `inputs`
    a person's words for those of it that are fingerprints. With
    `on_mismatch` "Refuse" another lineage is a MismatchError. With "StartNew" the run begins anew;
    what is there stays until the first new checkpoint is complete, and is deleted then, also when
    `keep_last` is None, which otherwise keeps all, up to 5000.
    """

    def __init__(
        self,
        directory: Path,
        *,
        uid: str,
        lineage: dict[str, Any],
        keep_last: int | None,
        on_mismatch: str,
        inputs: Mapping[str, str] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if keep_last is not None and not 1 <= keep_last <= MOST_KEPT:
            raise ConfigError(
                f"checkpoint.keepLast is {keep_last}; "
                f"give 1 to {MOST_KEPT}, or leave it out to keep all"
            )
        if on_mismatch not in ("Refuse", "StartNew"):
            raise ConfigError(f"checkpoint.onMismatch is {on_mismatch!r}; give Refuse or StartNew")
        self.directory = directory
        self.warnings: list[str] = []
        self._uid = uid
        self._lineage: dict[str, Any] = json.loads(json.dumps(lineage))
        self._inputs = dict(inputs or {})
        self._keep_last = keep_last
        self._on_mismatch = on_mismatch
        self.ranks = Ranks(rank, world)
        self._generation = 0
        self._latest: Saved | None = None
        self._skipped: list[Path] = []
        self._known: dict[Path, Stored] = {}

    # -- opening -----------------------------------------------------------------------------------

    def open(self) -> Resume | None:
        """Take over the run and find where to go on; None to begin at step 0.

        Reads and digests the newest checkpoint, and older ones while it is broken. `warnings` then
        tells what was skipped and why. Raises MismatchError for another lineage, OutputBusyError
        when another process takes over at this moment, OutputError when the folder cannot be used.
        """
        self.warnings, self._skipped = [], []
        found = self.ranks.once(self._survey)
        self.warnings.extend(found["warnings"])
        candidates = [Path(path) for path in found["candidates"]]
        chosen = self._first_good(candidates)
        self._generation = self.ranks.once(lambda: self._claim(chosen, found["generation"]))
        self.warnings.extend(self.ranks.once(self._clean))
        unusable = bool(self._skipped or found["broken"])
        if chosen is not None:
            self._latest = Saved(chosen.step, chosen.path, 0.0, chosen.bytes)
            if not unusable:
                # A death after the last save may have left more than is wanted, and no save follows.
                self.ranks.once(self.retain)
        elif unusable:
            self.warnings.append("no checkpoint can be used: training begins at step 0")
        return chosen

    def _survey(self) -> dict[str, Any]:
        """Rank 0: what is there, newest first, by manifests alone."""
        with _usable(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            generation = checkpoint_folder.newest_generation(self.directory)
            found = scan(self.directory, self._known)
        warned = [_skipped(path, reason) for path, reason in found.broken]
        mine = found.of(self._lineage)
        if (theirs := found.taken_over(self._lineage)) is not None:
            warned.append(self._told_of(theirs, found))
            mine = []
        return {
            "candidates": [str(stored.path) for stored in mine],
            "generation": generation,
            "broken": len(found.broken),
            "warnings": warned,
        }

    def _told_of(self, theirs: Stored, found: Scan) -> str:
        """What happens as the folder is another run's; a MismatchError when nothing may."""
        if self._on_mismatch == "Refuse":
            raise refused(theirs, self._lineage, self._inputs)
        differs = mismatch(theirs, self._lineage, self._inputs)
        return (
            f"{differs}. As checkpoint.onMismatch is StartNew, training begins anew; "
            f"{len(found.others(self._lineage))} older checkpoint(s) are deleted once the first "
            "new one is complete"
        )

    def _first_good(self, candidates: list[Path]) -> Resume | None:
        for path in candidates:
            manifest = self.ranks.once(partial(read_manifest, path))
            wrong = self._verify(path, manifest)
            if not wrong:
                return _resume(path, manifest)
            self._skipped.append(path)
            self.warnings.append(_skipped(path, "; ".join(wrong)))
        return None

    def _verify(self, path: Path, manifest: dict[str, Any]) -> list[str]:
        """What is wrong with a checkpoint's files; each rank looks at its share of them."""
        names = sorted(manifest["files"])[self.ranks.rank :: self.ranks.world]
        reports = self.ranks.each(lambda: faults(path, manifest, names))
        return [fault for report in reports for fault in report]

    def _claim(self, chosen: Resume | None, newest: int) -> int:
        with _usable(self.directory):
            return generations.claim(
                self.directory,
                newest + 1,
                self._uid,
                lineage_digest(self._lineage),
                chosen.step if chosen else -1,
                chosen.path.name if chosen else None,
            ).generation

    def _clean(self) -> list[str]:
        """Rank 0, as the owner: remove what earlier generations left half-written."""
        failpoints.hit("checkpoint.clean")
        removed = checkpoint_folder.remove_incomplete(self.directory, self._generation)
        return [
            f"removed {path}: it has no {MANIFEST}, so it was never complete" for path in removed
        ]

    # -- loading -----------------------------------------------------------------------------------

    def load(self, resume: Resume, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill `tensors` (Tensor or DTensor, on any device, at any world size) in place.

        Raises CheckpointError when names, shapes or dtypes are not those of the checkpoint.
        """
        failpoints.hit("checkpoint.load")
        state = dict(tensors)
        manifest: dict[str, Any] = self.ranks.once(lambda: read_manifest(resume.path))
        self.ranks.each(lambda: dcp.check_fit(resume.path, manifest["tensors"], state))
        self.ranks.each(lambda: dcp.read(resume.path, manifest, state))

    # -- saving ------------------------------------------------------------------------------------

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], loop_state: dict[str, Any]
    ) -> Saved:
        """Save `tensors` and `loop_state` (JSON) as the checkpoint of `step`; complete and durable
        on return.

        A step that is saved already, or that this run began from, is not written again. Raises
        StorageFullError (nothing half-written stays, older checkpoints are untouched),
        OutputBusyError when another process has taken over the run, CheckpointError, OutputError.
        """
        began = time.monotonic()
        if self._latest is not None and self._latest.step == step:
            return self._latest
        staged = self.stage(tensors)
        path = self.directory / f"step-{step}.{self._generation}"
        index = self.write(path, staged)
        size = self.publish(path, step, index, loop_state)
        self._latest = Saved(step, path, time.monotonic() - began, size)
        self.ranks.once(self.retain)
        return self._latest

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's share of `tensors`. Saving while training waits needs no copy of it."""
        failpoints.hit("checkpoint.stage")
        self.ranks.each(lambda: dcp.check_savable(tensors))
        return dcp.share(tensors, self.ranks.rank, self.ranks.world)

    def write(self, path: Path, staged: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write every rank's share into `path`; the index of what was written."""
        needed = sum(self.ranks.gather(dcp.local_bytes(staged)))
        self.ranks.once(lambda: self._make_room(path, needed))
        reports = self.ranks.gather(dcp.write(path, staged, self.ranks.rank))
        self.ranks.once(lambda: self._check_written(path, needed, reports))
        failpoints.hit("checkpoint.written")
        return dcp.join(report["index"] for report in reports)

    def publish(
        self, path: Path, step: int, index: dict[str, Any], loop_state: dict[str, Any]
    ) -> int:
        """Make what was written in `path` the checkpoint of `step`; its size in bytes."""
        size: int = self.ranks.once(lambda: self._publish(path, step, index, loop_state))
        return size

    def retain(self) -> None:
        """Rank 0, after a checkpoint is complete: delete what is no longer wanted, oldest first."""
        self._check_owner()
        found = scan(self.directory, self._known)
        if self._keep_last is None and len(found.of(self._lineage)) > MOST_KEPT:
            _log.warning("%d checkpoints are the most: the oldest is deleted", MOST_KEPT)
        keep = self._keep_last or MOST_KEPT
        for path in found.unwanted(self._lineage, keep, self._skipped):
            failpoints.hit("checkpoint.retention")
            checkpoint_folder.remove(path)
        failpoints.hit("checkpoint.retained")

    def _make_room(self, path: Path, needed: int) -> None:
        """Rank 0, before writing: a new directory on a volume with room for it."""
        if self._generation == 0:
            raise CheckpointError("save was called before open")
        self._check_owner()
        if path.exists():  # from an earlier try at this step
            checkpoint_folder.remove(path)
        if shutil.disk_usage(self.directory).free < needed:
            raise self._failure(path, needed, full=True)
        with _usable(self.directory):
            path.mkdir()

    def _check_written(self, path: Path, needed: int, reports: list[dict[str, Any]]) -> None:
        """Rank 0, after writing: all ranks succeeded, and what they wrote can be seen from here."""
        failed = [(rank, report) for rank, report in enumerate(reports) if "fault" in report]
        if failed:
            rank, report = failed[0]
            full = any(other["full"] for _, other in failed)
            shutil.rmtree(path, ignore_errors=True)
            raise self._failure(path, needed, full, f"rank {rank}: {report['fault']}")
        for report in reports:
            for name, file in report["index"]["files"].items():
                if not (path / name).exists() or (path / name).stat().st_size != file["bytes"]:
                    raise self._failure(
                        path, needed, False, f"{name} cannot be seen by rank 0; is it one volume?"
                    )

    def _check_owner(self) -> None:
        newest = generations.newest(self.directory)
        if newest != self._generation:
            raise OutputBusyError(
                f"another process has taken over this run in {self.directory} "
                f"(generation {newest}, this one is {self._generation}); this one stops"
            )

    def _publish(
        self, path: Path, step: int, index: dict[str, Any], loop_state: dict[str, Any]
    ) -> int:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "generation": self._generation,
            "uid": self._uid,
            "time": generations.now(),
            "world": self.ranks.world,
            "software": software(),
            "lineage": self._lineage,
            "inputs": self._inputs,
            "loop_state": loop_state,
            **index,
        }
        self._check_owner()
        failpoints.hit("checkpoint.before_publish")
        try:
            create(path / MANIFEST, seal(manifest))
            sync_directory(self.directory)
        except OSError as error:
            if (path / MANIFEST).exists():
                raise OutputError(f"cannot make {path} durable: {error.strerror}") from error
            shutil.rmtree(path, ignore_errors=True)
            raise self._failure(path, size_of(manifest), is_full(error), str(error)) from error
        failpoints.hit("checkpoint.after_publish")
        return size_of(manifest)

    def _failure(self, path: Path, needed: int, full: bool, reason: str = "") -> OutputError:
        """What a person can do about a checkpoint that could not be saved."""
        kept = (
            f"earlier checkpoints are untouched, the newest is {self._latest.path.name}"
            if self._latest
            else "there is no earlier checkpoint"
        )
        if not full:
            return OutputError(f"cannot save {path}: {reason}; {kept}")
        free = shutil.disk_usage(self.directory).free
        older = ", beside the older checkpoints; lower checkpoint.keepLast, "
        beside = older if self._latest else "; "
        return StorageFullError(
            f"no room to save {path.name}: {amount(free)} are free on the volume of "
            f"{self.directory} and {amount(needed)} are needed{beside}delete what is not needed, or "
            f"put the output on another volume; {kept}"
        )


def _skipped(path: Path, reason: str) -> str:
    return (
        f"skipped the checkpoint {path}: {reason}; an older one is tried, and this one is deleted "
        "after the next save"
    )


def _resume(path: Path, manifest: dict[str, Any]) -> Resume:
    return Resume(
        step=manifest["step"],
        path=path,
        loop_state=manifest["loop_state"],
        bytes=size_of(manifest),
    )


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageFullError(
                f"no room in {directory}: {error.strerror}; "
                "delete what is not needed, or put the output on another volume"
            ) from error
        raise OutputError(
            f"cannot write {directory}: {error.strerror}; choose another output or its permissions"
        ) from error
