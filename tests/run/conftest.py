"""Real launchers and coordinators, started with a stand-in for the training."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cptjob_trainer import store, termination
from cptjob_trainer.config import (
    Checkpoint,
    DatasetInput,
    Elastic,
    ModelInput,
    Paths,
    Processes,
    ResolvedSchedule,
    ResolvedTraining,
    TrainerConfig,
)
from cptjob_trainer.termination import Termination

PATIENCE_SECONDS = 60.0


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Returns when ``happened`` is true; the patience is for a loaded machine, not a measure."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


@dataclass
class Job:
    """A job whose launcher is a real process."""

    directory: Path
    config: TrainerConfig
    address: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.config.paths.output

    def start(self, module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        log = self.directory / f"termination-{len(self.processes)}.json"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"cptjob_trainer.run.{module}",
                "--config",
                self.config_path,
                *arguments,
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parent),
                termination.LOG_VARIABLE: str(log),
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    wait_until = staticmethod(wait_until)
    is_alive = staticmethod(is_alive)
    descendants = staticmethod(descendants)

    @property
    def config_path(self) -> str:
        return str(self.directory / "config.json")

    def launch(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return self.start(
            "launch",
            "--store",
            self.address,
            "--entrypoint",
            "standin_worker:main",
            *arguments,
            **environment,
        )

    def start_under_parent(self) -> subprocess.Popen[str]:
        """A launcher below a process that it is told to follow; returns that process."""
        program = (
            "import os, subprocess, sys;"
            "os.environ['CPTJOB_PARENT_PID'] = str(os.getpid());"
            "subprocess.Popen(sys.argv[1:]).wait()"
        )
        launch = [sys.executable, "-m", "cptjob_trainer.run.launch", "--config", self.config_path]
        launch += ["--store", self.address, "--entrypoint", "standin_worker:main"]
        process = subprocess.Popen(
            [sys.executable, "-c", program, *launch],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.processes.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Waits for the process; its exit code and what it wrote to stderr."""
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, errors

    def termination(self, index: int = 0) -> Termination | None:
        return termination.read(self.directory / f"termination-{index}.json")

    def notes(self, name: str) -> list[str]:
        """Names of the notes (name.rank.start) that workers left."""
        return sorted(path.name for path in self.output.glob(f"{name}.*.*[0-9]"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Makes a job: its name says what the stand-in does. Its store is hosted here."""
    jobs: list[Job] = []
    host = store.host("127.0.0.1", 0)
    host.set(store.PREPARED_KEY, str(tmp_path / "prepared"))

    def make(name: str, *, processes: int = 2, max_restarts: int = 3, grace: int = 30) -> Job:
        output = tmp_path / "out"
        output.mkdir(exist_ok=True)
        config = TrainerConfig(
            name=name,
            uid="job-uid",
            model=ModelInput(uri="file:///m", path=Path("/m")),
            datasets=(DatasetInput(name="d", uri="file:///d", path=Path("/d")),),
            training=ResolvedTraining(
                epochs=1,
                max_length=8,
                batch_size_per_device=1,
                global_batch_size=2,
                learning_rate=0.1,
                schedule=ResolvedSchedule(min_learning_rate=0.0),
            ),
            checkpoint=Checkpoint(grace_period_seconds=grace),
            elastic=Elastic(max_restarts=max_restarts),
            processes=Processes(num_nodes=1, num_proc_per_node=processes),
            paths=Paths(output=output),
        )
        config.dump(tmp_path / "config.json")
        made = Job(tmp_path, config, f"127.0.0.1:{host.port}")
        jobs.append(made)
        return made

    yield make
    for made in jobs:
        for process in made.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
