"""Killed at any point of a save, a run goes on from a whole checkpoint and leaves nothing behind."""

import os
import signal
from typing import Any

import pytest

from cptjob_trainer import failpoints
from cptjob_trainer.errors import UsageError

# Point and count in a second run that begins at step 2; the step that the third run finds.
POINTS = [
    ("checkpoint.claim:1", 2),
    ("checkpoint.claimed:1", 2),
    ("checkpoint.clean:1", 2),
    ("checkpoint.load:1", 2),
    ("checkpoint.stage:1", 2),
    ("checkpoint.write:1", 2),
    ("checkpoint.write:4", 2),
    ("checkpoint.written:1", 2),
    ("checkpoint.before_publish:1", 2),
    ("checkpoint.after_publish:1", 3),
    ("checkpoint.retention:1", 3),
    ("checkpoint.retained:1", 2),
    ("checkpoint.retained:2", 3),
    ("checkpoint.write:9", 3),
    ("checkpoint.before_publish:2", 3),
    ("checkpoint.retention:2", 4),
]


@pytest.mark.parametrize(("point", "found"), POINTS)
def test_a_killed_run_goes_on_from_the_last_whole_checkpoint(
    lab: Any, point: str, found: int
) -> None:
    lab.train(2, keep_last=2)
    killed = lab.alone(lambda: lab.train(5, keep_last=2), CPTJOB_FAILPOINT=point)
    assert killed.signal == signal.SIGKILL
    assert lab.alone(lambda: lab.train(5, keep_last=2)).value == list(range(found + 1, 6))
    assert [name.split(".")[0] for name in lab.names()] == ["step-4", "step-5"]
    assert sorted(path.name for path in lab.directory.glob("step-*/*")) == sorted(
        2 * ["manifest.json", "rank-00000.safetensors"]
    )


def test_a_run_killed_while_it_deletes_after_its_last_save_keeps_what_was_asked(lab: Any) -> None:
    lab.train(2, keep_last=2)
    killed = lab.alone(lambda: lab.train(3, keep_last=2), CPTJOB_FAILPOINT="checkpoint.retention:1")
    assert killed.signal == signal.SIGKILL
    assert [name.split(".")[0] for name in lab.names()] == ["step-1", "step-2", "step-3"]
    assert lab.train(3, keep_last=2) == []
    assert [name.split(".")[0] for name in lab.names()] == ["step-2", "step-3"]


@pytest.mark.parametrize("point", ["checkpoint.write:2:1", "checkpoint.written:1:0"])
def test_a_rank_killed_in_a_save_leaves_the_earlier_checkpoint(lab: Any, point: str) -> None:
    def train(rank: int) -> list[int]:
        steps: list[int] = lab.train(3, rank=rank, world=2, keep_last=1)
        return steps

    lab.train(2, keep_last=1)
    outcomes = lab.gloo(2, train, CPTJOB_FAILPOINT=point)
    assert signal.SIGKILL in [outcome.signal for outcome in outcomes]
    assert "RankLostError" in [outcome.error for outcome in outcomes]
    assert lab.names()[0] == "step-2.1"
    assert [outcome.value for outcome in lab.gloo(2, train)] == [[3], [3]]
    assert lab.names() == ["step-3.3"]


def test_every_checkpoint_failpoint_is_killed_at_in_a_test() -> None:
    named = {name for name in failpoints.NAMES if name.startswith("checkpoint.")}
    assert named == {point.split(":")[0] for point, _ in POINTS}


def test_a_restarted_worker_is_not_killed_again(lab: Any) -> None:
    outcome = lab.alone(
        lambda: lab.train(1),
        CPTJOB_FAILPOINT="checkpoint.stage:1",
        TORCHELASTIC_RESTART_COUNT="1",
    )
    assert outcome.value == [1]


@pytest.mark.parametrize("text", ["checkpoint.stage", "checkpoint.stage:x", "no.such:1", "a:1:2:3"])
def test_a_failpoint_that_cannot_be_meant_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPTJOB_FAILPOINT", text)
    with pytest.raises(UsageError, match="CPTJOB_FAILPOINT"):
        failpoints.hit("checkpoint.stage")


def test_an_unregistered_failpoint_is_an_error() -> None:
    assert "CPTJOB_FAILPOINT" not in os.environ
    with pytest.raises(ValueError, match=r"no\.such"):
        failpoints.hit("no.such")
