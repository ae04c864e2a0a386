"""Who owns a run, which checkpoints count, and which are kept."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer import disk
from cptjob_trainer.checkpoint import generations
from cptjob_trainer.errors import MismatchError, OutputBusyError, OutputError


@pytest.mark.parametrize(
    ("keep_last", "kept"),
    [
        (1, ["step-4.1"]),
        (2, ["step-3.1", "step-4.1"]),
        (None, [f"step-{n}.1" for n in (1, 2, 3, 4)]),
    ],
)
def test_keep_last_keeps_the_newest(lab: Any, keep_last: int | None, kept: list[str]) -> None:
    lab.train(4, keep_last=keep_last)
    assert lab.names() == kept


def test_the_older_one_goes_only_after_the_newer_is_complete(lab: Any) -> None:
    lab.train(1, keep_last=1)
    lab.alone(lambda: lab.train(2, keep_last=1), CPTJOB_FAILPOINT="checkpoint.before_publish:1")
    assert lab.names() == ["step-1.1", "step-2.2"]
    assert not (lab.directory / "step-2.2" / "manifest.json").exists()


def test_what_is_not_ours_is_left_alone(lab: Any) -> None:
    lab.train(1, keep_last=1)
    (lab.directory / "step-notes.txt").write_text("mine")
    (lab.directory / "step-x.1").mkdir()
    lab.train(2, keep_last=1)
    assert lab.names() == ["step-2.2", "step-notes.txt", "step-x.1"]


def test_another_model_or_seed_is_refused_with_both_values(lab: Any) -> None:
    lab.train(1)
    with pytest.raises(MismatchError) as caught:
        lab.make(lineage={"model": "m2", "seed": 1}).open()
    message = str(caught.value)
    assert 'model is "m1" in the checkpoint and "m2" in this job' in message
    assert "seed is 0 in the checkpoint and 1 in this job" in message
    assert "onMismatch: StartNew" in message
    assert lab.names() == ["step-1.1"]


def test_of_another_model_or_data_a_person_is_told_the_names(lab: Any) -> None:
    lab.train(1)
    inputs = {"model": "pvc://models/base"}
    with pytest.raises(MismatchError) as caught:
        lab.make(lineage={"model": "m2", "seed": 0}, inputs=inputs).open()
    told = 'model is "m1" in the checkpoint and "m2" in this job (pvc://models/base). Restore'
    assert told in str(caught.value)


def test_start_new_keeps_the_old_run_until_the_first_new_checkpoint(lab: Any) -> None:
    other = {"lineage": {"model": "m2", "seed": 0}, "on_mismatch": "StartNew"}
    lab.train(3)
    checkpoints = lab.make(**other)
    assert checkpoints.open() is None
    assert len(checkpoints.warnings) == 1
    assert "3 older checkpoint(s) are deleted once the first new one" in checkpoints.warnings[0]
    assert lab.names() == ["step-1.1", "step-2.1", "step-3.1"]
    # Nothing new was saved, so the old run can still be continued.
    assert lab.make().open().step == 3
    assert lab.train(1, **other) == [1]
    assert lab.names() == ["step-1.4"]
    with pytest.raises(MismatchError, match='model is "m2" in the checkpoint and "m1" in this job'):
        lab.make().open()


def test_of_two_claims_at_once_one_wins(lab: Any) -> None:
    lab.directory.mkdir()
    outcomes = lab.run(
        6, lambda rank: generations.claim(lab.directory, 1, f"uid-{rank}", "l", -1, None).uid
    )
    won = [outcome.value for outcome in outcomes if outcome.error is None]
    lost = [outcome for outcome in outcomes if outcome.error is not None]
    assert len(won) == 1
    assert [outcome.error for outcome in lost] == 5 * ["OutputBusyError"]
    assert "another process has just taken over this run" in lost[0].message
    claim = json.loads((lab.directory / "generation-1.json").read_bytes())
    assert claim["uid"] == won[0]
    assert os.listdir(lab.directory) == ["generation-1.json"]


def test_a_claim_says_what_it_continues(lab: Any) -> None:
    lab.train(2)
    lab.make(uid="another-uid").open()
    claims = generations.claims(lab.directory)
    assert [(c.generation, c.uid, c.step, c.continues) for c in claims] == [
        (1, "a-uid", -1, None),
        (2, "another-uid", 2, "step-2.1"),
    ]


def test_a_run_that_was_taken_over_cannot_save(lab: Any) -> None:
    older = lab.make()
    older.open()
    older.save(1, lab.values(1), {"step": 1})
    newer = lab.make()
    newer.open()
    with pytest.raises(OutputBusyError, match="another process has taken over this run"):
        older.save(2, lab.values(2), {"step": 2})
    newer.save(2, lab.values(2), {"step": 2})
    assert lab.names() == ["step-1.1", "step-2.2"]


def test_a_late_checkpoint_of_an_older_generation_does_not_count(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train(1)
    older = lab.make()
    older.open()
    newer = lab.make()
    assert newer.open().step == 1
    # It looked just before it was taken over, and publishes just after.
    monkeypatch.setattr(older, "_check_owner", lambda: None)
    monkeypatch.setattr(older, "retain", lambda: None)
    older.save(5, lab.values(5), {"step": 5})
    assert lab.names() == ["step-1.1", "step-5.2"]
    last = lab.make()
    assert last.open().step == 1
    last.save(2, lab.values(2), {"step": 2})
    assert lab.names() == ["step-1.1", "step-2.4"]


def test_a_run_that_fell_back_makes_the_newer_ones_void_for_ever(lab: Any) -> None:
    lab.train(3)
    file = lab.directory / "step-3.1" / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert lab.make().open().step == 2
    file.write_bytes(content)
    assert lab.make().open().step == 2


def test_generations_go_on_where_claims_were_lost(lab: Any) -> None:
    lab.train(1)
    lab.train(2)
    for path in lab.directory.glob("generation-*"):
        path.unlink()
    assert lab.train(3) == [3]
    assert lab.names() == ["step-1.1", "step-2.2", "step-3.3"]


def test_a_folder_that_cannot_be_made_is_an_output_error(lab: Any) -> None:
    lab.directory.parent.joinpath("checkpoints").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        lab.make().open()


def no_links(*_: Any) -> None:
    raise OSError(errno.EPERM, "no hard links here")


def test_a_claim_that_could_not_be_written_in_full_does_not_block_the_next_start(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, synced = os.fsync, []

    def full_in_the_end(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    lab.directory.mkdir()
    path = lab.directory / "generation-1.json"
    with monkeypatch.context() as volume:
        volume.setattr(os, "link", no_links)
        volume.setattr(os, "fsync", full_in_the_end)
        with pytest.raises(OSError, match="No space left"):
            disk.create(path, b"{}")
    assert os.listdir(lab.directory) == []
    lab.train(1)
    assert lab.names() == ["step-1.1"]


def test_without_hard_links_too_a_claim_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    disk.create(tmp_path / "claim", b"first")
    with pytest.raises(FileExistsError):
        disk.create(tmp_path / "claim", b"second")
    assert (tmp_path / "claim").read_bytes() == b"first"
