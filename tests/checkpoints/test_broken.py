"""Broken checkpoints are named and passed over; the older one is used."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer.checkpoint.checkpoint_manifest import seal
from cptjob_trainer.disk import file_digest
from cptjob_trainer.errors import CheckpointError, ConfigError, OutputError

RANK_FILE = "rank-00000.safetensors"


def truncate(path: Path) -> None:
    file = path / RANK_FILE
    file.write_bytes(file.read_bytes()[:-5])


def lengthen(path: Path) -> None:
    with open(path / RANK_FILE, "ab") as file:
        file.write(b"x")


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / RANK_FILE).read_bytes())
    content[-9] ^= 4
    (path / RANK_FILE).write_bytes(content)


def lose_a_file(path: Path) -> None:
    (path / RANK_FILE).unlink()


def cut_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


def edit_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    value = json.loads(file.read_bytes())
    value["loop_state"]["step"] = 9
    file.write_text(json.dumps(value))


def write_a_foreign_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('["another program"]')


def rename(path: Path) -> None:
    path.rename(path.with_name("step-9.1"))


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "step-3.1: rank-00000.safetensors has 7.. bytes, not 7.."),
    (lengthen, "step-3.1: rank-00000.safetensors has 7.. bytes, not 7.."),
    (flip_a_bit, "step-3.1: rank-00000.safetensors does not have the digest"),
    (lose_a_file, "step-3.1: rank-00000.safetensors cannot be read: No such file"),
    (cut_the_manifest, "step-3.1: manifest.json is not JSON"),
    (empty_the_manifest, "step-3.1: manifest.json is not JSON"),
    (edit_the_manifest, "step-3.1: manifest.json does not have the digest that it states"),
    (write_a_foreign_manifest, "step-3.1: manifest.json is not that of a checkpoint"),
    (rename, "step-9.1: manifest.json is of step 3, generation 1"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_broken_checkpoint_is_named_and_the_older_one_used(
    lab: Any, damage: Callable[[Path], None], said: str
) -> None:
    lab.train(3)
    damage(lab.directory / "step-3.1")
    checkpoints = lab.make()
    resume = checkpoints.open()
    assert resume.step == 2
    assert len(checkpoints.warnings) == 1
    assert re.search(said, checkpoints.warnings[0])
    tensors = lab.empty()
    checkpoints.load(resume, tensors)
    assert lab.bits(tensors) == lab.bits(lab.values(2))


def test_the_broken_one_stays_until_a_newer_one_is_complete(lab: Any) -> None:
    lab.train(3)
    flip_a_bit(lab.directory / "step-3.1")
    checkpoints = lab.make()
    checkpoints.open()
    assert "step-3.1" in lab.names()
    checkpoints.save(3, lab.values(3), {"step": 3})
    assert lab.names() == ["step-1.1", "step-2.1", "step-3.2"]


@pytest.mark.parametrize("left", [[], [RANK_FILE]])
def test_a_directory_without_a_manifest_is_removed_and_named(lab: Any, left: list[str]) -> None:
    lab.train(2)
    half = lab.directory / "step-3.1"
    half.mkdir()
    for name in left:
        shutil.copy(lab.directory / "step-2.1" / name, half)
    checkpoints = lab.make()
    assert checkpoints.open().step == 2
    assert checkpoints.warnings == [
        f"removed {half}: it has no manifest.json, so it was never complete"
    ]
    assert lab.names() == ["step-1.1", "step-2.1"]


def test_several_broken_ones_are_passed_over_and_none_left_begins_anew_aloud(lab: Any) -> None:
    lab.train(3)
    for step in (3, 2):
        flip_a_bit(lab.directory / f"step-{step}.1")
    checkpoints = lab.make()
    assert checkpoints.open().step == 1
    assert [warning.split(":")[0] for warning in checkpoints.warnings] == [
        f"skipped the checkpoint {lab.directory / name}" for name in ("step-3.1", "step-2.1")
    ]
    truncate(lab.directory / "step-1.1")
    checkpoints = lab.make()
    assert checkpoints.open() is None
    assert checkpoints.warnings[-1] == "no checkpoint can be used: training begins at step 0"


def test_a_broken_newest_does_not_count_among_those_kept(lab: Any) -> None:
    lab.train(2)
    twin = lab.make()
    twin.open()
    twin._latest = None  # as if this generation had trained step 2 itself
    twin.save(2, lab.values(2), {"step": 2})
    flip_a_bit(lab.directory / "step-2.2")
    checkpoints = lab.make(keep_last=2)
    assert checkpoints.open().path.name == "step-2.1"
    checkpoints.save(3, lab.values(3), {"step": 3})
    assert lab.names() == ["step-2.1", "step-3.3"]


def lead_out(manifest: dict[str, Any]) -> None:
    manifest["files"]["../outside"] = {"bytes": 7, "sha256": ""}


def lead_up(manifest: dict[str, Any]) -> None:
    manifest["files"][".."] = {"bytes": 7, "sha256": ""}


def read_elsewhere(manifest: dict[str, Any]) -> None:
    next(iter(manifest["tensors"].values()))["chunks"][0]["file"] = "/etc/passwd"


def read_what_has_no_digest(manifest: dict[str, Any]) -> None:
    next(iter(manifest["tensors"].values()))["chunks"][0]["file"] = "rank-00009.safetensors"


def name_no_files(manifest: dict[str, Any]) -> None:
    del manifest["files"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lead_out, "names '../outside', which is no file of its directory"),
        (lead_up, "names '..', which is no file of its directory"),
        (read_elsewhere, "names '/etc/passwd', which is no file of its directory"),
        (read_what_has_no_digest, "lists no digest of rank-00009.safetensors"),
        (name_no_files, "lacks an entry"),
    ],
)
def test_a_manifest_that_leads_elsewhere_is_broken_whatever_its_digest(
    lab: Any, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    lab.train(2)
    file = lab.directory / "step-2.1" / "manifest.json"
    manifest = json.loads(file.read_bytes())
    change(manifest)
    file.write_bytes(seal(manifest))
    checkpoints = lab.make()
    assert checkpoints.open().step == 1
    (warning,) = checkpoints.warnings
    assert said in warning


def test_a_manifest_without_a_version_stops_the_run(lab: Any) -> None:
    lab.train(1)
    file = lab.directory / "step-1.1" / "manifest.json"
    manifest = json.loads(file.read_bytes())
    del manifest["version"]
    file.write_bytes(seal(manifest))
    with pytest.raises(ConfigError, match="format version None, this program reads 1"):
        lab.make().open()


def test_a_manifest_of_a_newer_format_stops_the_run(lab: Any) -> None:
    lab.train(1)
    file = lab.directory / "step-1.1" / "manifest.json"
    file.write_bytes(seal({**json.loads(file.read_bytes()), "version": 2}))
    with pytest.raises(ConfigError, match="format version 2, this program reads 1"):
        lab.make().open()


def test_an_unreadable_claim_stops_the_run(lab: Any) -> None:
    lab.train(1)
    (lab.directory / "generation-1.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation-1\.json"):
        lab.make().open()


@pytest.mark.parametrize("file", [RANK_FILE, "manifest.json"])
@pytest.mark.parametrize("reason", [errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_not_passed_over(
    lab: Any, file: str, reason: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train(3, keep_last=1)
    before = sorted(path.name for path in lab.directory.rglob("*"))

    def fail(path: Path) -> None:
        if path == lab.directory / "step-3.1" / file:
            raise OSError(reason, os.strerror(reason))

    def digest(path: Path) -> Any:
        fail(path)
        return file_digest(path)

    def read(path: Path) -> bytes:
        fail(path)
        return open(path, "rb").read()

    with monkeypatch.context() as patch:
        patch.setattr("cptjob_trainer.checkpoint.checkpoint_manifest.file_digest", digest)
        patch.setattr(Path, "read_bytes", read)
        with pytest.raises(OutputError, match=f"{file} cannot be read: .* and run again"):
            lab.make(keep_last=1).open()
    assert sorted(path.name for path in lab.directory.rglob("*")) == before
    assert lab.make(keep_last=1).open().step == 3


def test_a_directory_whose_manifest_cannot_be_looked_for_is_not_removed(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train(2)
    look = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("step-2.1/manifest.json"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return look(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("cptjob_trainer.checkpoint.checkpoint_manifest.os.stat", stat)
        with pytest.raises(OutputError, match=r"step-2\.1/manifest\.json cannot be read: Stale"):
            lab.make().open()
    assert lab.make().open().step == 2
