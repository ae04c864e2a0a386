"""Runs a job on this machine: one torchx AppDef with a coordinator and a trainer role.

torchx starts the processes and keeps their logs. How the job ended is taken from the termination
files that the processes leave, never from torchx's own account.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from torchx.runner import Runner
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalScheduler
from torchx.specs import AppDef, Role

from cptjob.live import LiveDisplay
from cptjob_trainer.checkpoint import lineage, output_folder
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.errors import OutputBusyError, OutputError, StorageFullError
from cptjob_trainer.lifeline import PARENT_VARIABLE
from cptjob_trainer.locks import CLIENT, OutputLock

COORDINATOR = "coordinator"
TRAINER = "trainer"
STOPPED = 143
#: After a second Ctrl-C.
KILLED = 130

# Names that the processes of a job know: see cptjob_trainer.lifeline, .termination, .coordinator.
_TERMINATION_VARIABLE = "CPTJOB_TERMINATION_LOG"
_HTTP_FILE = "http.address"
_STORE_FILE = "store.address"
_WARNINGS_FILE = "warnings.txt"

_POLL_SECONDS = 0.2
#: With less than this a process may not even have had the room to say why it ended.
_LITTLE_BYTES = 1 << 20
_COORDINATOR_SECONDS = 5.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Ending:
    """How a local run ended. ``complete`` is True when there was nothing left to do."""

    exit_code: int
    message: str
    logs: Path
    complete: bool = False


def app(config: TrainerConfig, config_path: Path, run: Path, parent: int) -> AppDef:
    """The job as torchx sees it. ``run`` is the directory of this run's files."""

    def role(name: str, module: str, arguments: list[str]) -> Role:
        return Role(
            name=name,
            image="",
            entrypoint=sys.executable,
            args=["-m", f"cptjob_trainer.{module}", "--config", str(config_path), *arguments],
            env={
                PARENT_VARIABLE: str(parent),
                _TERMINATION_VARIABLE: str(_termination_path(run, name)),
            },
            num_replicas=1,
        )

    # Loopback only, and any free port: the store asks nobody for a password.
    listen = ["--host", "127.0.0.1", "--store-port", "0", "--http-port", "0"]
    processes = ["--nnodes", "1", "--nproc-per-node", str(config.processes.world_size)]
    store = ["--store", f"@{run / _STORE_FILE}", "--lock-output"]
    return AppDef(
        name=config.name,
        roles=[
            role(COORDINATOR, "run.coordinator", [*listen, "--address-directory", str(run)]),
            role(TRAINER, "run.launch", [*store, *processes]),
        ],
    )


def _termination_path(run: Path, role: str) -> Path:
    return run / f"termination-{role}.json"


class _Scheduler(LocalScheduler):  # type: ignore[misc]
    """torchx's scheduler, which also hands out the processes it started, by role."""

    def __init__(self, session_name: str, **_options: Any) -> None:
        super().__init__(session_name, CWDImageProvider)
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def _get_app_log_dir(self, _app_id: str, cfg: Any) -> str:
        # torchx would add its own random name for each run; the run has a directory already.
        return str(Path(cfg["log_dir"]) / "processes")

    def _popen(self, role_name: str, replica_id: int, replica_params: Any) -> Any:
        replica = super()._popen(role_name, replica_id, replica_params)
        self.started[role_name] = replica.proc
        return replica


def _wait_for_orphan(output: Path, uid: str, seconds: float, say: Callable[[str], None]) -> None:
    """Lets the launcher of a client that died save and end. Raises OutputBusyError."""
    lock = OutputLock(output, uid)
    if not lock.path.exists():
        return
    deadline = time.monotonic() + seconds
    said = False
    while True:
        try:
            with lock:
                return
        except OutputBusyError:
            if time.monotonic() > deadline:
                raise
        if not said:
            say("an earlier run of this job is still saving and stopping; waiting for it")
            said = True
        time.sleep(_POLL_SECONDS)


@dataclass
class _Stop:
    """What the person asked for: the first Ctrl-C saves and stops, the second stops at once."""

    asked: int = 0
    forwarded: int = 0

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        self.asked += 1


@dataclass
class _Run:
    config: TrainerConfig
    directory: Path
    display: LiveDisplay
    stop: _Stop
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    address: str = ""
    warned: int = 0

    def watch(self) -> Ending:
        """Shows progress until the job has ended, and says how."""
        coordinator, trainer = self.processes[COORDINATOR], self.processes[TRAINER]
        while trainer.poll() is None:
            self._obey()
            code = coordinator.poll()
            if code is not None and not self.stop.forwarded:
                return self._without_coordinator(code)
            self._show()
            time.sleep(_POLL_SECONDS)
        if not (self.directory / _STORE_FILE).exists():
            coordinator.terminate()  # it still prepares and knows nothing of the launcher's end
        # Otherwise it serves the last of the progress, then ends by itself.
        self._await(coordinator, _COORDINATOR_SECONDS)
        self._show()
        return self._ending(TRAINER)

    def _obey(self) -> None:
        """Passes on what the person asked for, once each."""
        if self.stop.asked == self.stop.forwarded:
            return
        self.stop.forwarded = self.stop.asked
        if self.stop.asked == 1:
            trains = (self.directory / _STORE_FILE).exists()
            self.display.say(
                "Stopping: a checkpoint is saved first. Ctrl-C again stops at once, without it."
                if trains
                else "Stopping: no step is done yet; what is prepared so far is kept."
            )
            self.processes[TRAINER].terminate()
        else:
            self.kill()

    def _without_coordinator(self, code: int) -> Ending:
        """The coordinator ended first: there is nothing to do, or nothing that can be done."""
        trainer = self.processes[TRAINER]
        grace = self.config.checkpoint.grace_period_seconds + 10.0
        if code == 0 and (self.directory / _STORE_FILE).exists():
            # Its launcher has told it how the job ended, and is about to end by itself.
            self._await(trainer, grace)
            return self._ending(TRAINER)
        if code != 0:
            # A launcher that trains asks its workers to save as soon as it misses the store. One
            # that does not train waits for the store for ever, and has to be told.
            self._ended_within(trainer, 1.0)
        trainer.terminate()
        self._await(trainer, grace)
        return self._ending(COORDINATOR)

    def _await(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Until the process has ended; it is killed after ``seconds`` or a second Ctrl-C."""
        if not self._ended_within(process, seconds):
            process.kill()
            process.wait()

    def _ended_within(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        """Waits for the process; False after ``seconds`` or a second Ctrl-C."""
        deadline = time.monotonic() + seconds
        while process.poll() is None:
            if time.monotonic() > deadline or self.stop.asked > 1:
                return False
            time.sleep(0.05)
        return True

    def _ending(self, role: str) -> Ending:
        code = self.processes[role].returncode
        code = 128 - code if code < 0 else code
        said = _read_termination(_termination_path(self.directory, role))
        if self.stop.asked > 1:
            return Ending(KILLED, "stopped at once, without a new checkpoint", self.directory)
        if said is None and code and shutil.disk_usage(self.directory).free < _LITTLE_BYTES:
            # It could not even say why it ended.
            message = _no_space(self.config.paths.output)
            return Ending(StorageFullError.exit_code, message, self.directory)
        if said is None:
            message = f"the {role} {_end(code)}; the same command continues"
            return Ending(code, message if code else "", self.directory)
        complete = said.get("reason") == "AlreadyComplete"
        return Ending(code, str(said.get("message", "")), self.directory, complete)

    def _show(self) -> None:
        if not self.address:
            with contextlib.suppress(OSError):
                self.address = (self.directory / _HTTP_FILE).read_text().strip()
        if self.address and (progress := read_progress(self.address)) is not None:
            self.display.update(progress)
        for line in self._warnings()[self.warned :]:
            self.display.say(f"warning: {line}")
            self.warned += 1

    def _warnings(self) -> list[str]:
        """All so far. The file outlives the coordinator, and is not written on a full disk."""
        served = _read_json(self.address, "warnings") if self.address else None
        with contextlib.suppress(OSError):
            lines = (self.directory / _WARNINGS_FILE).read_text().splitlines()
            return max(lines, served, key=len) if isinstance(served, list) else lines
        return served if isinstance(served, list) else []

    def kill(self) -> None:
        """Ends every process at once; workers die with their launcher."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()


def _end(code: int) -> str:
    """How a process ended that left no word, by the exit code that a shell would give."""
    return f"was killed (signal {code - 128})" if code > 128 else f"ended with exit code {code}"


def read_progress(address: str) -> dict[str, Any] | None:
    """The coordinator's /progress; None when it does not answer."""
    value = _read_json(address, "progress")
    return value if isinstance(value, dict) else None


def _read_json(address: str, path: str) -> object:
    # Never through a proxy: the address is this machine's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/{path}", timeout=1.0) as answer:
            return json.loads(answer.read(65536))
    except (OSError, ValueError, urllib.error.URLError):
        return None


def _read_termination(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def run(config: TrainerConfig, display: LiveDisplay, environment: dict[str, str]) -> Ending:
    """Runs the job to its end. Raises OutputError, OutputBusyError, ConfigError before anything is
    started, and what the check of the model raises.

    ``environment`` is added to that of the processes. Must be called from the main thread: the
    processes follow the thread that starts them, and signals arrive there.
    """
    output = config.paths.output
    # Before the lock, which makes the folder.
    output_folder.check(config)
    with _room(output), OutputLock(output, config.uid, CLIENT):
        grace = config.checkpoint.grace_period_seconds + 10.0
        _wait_for_orphan(output, config.uid, grace, display.say)
        lineage.check_before_preparing(config)
        directory = _make_run_directory(output, config.name)
        config_path = directory / "config.json"
        config.dump(config_path)
        job = app(config, config_path, directory, os.getpid())
        for role in job.roles:
            role.env.update(environment)
        with _started(config, job, directory, display) as started, display:
            return started.watch()


@contextlib.contextmanager
def _room(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFullError(_no_space(output)) from error


def _no_space(directory: Path) -> str:
    return f"no space left on {directory}; free some and run the same command"


def _make_run_directory(output: Path, name: str) -> Path:
    """OUT/logs/NAME-TIME, with a number behind it for a second run in the same second."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        directory = output / "logs" / (f"{name}-{stamp}" + (f"-{number}" if number else ""))
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            return directory
    raise OutputError(f"{output / 'logs'}: no free name for the logs of this run")


@contextlib.contextmanager
def _started(
    config: TrainerConfig, job: AppDef, directory: Path, display: LiveDisplay
) -> Iterator[_Run]:
    """The processes of the job, and the certainty that they are gone afterwards."""
    logging.getLogger("torchx").setLevel(logging.ERROR)
    stop = _Stop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    scheduler = _Scheduler("cptjob")
    # torchx has just set handlers that raise anywhere; these only take note.
    for number in _SIGNALS:
        signal.signal(number, stop.handle)
    runner = Runner("cptjob", {"local_cwd": lambda session_name, **_: scheduler})
    started = _Run(config, directory, display, stop)
    try:
        runner.run(job, "local_cwd", cfg={"log_dir": str(directory)})
        started.processes = scheduler.started
        yield started
    finally:
        started.kill()
        runner.close()
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
