"""Termination messages: what each error becomes, and which of several explains the rest."""

import json
import time
from pathlib import Path

import pytest

from cptjob_trainer import termination
from cptjob_trainer.errors import ConfigError, RankLostError, Stopped
from cptjob_trainer.termination import Termination


def _end(error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv(termination.LOG_VARIABLE, str(path))
    with pytest.raises(SystemExit) as exit_, termination.guard():
        raise error
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_a_foreseen_error_is_one_line_and_a_small_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    assert _end(ConfigError("seed: 1 is not 2"), path, monkeypatch) == 78
    assert capsys.readouterr().err == "error: seed: 1 is not 2\n"
    value = json.loads(path.read_text())
    assert (value["exitCode"], value["reason"], value["message"]) == (
        78,
        "ConfigError",
        "seed: 1 is not 2",
    )


def test_a_clean_stop_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _end(Stopped("saved step 3"), tmp_path / "log", monkeypatch) == 143
    assert capsys.readouterr().err == "saved step 3\n"


def test_an_unforeseen_error_leaves_its_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _end(ZeroDivisionError("oh"), tmp_path / "log", monkeypatch) == 70
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("error: ZeroDivisionError: oh")


def test_lack_of_memory_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    assert _end(MemoryError(), path, monkeypatch) == 70
    ended = termination.read(path)
    assert ended is not None
    assert "batchSizePerDevice" in ended.message


def test_a_long_message_is_cut_and_stays_json() -> None:
    text = Termination(70, "R", "ä" * 5000).to_json()
    assert len(text.encode()) < 4096
    assert Termination.from_json(text).message.endswith(" ...")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"exitCode": "x"}', "{"])
def test_what_is_no_message_is_read_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    assert termination.read(tmp_path / "log") is None


def test_the_root_cause_is_the_foreseen_or_the_killed_not_the_first() -> None:
    peer = Termination(70, "RuntimeError", "connection closed", 1, time=1.0)
    killed = Termination(137, "Killed", "rank 0", 0, time=2.0)
    stop = Termination(143, "Stopped", "saved", 2, time=0.5)
    assert termination.root_cause([peer, killed, stop]) is killed
    assert termination.root_cause([stop, peer]) is peer
    assert termination.root_cause([]) is None


def test_a_rank_that_lost_another_is_not_the_root_cause() -> None:
    lost = termination.describe(RankLostError("rank 1 lost another rank"))
    killed = termination.from_signal(9, 0)
    assert lost.time < killed.time
    assert termination.root_cause([lost, killed]) is killed


def test_a_stop_that_was_asked_for_explains_the_ranks_that_lost_a_stopped_one() -> None:
    stop = termination.describe(Stopped("stopped before a step was trained"))
    lost = termination.describe(RankLostError("rank 1 lost another rank"))
    peer = Termination(70, "RuntimeError", "connection closed", 1, time=0.0)
    full = Termination(74, "StorageFullError", "no room", 1, time=time.time())
    assert termination.root_cause([lost, peer, stop], stop_asked=True) is stop
    assert termination.root_cause([lost, peer, stop]) is peer
    assert termination.root_cause([stop, full], stop_asked=True) is full
