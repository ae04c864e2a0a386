"""`cptjob run` with real processes and a stand-in for the training: ends, stops, deaths."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cptjob import jobs, local
from cptjob.volumes import Volumes
from cptjob_trainer.config import digest
from cptjob_trainer.errors import StorageFullError
from cptjob_trainer.training.progress import ProgressServer

PATIENCE_SECONDS = 90.0
HERE = Path(__file__).parent


def _wait_until(happened: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def _processes_of(output: Path) -> list[int]:
    """Living processes of a run: their command lines or their parents' name its directory."""
    found: dict[int, int] = {}
    named: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] in "ZX":
            continue
        pid = int(entry.name)
        found[pid] = int(fields[1])
        if str(output / "logs").encode() in command:
            named.add(pid)
    children = {pid for pid, parent in found.items() if parent in named}
    return sorted(named | children | {pid for pid, parent in found.items() if parent in children})


@dataclass
class Client:
    """Starts `cptjob run` on a job whose name says what its workers do."""

    place: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.place / "out"

    def name(self, name: str) -> None:
        manifest = self.place / "job.yaml"
        manifest.write_text(manifest.read_text().replace("name: small", f"name: {name}"))

    def run(self) -> subprocess.Popen[str]:
        arguments = ["run", "job.yaml", "--output", "out", "--processes", "2"]
        process = subprocess.Popen(
            [sys.executable, str(HERE / "standin_client.py"), *arguments],
            cwd=self.place,
            env={**os.environ, "PYTHONPATH": str(HERE.parent / "run")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output, errors

    def notes(self, name: str) -> int:
        return len(list(self.output.glob(f"{name}.*.*[0-9]")))

    def wait_for(self, name: str) -> None:
        _wait_until(lambda: self.notes(name) == 2, f"both workers note {name}")


def _coordinator_of(output: Path) -> int:
    return next(
        pid
        for pid in _processes_of(output)
        if b"cptjob_trainer.run.coordinator" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


@pytest.fixture
def client(place: Path) -> Iterator[Client]:
    made = Client(place)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_run_ends_with_where_everything_is(client: Client) -> None:
    client.name("ok")
    code, output, errors = client.end(client.run())
    assert code == 0, errors
    for line in ("Model:        out/model", "Report:       out/report.html", "not measured"):
        assert line in output
    assert "Checkpoints:  out/checkpoints" in output
    assert "warning: little data" in errors
    assert _processes_of(client.output) == []


def test_an_error_of_a_worker_is_one_line_with_its_exit_code(client: Client) -> None:
    client.name("fail-78")
    code, output, errors = client.end(client.run())
    assert (code, output) == (78, "")
    assert "error: foreseen error 78\n" in errors
    assert "Traceback" not in errors
    assert _processes_of(client.output) == []


def test_a_dead_worker_is_told_in_a_line_with_what_is_done_about_it(client: Client) -> None:
    client.name("crash-1")
    code, _, errors = client.end(client.run())
    assert code == 0, errors
    told = [line for line in errors.splitlines() if line.startswith("warning: ")]
    restarted = (
        "rank 0 was ended by SIGKILL (often: out of memory); the workers are restarted and go on "
        "from what was saved last (restart 1 of 3)"
    )
    assert told == ["warning: little data", f"warning: {restarted}"]
    (file,) = client.output.glob("logs/*/warnings.txt")
    assert file.read_text().splitlines() == ["little data", restarted]


def test_a_warning_that_the_full_disk_did_not_take_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    display: Any = SimpleNamespace(say=said.append, update=lambda _: None)
    config: Any = None
    server = ProgressServer("127.0.0.1", 0)
    address = f"127.0.0.1:{server.port}"
    run = local._Run(config, tmp_path, display, local._Stop(), address=address)
    (tmp_path / "warnings.txt").write_text("little data")
    server.set_warnings(["little data", "no space left"])
    run._show()
    server.close()
    run._show()
    assert said == ["warning: little data", "warning: no space left"]


def test_an_error_of_the_data_is_one_line_with_its_exit_code(client: Client) -> None:
    client.name("bad")
    code, _, errors = client.end(client.run())
    assert code == 65
    assert [line for line in errors.splitlines() if "broken" in line] == [
        "error: two files are broken"
    ]
    assert client.notes("started") == 0
    assert _processes_of(client.output) == []


def test_ctrl_c_saves_stops_and_says_how_to_continue(client: Client) -> None:
    client.name("train")
    process = client.run()
    client.wait_for("training")
    process.send_signal(signal.SIGINT)
    code, _, errors = client.end(process)
    assert code == 143
    assert client.notes("saved") == 2
    assert "a checkpoint is saved first" in errors
    assert "stopped: stopped" not in errors.lower()
    assert "To continue: cptjob run job.yaml --output out --processes 2" in errors
    assert _processes_of(client.output) == []


def test_ctrl_c_while_data_is_prepared_promises_no_checkpoint(client: Client) -> None:
    client.name("endless")
    process = client.run()
    assert process.stderr is not None
    for line in process.stderr:
        if "counting" in line:
            break
    process.send_signal(signal.SIGINT)
    code, _, errors = client.end(process)
    assert code == 143, errors
    assert "Stopping: no step is done yet; what is prepared so far is kept." in errors
    assert "checkpoint" not in errors
    assert _processes_of(client.output) == []


def test_a_second_ctrl_c_stops_at_once(client: Client) -> None:
    client.name("deaf")
    process = client.run()
    client.wait_for("training")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "a checkpoint is saved first" in line:
            break
    process.send_signal(signal.SIGINT)
    code, _, errors = client.end(process)
    assert code == 130
    assert "Stopped at once" in errors
    _wait_until(lambda: _processes_of(client.output) == [], "no process is left")


def test_a_killed_client_leaves_no_process_and_the_workers_save(client: Client) -> None:
    client.name("train")
    process = client.run()
    client.wait_for("training")
    process.kill()
    process.wait()
    _wait_until(lambda: _processes_of(client.output) == [], "no process is left")
    assert client.notes("saved") == 2
    for note in client.output.glob("training.*"):
        note.unlink()
    again = client.run()
    client.wait_for("training")
    again.send_signal(signal.SIGTERM)
    assert client.end(again)[0] == 143


def test_a_lost_coordinator_leaves_the_workers_the_time_that_their_save_takes(
    client: Client,
) -> None:
    client.name("slow-2")
    process = client.run()
    client.wait_for("training")
    os.kill(_coordinator_of(client.output), signal.SIGKILL)
    code, _, errors = client.end(process)
    assert code == 137
    assert "error: the coordinator was killed (signal 9); the same command continues" in errors
    assert client.notes("saving") == 2
    assert client.notes("saved") == 2
    assert _processes_of(client.output) == []


def test_a_second_run_of_the_same_output_is_refused(client: Client) -> None:
    client.name("train")
    first = client.run()
    client.wait_for("training")
    code, _, errors = client.end(client.run())
    assert code == 75
    assert errors.count("\n") == 1
    assert f"is in use by process {first.pid} on" in errors
    first.send_signal(signal.SIGTERM)
    assert client.end(first)[0] == 143
    assert client.notes("saved") == 2


def test_a_run_whose_reader_goes_away_goes_on_to_its_end(client: Client) -> None:
    client.name("ok")
    process = client.run()
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    assert "Model:        out/model" in output


def test_a_full_volume_is_told_as_that_before_and_after_the_processes_start(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = jobs.load(place / "job.yaml", tmp_path / "out", Volumes.parse([], place), 1).config
    told = f"no space left on {tmp_path / 'out'}; free some and run the same command"
    display: Any = SimpleNamespace(say=print)

    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local, "_make_run_directory", full)
    with pytest.raises(StorageFullError, match=told):
        local.run(config, display, {})
    run = local._Run(config, tmp_path, display, local._Stop())
    run.processes[local.TRAINER] = SimpleNamespace(returncode=1)  # type: ignore[assignment]
    assert run._ending(local.TRAINER).message.startswith("the trainer ended with exit code 1")
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    ending = run._ending(local.TRAINER)
    assert (ending.exit_code, ending.message) == (74, told)


def test_a_complete_output_is_left_alone(client: Client) -> None:
    client.name("ok")
    volumes = Volumes.parse([], client.place)
    config = jobs.load(client.place / "job.yaml", client.output, volumes, 2).config
    client.output.mkdir()
    metrics = {"heldout_domain_loss_base": 3.0, "heldout_domain_loss": 2.5}
    result = {"digest": digest(config, "model", "data"), "files": {}, "metrics": metrics}
    (client.output / "manifest.json").write_text(json.dumps(result))
    code, output, errors = client.end(client.run())
    assert code == 0, errors
    assert "is complete already" in output
    assert "3.0000 before, 2.5000 after (-0.5000)" in output
    assert client.notes("started") == 0, "no worker was started"
