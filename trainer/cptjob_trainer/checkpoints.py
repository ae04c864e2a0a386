"""Checkpoints of a run: saved whole or not at all, verified before use, kept as the job asks.

    checkpoints/
      generation-<g>.json             who took over the run, from which step (generations.py)
      step-<N>.<g>/rank-*.safetensors what each rank holds (dcp_storage.py)
      step-<N>.<g>/manifest.json      created last and once; without it the directory is nothing

A manifest holds the loop's state, the lineage, and size and digest of every file, under a digest of
its own.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from cptjob_trainer import failpoints, generations
from cptjob_trainer.dcp_storage import (
    DTYPES,
    SafetensorsReader,
    SafetensorsWriter,
    file_digest,
    is_full,
    join,
    local_bytes,
    share,
)
from cptjob_trainer.errors import (
    CheckpointError,
    ConfigError,
    OutputBusyError,
    OutputError,
    StorageFullError,
)
from cptjob_trainer.ranks import Ranks

MANIFEST: Final = "manifest.json"
MOST_KEPT: Final = 5000
_FORMAT: Final = "cptjob-checkpoint"
_VERSION: Final = 1
_DIRECTORY: Final = re.compile(r"step-(\d+)\.(\d+)")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """The checkpoint to go on from: what `save` was given, and `world`, how many ranks wrote it."""

    step: int
    path: Path
    loop_state: dict[str, Any]
    world: int
    software: dict[str, str]
    bytes: int


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint. `bytes` counts its files; `seconds` is how long training waited."""

    step: int
    path: Path
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Stored:
    """A checkpoint directory whose manifest is whole; its files are unread."""

    path: Path
    step: int
    generation: int
    lineage: dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """What a folder holds: checkpoints that count, those made void by a claim, and the broken."""

    counted: list[Stored]
    void: list[Stored]
    broken: list[tuple[Path, str]]


class Checkpoints:
    """The checkpoints of one run in `directory`, seen from one rank.

    Making it, and `open`, `load` and `save`, are collective: all ranks call them in the same order.
    When one rank fails, all raise the same error.

    `lineage` holds what must match to continue (model, data, seed, ...), as JSON values. With
    `on_mismatch` "Refuse" another lineage is a ConfigError. With "StartNew" the run begins anew;
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
        self._keep_last = keep_last
        self._on_mismatch = on_mismatch
        self._ranks = Ranks(rank, world)
        self._generation = 0
        self._latest: Saved | None = None
        self._skipped: list[Path] = []
        self._known: dict[Path, Stored] = {}

    # -- opening -----------------------------------------------------------------------------------

    def open(self) -> Resume | None:
        """Take over the run and find where to go on; None to begin at step 0.

        Reads and digests the newest checkpoint, and older ones while it is broken. `warnings` then
        tells what was skipped and why. Raises ConfigError for another lineage, OutputBusyError when
        another process takes over at this moment, OutputError when the folder cannot be used.
        """
        self.warnings, self._skipped = [], []
        found = self._ranks.once(self._survey)
        self.warnings.extend(found["warnings"])
        candidates = [Path(path) for path in found["candidates"]]
        chosen = self._first_good(candidates)
        self._generation = self._ranks.once(lambda: self._claim(chosen, found["generation"]))
        self.warnings.extend(self._ranks.once(self._clean))
        if chosen is not None:
            self._latest = Saved(chosen.step, chosen.path, 0.0, chosen.bytes)
        elif self._skipped or found["broken"]:
            self.warnings.append("no checkpoint can be used: training begins at step 0")
        return chosen

    def _survey(self) -> dict[str, Any]:
        """Rank 0: what is there, newest first, by manifests alone."""
        with _usable(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            generation = _newest_generation(self.directory)
            found = scan(self.directory, self._known)
        warned = [f"skipped {path}: {reason}" for path, reason in found.broken]
        mine = [stored for stored in found.counted if stored.lineage == self._lineage]
        others = [stored for stored in found.counted if stored.lineage != self._lineage]
        if _last_written(others) > _last_written(mine):
            differs = mismatch(max(others, key=_order), self._lineage)
            if self._on_mismatch == "Refuse":
                raise ConfigError(
                    f"{differs}. Restore the old value, give another output, or set "
                    "checkpoint.onMismatch: StartNew to begin anew"
                )
            warned.append(
                f"{differs}. As checkpoint.onMismatch is StartNew, training begins anew; "
                f"{len(others)} older checkpoint(s) are deleted once the first new one is complete"
            )
            mine = []
        candidates = [str(stored.path) for stored in sorted(mine, key=_order, reverse=True)]
        return {
            "candidates": candidates,
            "generation": generation,
            "broken": len(found.broken),
            "warnings": warned,
        }

    def _first_good(self, candidates: list[Path]) -> Resume | None:
        for path in candidates:
            manifest = self._ranks.once(partial(read_manifest, path))
            wrong = self._verify(path, manifest)
            if not wrong:
                return _resume(path, manifest)
            self._skipped.append(path)
            self.warnings.append(f"skipped {path}: {'; '.join(wrong)}")
        return None

    def _verify(self, path: Path, manifest: dict[str, Any]) -> list[str]:
        """What is wrong with a checkpoint's files; each rank looks at its share of them."""
        names = sorted(manifest["files"])[self._ranks.rank :: self._ranks.world]
        reports = self._ranks.each(lambda: faults(path, manifest, names))
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
        removed = []
        for path in sorted(self.directory.iterdir()):
            match = _DIRECTORY.fullmatch(path.name)
            if match and int(match[2]) < self._generation and not (path / MANIFEST).exists():
                _remove(path)
                removed.append(f"removed {path}: it has no {MANIFEST}, so it was never complete")
            elif path.name.startswith(".generation-"):
                path.unlink(missing_ok=True)
        return removed

    # -- loading -----------------------------------------------------------------------------------

    def load(self, resume: Resume, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill `tensors` (Tensor or DTensor, on any device, at any world size) in place.

        Raises CheckpointError when names, shapes or dtypes are not those of the checkpoint.
        """
        failpoints.hit("checkpoint.load")
        state = dict(tensors)
        manifest: dict[str, Any] = self._ranks.once(lambda: read_manifest(resume.path))
        self._ranks.each(lambda: _check_fit(resume.path, manifest["tensors"], state))
        self._ranks.each(lambda: _read(resume.path, manifest, state))

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
        self._ranks.once(self.retain)
        return self._latest

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's share of `tensors`. Saving while training waits needs no copy of it."""
        failpoints.hit("checkpoint.stage")
        self._ranks.each(lambda: _check_savable(tensors))
        return share(tensors, self._ranks.rank, self._ranks.world)

    def write(self, path: Path, staged: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write every rank's share into `path`; the index of what was written."""
        needed = sum(self._ranks.gather(local_bytes(staged)))
        self._ranks.once(lambda: self._make_room(path, needed))
        reports = self._ranks.gather(_write(path, staged, self._ranks.rank))
        self._ranks.once(lambda: self._check_written(path, needed, reports))
        failpoints.hit("checkpoint.written")
        return join(report["index"] for report in reports)

    def publish(
        self, path: Path, step: int, index: dict[str, Any], loop_state: dict[str, Any]
    ) -> int:
        """Make what was written in `path` the checkpoint of `step`; its size in bytes."""
        size: int = self._ranks.once(lambda: self._publish(path, step, index, loop_state))
        return size

    def retain(self) -> None:
        """Rank 0, after a checkpoint is complete: delete what is no longer wanted, oldest first."""
        self._check_owner()
        found = scan(self.directory, self._known)
        mine = [
            stored
            for stored in sorted(found.counted, key=_order, reverse=True)
            if stored.lineage == self._lineage and stored.path not in self._skipped
        ]
        keep = {stored.path for stored in mine[: self._keep_last or MOST_KEPT]}
        if self._keep_last is None and len(mine) > MOST_KEPT:
            _log.warning("%d checkpoints are the most: the oldest is deleted", MOST_KEPT)
        complete = sorted(found.counted + found.void, key=_order)
        for path in [stored.path for stored in complete] + [path for path, _ in found.broken]:
            if path not in keep:
                failpoints.hit("checkpoint.retention")
                _remove(path)
        failpoints.hit("checkpoint.retained")

    def latest(self) -> Saved | None:
        """The newest complete checkpoint that this process saved or began from."""
        return self._latest

    def _make_room(self, path: Path, needed: int) -> None:
        """Rank 0, before writing: a new directory on a volume with room for it."""
        if self._generation == 0:
            raise CheckpointError("save was called before open")
        self._check_owner()
        if path.exists():  # from an earlier try at this step
            _remove(path)
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
            "format": _FORMAT,
            "version": _VERSION,
            "step": step,
            "generation": self._generation,
            "uid": self._uid,
            "time": generations.now(),
            "world": self._ranks.world,
            "software": software(),
            "lineage": self._lineage,
            "loop_state": loop_state,
            **index,
        }
        self._check_owner()
        failpoints.hit("checkpoint.before_publish")
        try:
            generations.create(path / MANIFEST, seal(manifest))
            generations.sync_directory(self.directory)
        except OSError as error:
            if (path / MANIFEST).exists():
                raise OutputError(f"cannot make {path} durable: {error.strerror}") from error
            shutil.rmtree(path, ignore_errors=True)
            raise self._failure(path, _size(manifest), is_full(error), str(error)) from error
        failpoints.hit("checkpoint.after_publish")
        return _size(manifest)

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
        return StorageFullError(
            f"no room to save {path.name}: {amount(free)} are free on the volume of "
            f"{self.directory} and {amount(needed)} are needed, beside the older checkpoints; "
            "lower checkpoint.keepLast, delete what is not needed, or put the output on "
            f"another volume; {kept}"
        )


# -- what stands on disk ---------------------------------------------------------------------------


def scan(directory: Path, known: dict[Path, Stored] | None = None) -> Scan:
    """Sort the checkpoints of `directory`, by manifests and claims alone.

    Manifests never change, so those in `known` are not read again; new ones are put there. Raises
    CheckpointError for an unreadable claim, ConfigError for a manifest of a newer program.
    """
    known = {} if known is None else known
    found = Scan([], [], [])
    claimed = generations.claims(directory)
    for path in sorted(directory.iterdir()):
        if not _DIRECTORY.fullmatch(path.name) or not (path / MANIFEST).exists():
            continue
        try:
            stored = known[path] = known.get(path) or _stored(path)
        except CheckpointError as error:
            found.broken.append((path, str(error)))
            continue
        last = generations.limit(claimed, stored.generation, lineage_digest(stored.lineage))
        (found.counted if last is None or stored.step <= last else found.void).append(stored)
    return found


def _stored(path: Path) -> Stored:
    manifest = read_manifest(path)
    return Stored(path, manifest["step"], manifest["generation"], manifest["lineage"])


def _resume(path: Path, manifest: dict[str, Any]) -> Resume:
    return Resume(
        step=manifest["step"],
        path=path,
        loop_state=manifest["loop_state"],
        world=manifest["world"],
        software=manifest["software"],
        bytes=_size(manifest),
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of directory `path`, if whole; else a CheckpointError says what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{MANIFEST} is not that of a checkpoint")
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointError(f"{MANIFEST} does not have the digest that it states")
    if manifest["version"] != _VERSION:
        # Not skipped: going on without it would begin anew, and delete it in the end.
        raise ConfigError(
            f"{path / MANIFEST} has format version {manifest['version']}, this program reads "
            f"{_VERSION}; use the program that wrote it, or another output"
        )
    if path.name != f"step-{manifest['step']}.{manifest['generation']}":
        raise CheckpointError(
            f"{MANIFEST} is of step {manifest['step']}, generation {manifest['generation']}"
        )
    return manifest


def faults(path: Path, manifest: dict[str, Any], names: list[str] | None = None) -> list[str]:
    """What is wrong with files of a checkpoint: missing, other size or digest; [] when whole."""
    files = manifest["files"]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        reports = pool.map(
            lambda name: _fault(path / name, files[name]), files if names is None else names
        )
        return [report for report in reports if report]


def _fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, not {expected['bytes']}"
        if file_digest(path).sha256 != expected["sha256"]:
            return f"{path.name} does not have the digest that the manifest states"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def seal(manifest: dict[str, Any]) -> bytes:
    """`manifest` as JSON with its own digest in it, a line for each field, file and tensor."""
    fields = []
    for key, value in {**manifest, "digest": _digest(manifest)}.items():
        if key in ("files", "tensors"):
            rows = (f"  {json.dumps(name)}: {json.dumps(value[name])}" for name in value)
            fields.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            fields.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def _digest(manifest: dict[str, Any]) -> str:
    plain = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def lineage_digest(lineage: dict[str, Any]) -> str:
    """A short name for a lineage, for claims."""
    text = json.dumps(lineage, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def mismatch(stored: Stored, lineage: dict[str, Any]) -> str:
    """One sentence naming each value that differs between a checkpoint and the run."""
    absent = object()
    parts = []
    for key in sorted(stored.lineage.keys() | lineage.keys()):
        theirs, ours = stored.lineage.get(key, absent), lineage.get(key, absent)
        if theirs != ours:
            told = ["absent" if value is absent else json.dumps(value) for value in (theirs, ours)]
            parts.append(f"{key} is {told[0]} in the checkpoint and {told[1]} in this job")
    return f"the checkpoint {stored.path} belongs to another run: {'; '.join(parts)}"


def software() -> dict[str, str]:
    """Versions on which exact continuation depends."""
    packages = ("torch", "transformers", "peft", "safetensors", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _order(stored: Stored) -> tuple[int, int]:
    return stored.step, stored.generation


def _last_written(stored: list[Stored]) -> tuple[int, int]:
    return max(((s.generation, s.step) for s in stored), default=(-1, -1))


def _newest_generation(directory: Path) -> int:
    matches = (_DIRECTORY.fullmatch(path.name) for path in directory.iterdir())
    return max([generations.newest(directory), *(int(match[2]) for match in matches if match)])


def _size(manifest: dict[str, Any]) -> int:
    return sum(file["bytes"] for file in manifest["files"].values())


def _remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first: what a crash leaves of it does not count."""
    try:
        (path / MANIFEST).unlink(missing_ok=True)
        generations.sync_directory(path)
        shutil.rmtree(path)
    except OSError as error:
        # What could not be deleted costs room, not the run.
        _log.warning("cannot delete %s: %s", path, error)


def amount(count: float) -> str:
    """Bytes for people: 999 bytes, 1.5 MB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


# -- checks and translations
# --------------------------------------------------------------------------


def _check_savable(tensors: Mapping[str, Any]) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}, not a tensor; "
                "what is not a tensor belongs into the loop state"
            )
        if value.dtype not in DTYPES or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(
                f"{name} is a {value.layout} tensor of {value.dtype}, which cannot be saved"
            )
        if "@" in name:
            raise CheckpointError(
                f"the tensor name {name!r} contains '@', which marks pieces of tensors"
            )


def _check_fit(path: Path, saved: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """The names, shapes and dtypes that differ, in one error."""
    wrong = [f"{name} is missing" for name in sorted(tensors.keys() - saved.keys())]
    wrong += [f"{name} is not part of this run" for name in sorted(saved.keys() - tensors.keys())]
    for name in sorted(tensors.keys() & saved.keys()):
        theirs = f"{saved[name]['dtype']} {saved[name]['shape']}"
        ours = f"{DTYPES.get(tensors[name].dtype, tensors[name].dtype)} {list(tensors[name].shape)}"
        if theirs != ours:
            wrong.append(f"{name} is {theirs} there and {ours} in this run")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the checkpoint {path} does not fit: {'; '.join(wrong[:5])}{more}")


def _write(path: Path, staged: dict[str, torch.Tensor], rank: int) -> dict[str, Any]:
    """Write one rank's file; {"index"}, or {"fault", "full"} when that failed."""
    writer = SafetensorsWriter(path, rank)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        # Another machine may not see rank 0's new directory yet.
        path.mkdir(exist_ok=True)
        with _alone():
            dcp_save(staged, storage_writer=writer, planner=planner, no_dist=True)
    except Exception as error:
        return {"fault": str(error), "full": is_full(error)}
    return {"index": writer.index}


def _read(path: Path, manifest: dict[str, Any], state: dict[str, Any]) -> None:
    """Fill `state` from the files of a checkpoint."""
    reader = SafetensorsReader(path, manifest)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _alone(), torch.no_grad():
            dcp_load(state, storage_reader=reader, planner=planner, no_dist=True)
    except Exception as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """DCP in this process only: without its warning about that, and with its errors unwrapped."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        raise failure.failures[0][0] from failure


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
