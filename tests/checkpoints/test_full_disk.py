"""A full volume stops a save, and costs no earlier checkpoint.

The volume is a real one of a few hundred kilobytes where the machine lets a test mount one, in a
namespace of its own; where it does not, the kernel's limit on file sizes stops the same writes.
"""

import ctypes
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cptjob_trainer import failpoints
from cptjob_trainer.errors import StorageFullError

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
VOLUME_BYTES = 400 << 10


def mounted(path: Path) -> bool:
    """Mount a small tmpfs on `path`, for this process only; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)) != 0:
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    path.mkdir()
    options = f"size={VOLUME_BYTES}".encode()
    return bool(libc.mount(b"none", bytes(path), b"tmpfs", 0, options) == 0)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (VOLUME_BYTES // 2, VOLUME_BYTES // 2))


def large() -> dict[str, torch.Tensor]:
    return {f"large{n}": torch.ones(VOLUME_BYTES // 4 // 3) for n in range(4)}


def on_a_small_volume(lab: Any, act: Callable[[], Any]) -> Any:
    """Run `act` in a process whose checkpoint folder is on a small volume."""

    def inside() -> Any:
        if not mounted(lab.directory):
            lab.directory.mkdir(exist_ok=True)
            limit_files()
        return act()

    outcome = lab.alone(inside)
    assert outcome.error is None, outcome
    return outcome.value


def save_too_much(lab: Any) -> dict[str, Any]:
    """Two checkpoints that fit, one that does not; what was said and what is left."""
    checkpoints = lab.make()
    checkpoints.open()
    for step in (1, 2):
        checkpoints.save(step, lab.values(step), {"step": step})
    with pytest.raises(StorageFullError) as caught:
        checkpoints.save(3, large(), {"step": 3})
    left = lab.names()
    # The run lives on: what fits can still be saved, at the same step too.
    checkpoints.save(3, lab.values(3), {"step": 3})
    return {"said": str(caught.value), "left": left, "resumed": lab.make().open().step}


def check(result: dict[str, Any]) -> None:
    assert result["left"] == ["step-1.1", "step-2.1"]
    assert result["resumed"] == 3
    for told in (
        "no room to save step-3.1",
        "are free on the volume",
        "546.1 KB are needed",
        "lower checkpoint.keepLast",
        "the newest is step-2.1",
    ):
        assert told in result["said"]


def test_a_first_checkpoint_that_does_not_fit_is_not_told_to_keep_fewer(lab: Any) -> None:
    def act() -> str:
        checkpoints = lab.make()
        checkpoints.open()
        free = shutil.disk_usage
        shutil.disk_usage = lambda path: free(path)._replace(free=1000)  # type: ignore[assignment]
        with pytest.raises(StorageFullError) as caught:
            checkpoints.save(3, large(), {"step": 3})
        return str(caught.value)

    said = on_a_small_volume(lab, act)
    assert "needed; delete what is not needed, or put the output on another volume" in said
    assert "keepLast" not in said


def test_a_checkpoint_that_does_not_fit_is_not_begun(lab: Any) -> None:
    def act() -> Any:
        written = []
        failpoints.hit = written.append
        free = shutil.disk_usage
        # Where no small volume could be had, one is imagined here; the other tests need none.
        if free(lab.directory).free > VOLUME_BYTES:
            shutil.disk_usage = lambda path: free(path)._replace(free=VOLUME_BYTES)  # type: ignore[assignment]
        result = save_too_much(lab)
        return {**result, "writes": written.count("checkpoint.write")}

    result = on_a_small_volume(lab, act)
    check(result)
    assert result["writes"] == 3 * len(lab.values(1))


def test_a_volume_that_fills_up_in_a_save_leaves_no_half_checkpoint(lab: Any) -> None:
    def act() -> Any:
        # The room is there when it is asked for, and gone when it is used.
        free = shutil.disk_usage("/")
        shutil.disk_usage = lambda path: free  # type: ignore[assignment]
        return save_too_much(lab)

    check(on_a_small_volume(lab, act))


def test_a_file_size_limit_is_told_like_a_full_volume(lab: Any) -> None:
    def act() -> Any:
        limit_files()
        return save_too_much(lab)

    outcome = lab.alone(act)
    assert outcome.error is None, outcome
    check(outcome.value)


def test_no_room_for_the_manifest_leaves_no_half_checkpoint(lab: Any) -> None:
    def act() -> list[str]:
        checkpoints = lab.make()
        checkpoints.open()
        checkpoints.save(1, lab.values(1), {"step": 1})

        def fill(name: str) -> None:
            if name == "checkpoint.before_publish":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

        failpoints.hit = fill
        with pytest.raises(StorageFullError, match=r"no room to save step-2\.1"):
            checkpoints.save(2, lab.values(2), {"step": 2})
        names: list[str] = lab.names()
        return names

    outcome = lab.alone(act)
    assert outcome.value == ["step-1.1"], outcome
