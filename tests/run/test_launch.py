"""The launcher with real processes: exit codes, restarts, stops, deaths."""

import argparse
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer.errors import CoordinatorLostError
from cptjob_trainer.run import launch

MakeJob = Callable[..., Any]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder that sockets may lie in; pytest's have names that are too long."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_a_job_that_ends_well_exits_0_and_shares_the_cores(job: MakeJob) -> None:
    made = job("ok")
    code, _ = made.end(made.launch(OMP_NUM_THREADS="3"))
    assert code == 0
    assert made.termination() is None
    started = (made.output / "started.0.0").read_text()
    assert started == "True 1 3", "forked warm, from a process without threads, threads as told"


@pytest.mark.parametrize("code", [65, 78])
def test_a_foreseen_input_error_is_passed_on_and_never_retried(job: MakeJob, code: int) -> None:
    made = job(f"fail-{code}")
    exit_code, errors = made.end(made.launch())
    ended = made.termination()
    assert (exit_code, ended.exit_code, ended.rank) == (code, code, 1)
    assert ended.message == f"foreseen error {code}"
    assert f"error: foreseen error {code}" in errors
    assert "Traceback" not in errors
    assert made.notes("started") == ["started.0.0", "started.1.0"], "started once only"


def test_a_dead_worker_is_restarted_in_place_and_warm(job: MakeJob) -> None:
    made = job("crash-2", max_restarts=2)
    code, errors = made.end(made.launch())
    assert code == 0
    assert made.notes("started") == [f"started.{rank}.{n}" for rank in (0, 1) for n in (0, 1, 2)]
    assert (made.output / "started.0.2").read_text().startswith("True 1"), "forked, not imported"
    assert "restarting the workers in place (2 of 2)" in errors


def test_when_restarts_are_used_up_the_root_cause_decides_not_the_peers(job: MakeJob) -> None:
    made = job("crash-9", max_restarts=1)
    code, _ = made.end(made.launch())
    ended = made.termination()
    assert code == ended.exit_code == 128 + signal.SIGKILL
    assert ended.rank == 0
    assert "SIGKILL" in ended.message
    assert "started.0.2" not in made.notes("started")


def test_restarted_workers_meet_again_over_gloo(job: MakeJob) -> None:
    made = job("meet", max_restarts=1)
    code, _ = made.end(made.launch())
    assert code == 0
    assert (made.output / "sum.0.1").read_text() == "3"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_all_workers_save_and_exits_143(job: MakeJob, number: signal.Signals) -> None:
    made = job("train")
    launcher = made.launch()
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train")
    launcher.send_signal(number)
    code, errors = made.end(launcher)
    assert code == 143
    assert made.notes("saved") == ["saved.0.0", "saved.1.0"]
    assert made.termination().reason == "Stopped"
    assert "error" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_after_the_workers_have_ended_well_changes_nothing(
    job: MakeJob, number: signal.Signals
) -> None:
    made = job("told")
    launchers = [made.launch("--nnodes", "2", "--nproc-per-node", "1") for _ in range(2)]
    made.wait_until(lambda: len(made.notes("training")) == 2, "both workers run")
    pid = int((made.output / "training.0.0").read_text())
    (first,) = (each for each in launchers if pid in made.descendants(each.pid))
    (made.output / "end.0").touch()
    made.wait_until(lambda: not made.is_alive(pid), "the worker of rank 0 has ended")
    # It now waits for the other launcher.
    time.sleep(1.0)
    first.send_signal(number)
    (made.output / "end.1").touch()
    assert [made.end(each)[0] for each in launchers] == [0, 0]


def test_a_signal_to_the_whole_group_still_lets_workers_save(job: MakeJob) -> None:
    made = job("train")
    launcher = made.launch()
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train")
    for pid in [launcher.pid, *made.descendants(launcher.pid)]:
        os.kill(pid, signal.SIGTERM)
    code, _ = made.end(launcher)
    assert code == 143
    assert made.notes("saved") == ["saved.0.0", "saved.1.0"]


def test_workers_that_do_not_stop_within_the_grace_are_killed(job: MakeJob) -> None:
    made = job("deaf", grace=1)
    launcher = made.launch()
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers run")
    launcher.send_signal(signal.SIGTERM)
    code, _ = made.end(launcher)
    assert code == 128 + signal.SIGKILL


def test_a_stop_before_workers_run_ends_at_once(job: MakeJob) -> None:
    made = job("train")
    launcher = made.start("launch", "--store", "@/nowhere", "--entrypoint", "standin_worker:main")
    made.wait_until(lambda: made.descendants(launcher.pid), "the fork server is started")
    launcher.send_signal(signal.SIGTERM)
    code, errors = made.end(launcher)
    assert (code, made.termination().reason) == (143, "Stopped")
    assert "the same command starts it again" in errors


def test_a_kill_of_the_launcher_leaves_no_process(job: MakeJob) -> None:
    made = job("deaf")
    launcher = made.launch()
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers run")
    family = made.descendants(launcher.pid)
    assert len(family) >= 3, "fork server and two workers"
    launcher.kill()
    launcher.wait()
    for pid in family:
        made.wait_until(lambda pid=pid: not made.is_alive(pid), f"{pid} ends")


def test_what_a_killed_launcher_left_is_removed_by_the_next(job: MakeJob, short_path: Path) -> None:
    made, temporary = job("train"), short_path
    foreign = temporary / "cptjob-elsewhere-999999999-x"
    foreign.mkdir()
    killed = made.launch(TMPDIR=str(temporary))
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train")
    killed.kill()
    made.end(killed)
    assert len(list(temporary.iterdir())) == 2
    for note in made.output.glob("training.*"):
        note.unlink()
    launcher = made.launch(TMPDIR=str(temporary))
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train again")
    (left,) = set(temporary.iterdir()) - {foreign}
    assert f"-{launcher.pid}-" in left.name
    launcher.terminate()
    assert made.end(launcher)[0] == 143
    assert list(temporary.iterdir()) == [foreign]


def test_a_launcher_whose_parent_dies_lets_the_workers_save(job: MakeJob) -> None:
    made = job("train")
    # A shell of its own is the parent, as the client is in a local run.
    made.config.dump(made.config_path)
    middle = made.start_under_parent()
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train")
    family = made.descendants(middle.pid)
    middle.kill()
    middle.wait()
    for pid in family:
        made.wait_until(lambda pid=pid: not made.is_alive(pid), f"{pid} ends")
    assert made.notes("saved") == ["saved.0.0", "saved.1.0"]


def test_a_coordinator_that_goes_just_before_the_gang_meets_is_lost_and_no_fault_of_ours(
    job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job("ok")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    # The store answers still; a connection of our own, which tells our address, is refused.
    monkeypatch.setattr(socket, "create_connection", refuse)
    options = argparse.Namespace(run_id="run", entrypoint="", config=made.config_path)
    with pytest.raises(CoordinatorLostError, match=r"is gone.*again to continue"):
        launch._run_agent(options, made.config, 2, 1, made.address)


def test_two_launchers_form_one_gang_and_end_with_the_same_cause(job: MakeJob) -> None:
    made = job("fail-65")
    first, second = (made.launch("--nnodes", "2", "--nproc-per-node", "1") for _ in range(2))
    codes = {made.end(first)[0], made.end(second)[0]}
    assert codes == {65}
    assert made.notes("started") == ["started.0.0", "started.1.0"]
