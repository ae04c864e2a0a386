"""`cptjob run` as a person has it: client, coordinator, prepare, launcher and workers, all real.

The model is the tiny one of the demo, the text is the demo's with less of the general one, and jobs
are copies of deploy/examples/tiny.yaml with other values.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cptjob.local import read_progress
from cptjob_trainer import demo
from cptjob_trainer.training.metrics import read_metrics

PATIENCE_SECONDS = 240.0
STEPS, EVERY = 12, 4
# Of each file: to tokenise and to evaluate all of them would take most of a run's time.
GENERAL_DOCUMENTS = 8
EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "tiny.yaml"


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Returns when ``happened`` is true; the patience is for a loaded machine, not a measure."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


@dataclass
class Processes:
    """The living processes of a run, by what they are."""

    coordinator: list[int] = field(default_factory=list)
    launcher: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)

    @property
    def all(self) -> list[int]:
        return self.coordinator + self.launcher + self.workers + self.others


def processes_of(output: Path) -> Processes:
    """Found by the run's directory in their command lines, and by their parents."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            commands[int(entry.name)] = (entry / "cmdline").read_bytes()
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            parents[int(entry.name)] = int(fields[1])
    found = Processes()
    for pid in parents:
        if str(output / "logs").encode() + b"/" in commands[pid]:
            is_launcher = b"cptjob_trainer.run.launch" in commands[pid]
            (found.launcher if is_launcher else found.coordinator).append(pid)
    for pid, parent in parents.items():
        if parent in found.coordinator + found.launcher:
            found.others.append(pid)
    found.workers = [pid for pid, parent in parents.items() if parent in found.others]
    return found


@dataclass
class Job:
    """A manifest and its output folder, both named ``name``, in a directory with volumes.

    ``prefix`` is what the command runs under, ``before`` is called in its process; ``view`` is
    the output as it is seen from here, where that is another path; ``seconds`` is how long the job
    took that nobody disturbed.
    """

    place: Path
    name: str
    volumes: Path
    prefix: tuple[str, ...] = ()
    view: Path | None = None
    before: Callable[[], None] | None = None
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def output(self) -> Path:
        return self.view or self.place / self.name

    def write(self, **sections: Any) -> None:
        """The example in few steps, with other values: `write(training={"learningRate": 0.1})`."""
        manifest = yaml.safe_load(EXAMPLE.read_text())
        manifest["metadata"]["name"] = "few-steps"
        spec = manifest["spec"]
        few = {"training": {"maxSteps": STEPS}, "checkpoint": {"everySteps": EVERY}}
        for changes in (few, sections):
            for section, values in changes.items():
                joined = isinstance(values, dict)
                spec[section] = {**spec.get(section, {}), **values} if joined else values
        (self.place / f"{self.name}.yaml").write_text(yaml.safe_dump(manifest))

    def start(self, processes: int = 2, *asked: str, **environment: str) -> subprocess.Popen[str]:
        """`cptjob run`, or another command with its options."""
        name, *options = asked or ("run",)
        command = [*self.prefix, sys.executable, "-m", "cptjob", name, f"{self.name}.yaml"]
        command += [*options, "--output", self.name, "--processes", str(processes)]
        manifest = (self.place / f"{self.name}.yaml").read_text()
        for claim in ("models", "data"):
            if f"pvc://{claim}/" in manifest:
                command += ["--volume", f"{claim}={self.volumes / claim}"]
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        process = subprocess.Popen(
            command,
            cwd=self.place,
            # With more threads than cores are free, they wait for each other for seconds.
            env={**kept, "OMP_NUM_THREADS": "1", **environment},
            preexec_fn=self.before,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Exit code, what was printed, and what was said on stderr."""
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output, errors

    def run(self, processes: int = 2, **environment: str) -> tuple[int, str, str]:
        return self.end(self.start(processes, **environment))

    def step(self) -> int:
        """The last step whose numbers have been written."""
        return max((line["step"] for line in self.metrics()), default=0)

    def metrics(self) -> list[dict[str, Any]]:
        lines = read_metrics(self.output / "metrics.jsonl")
        return [line for line in lines if "loss" in line]

    def wait_for_step(self, step: int) -> None:
        process = self.started[-1]
        there = lambda: self.step() >= step  # noqa: E731
        wait_until(lambda: there() or process.poll() is not None, f"step {step} of {self.name}")
        assert there(), f"{self.name} ended with {process.returncode}: {self.logs()}"

    def wait_for_silence(self) -> None:
        wait_until(lambda: not processes_of(self.output).all, f"no process of {self.name} is left")

    def progress(self) -> dict[str, Any] | None:
        """What /progress answers, or None while nobody does."""
        for file in self.output.glob("logs/*/http.address"):
            return read_progress(file.read_text().strip())
        return None

    def result(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.output / "manifest.json").read_text())
        return value

    def weights(self) -> str:
        """Digest of the model's weights."""
        return hashlib.sha256(
            (self.output / "model" / "model.safetensors").read_bytes()
        ).hexdigest()

    def checkpoints(self) -> list[int]:
        kept = (path.name for path in (self.output / "checkpoints").glob("step-*"))
        return sorted(int(re.findall(r"\d+", name)[0]) for name in kept)

    def logs(self) -> str:
        """What all processes of all runs of this job wrote to stderr."""
        files = sorted((self.output / "logs").rglob("stderr.log"))
        return "\n".join(file.read_text(errors="replace") for file in files)


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("volumes")
    demo.main(["tiny", "--volumes", str(path)])
    for file in (path / "data" / "general").iterdir():
        documents = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(documents[:GENERAL_DOCUMENTS]))
    return path


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def make_job(place: Path, volumes: Path) -> Iterator[Callable[..., Job]]:
    """`make_job("name", training={"seed": 1})`: a job of few steps; see `Job.write`.

    ``like`` is a job whose output the new one begins with.
    """
    made: list[Job] = []

    def make(name: str, *, like: Job | None = None, **sections: Any) -> Job:
        job = Job(place, name, volumes)
        if like is not None:
            shutil.copytree(like.output, job.output)
        job.write(**sections)
        made.append(job)
        return job

    yield make
    for job in made:
        for process in job.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="session")
def done(make_job: Callable[..., Job]) -> tuple[Job, str, list[dict[str, Any]]]:
    """A job that nobody disturbed, what it printed, and what /progress answered meanwhile."""
    job = make_job("done")
    began = time.monotonic()
    process = job.start()
    seen: list[dict[str, Any]] = []

    def ended() -> bool:
        if (progress := job.progress()) is not None:
            seen.append(progress)
        return process.poll() is not None

    wait_until(ended, "the job ends")
    job.seconds = time.monotonic() - began
    code, output, errors = job.end(process)
    assert code == 0, errors + job.logs()
    return job, output, seen


@pytest.fixture(scope="session")
def stopped(make_job: Callable[..., Job]) -> tuple[Job, int, str]:
    """A job that Ctrl-C stopped in mid-training; its exit code and what it said."""
    job = make_job("stopped")
    process = job.start()
    job.wait_for_step(3)
    process.send_signal(signal.SIGINT)
    code, _, errors = job.end(process)
    return job, code, errors


@pytest.fixture(scope="session", name="processes_of")
def processes_of_fixture() -> Callable[[Path], Processes]:
    return processes_of
