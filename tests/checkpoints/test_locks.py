"""One live job at a time holds an output folder."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer.errors import OutputBusyError, OutputError
from cptjob_trainer.locks import OutputLock


def test_a_second_job_is_told_who_holds_the_output(lab: Any, tmp_path: Path) -> None:
    with OutputLock(tmp_path / "out", "first-uid"):
        with pytest.raises(OutputBusyError) as caught:
            OutputLock(tmp_path / "out", "second-uid").acquire()
        for told in (str(tmp_path / "out"), f"process {os.getpid()}", "first-uid", "--output"):
            assert told in str(caught.value)
        other = lab.alone(lambda: OutputLock(tmp_path / "out", "second-uid").acquire())
        assert other.error == "OutputBusyError"
    with OutputLock(tmp_path / "out", "second-uid"):
        assert json.loads((tmp_path / "out" / ".lock").read_bytes())["uid"] == "second-uid"


def test_the_lock_of_a_killed_job_is_free(lab: Any, tmp_path: Path) -> None:
    def hold_and_die() -> None:
        OutputLock(tmp_path, "killed").acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert lab.alone(hold_and_die).signal == signal.SIGKILL
    OutputLock(tmp_path, "next").acquire()


def test_a_lock_file_with_nonsense_in_it_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("nonsense " * 9)
    with OutputLock(tmp_path, "a"), pytest.raises(OutputBusyError):
        OutputLock(tmp_path, "b").acquire()


def test_an_output_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the output folder"):
        OutputLock(tmp_path / "file" / "out", "a").acquire()


def test_a_folder_without_file_locks_is_not_called_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OutputError, match="No locks available; put the output on a volume"):
        OutputLock(tmp_path / "out", "uid").acquire()
