"""metrics.jsonl and TensorBoard's events tell of one lineage, however often a run was cut short."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cptjob_trainer.errors import StorageFullError
from cptjob_trainer.training.metrics import MetricsLog, read_metrics


def test_a_run_that_goes_on_drops_what_was_written_beyond_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, 0)
    for step in (1, 2, 3):
        first.write(step=step, loss=float(step))
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    second = MetricsLog(path, 2)
    second.write(step=3, loss=30.0)
    second.close()
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 2.0, 30.0]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    for start, losses in ((0, (1.0, 2.0, 3.0)), (1, (20.0, 30.0))):
        log = MetricsLog(tmp_path / "metrics.jsonl", start, tmp_path / "tensorboard")
        for step, loss in enumerate(losses, start=start + 1):
            log.write(step=step, loss=loss, mfu=None, tokensBySource={"law": 7})
        log.write(step=start + 1, evaluation={"heldout_domain_loss": 5.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 20.0),
        (3, 30.0),
    ]
    assert events.Scalars("tokensBySource/law")[-1].value == 7.0
    assert events.Scalars("evaluation/heldout_domain_loss")[-1].value == 5.0


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(StorageFullError, match="goes on from the last checkpoint"):
        log.write(step=1, loss=1.0)


@pytest.mark.parametrize("error", [errno.EFBIG, errno.EDQUOT])
def test_every_kind_of_no_room_is_told_as_such(error: int, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(StorageFullError, match="no space is left"), log._on_disk():
        raise OSError(error, "no room")


@pytest.mark.parametrize("failing", ["__init__", "add_scalar", "close"])
def test_events_that_cannot_be_written_are_given_up_with_one_warning(
    failing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{failing}", full)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, tmp_path / "tensorboard")
    for step in (1, 2):
        log.write(step=step, loss=float(step))
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "No space left on device" in message
    assert str(tmp_path / "metrics.jsonl") in message


def test_what_is_no_number_is_null_in_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(step=1, evaluation={"heldout_domain_loss": float("nan"), "heldout/law": 2.0})
    log.close()
    line = {"step": 1, "evaluation": {"heldout_domain_loss": None, "heldout/law": 2.0}}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == line
