"""The client and its commands against a real API server, with the operator at work."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from world import World

from cptjob.client import Client
from cptjob.cluster import AsyncClient
from cptjob_api.conditions import Condition
from cptjob_api.manifest import load_manifest
from cptjob_trainer.errors import ClusterError, MissingInputError, RefusedError, TooLongError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "deploy" / "examples" / "tiny.yaml"
REPORT = {
    "currentStep": 30,
    "totalSteps": 100,
    "progressPercentage": 30,
    "estimatedRemainingSeconds": 3600,
    "tokensPerSecond": 1234.5,
    "metrics": {"loss": 2.5},
    "lastCheckpoint": {"step": 20, "time": "2030-01-01T00:00:00Z", "uri": "pvc://results/job"},
}

Cptjob = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.usefixtures("operator")


@pytest.fixture(name="client")
def make_client(world: World) -> Iterator[Client]:
    with Client(world.namespace, kubeconfig=world.plane.kubeconfig) as made:
        yield made


@pytest.fixture(name="cptjob")
def make_cptjob(world: World) -> Cptjob:
    """The command, in the test's namespace."""
    environment = os.environ | {"KUBECONFIG": str(world.plane.kubeconfig), "COLUMNS": "120"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cptjob", *arguments, "-n", world.namespace]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=120, check=False
        )

    return call


def train(world: World, name: str) -> None:
    world.prepare(name)
    world.run(name, world.job(name)["spec"]["trainer"].get("numNodes", 1))


def test_a_job_is_made_followed_suspended_resumed_and_deleted(world: World, client: Client) -> None:
    job = load_manifest(TINY).job
    name = client.create(job).metadata.name
    with pytest.raises(RefusedError, match=f"there is a job {name} in namespace .* already"):
        client.create(job)
    train(world, name)
    assert client.wait(name, Condition.RUNNING, 60).status is not None
    assert [each.metadata.name for each in client.list()] == [name]
    with pytest.raises(TooLongError, match=r"is not Complete or Failed or Stalled after 0\.2 s"):
        client.wait(name, seconds=0.2)
    assert client.suspend(name).spec.suspend
    world.suspend(name)
    client.wait(name, Condition.SUSPENDED, 60)
    client.resume(name)
    client.delete(name)
    with pytest.raises(MissingInputError, match=f"there is no job {name} in namespace"):
        client.get(name)


def test_a_watch_tells_each_state_and_ends_when_the_job_is_deleted(
    world: World, client: Client
) -> None:
    name = client.create(load_manifest(TINY).job).metadata.name
    states = client.watch(name)
    next(states)
    world.prepare(name)
    phases = []
    while "Starting" not in phases:
        told = next(states)
        phases += [str(told.status.phase)] if told.status else []
    assert set(phases) <= {"Pending", "Preparing", "Starting"}
    client.delete(name)
    with pytest.raises(MissingInputError):
        for _ in states:
            pass


def test_progress_is_told_until_the_job_rests(world: World, client: Client) -> None:
    name = client.create(load_manifest(TINY).job).metadata.name
    train(world, name)
    world.complete(name, REPORT)
    (said,) = client.progress(name)
    assert (said.current_step, said.total_steps, said.progress_percentage) == (30, 100, 30)
    assert [(each.name, float(each.value)) for each in said.metrics] == [("loss", 2.5)]


def test_many_jobs_are_waited_for_at_once(world: World) -> None:
    async def story() -> list[str]:
        async with AsyncClient(world.namespace, kubeconfig=world.plane.kubeconfig) as client:
            job = load_manifest(TINY).job
            named = [
                job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": name})})
                for name in ("a", "b")
            ]
            await asyncio.gather(*map(client.create, named))
            waits = [client.wait(name, Condition.RUNNING, 60) for name in ("a", "b")]
            both = asyncio.gather(*waits)
            await asyncio.to_thread(lambda: [train(world, name) for name in ("a", "b")])
            return [job.metadata.name for job in await both]

    assert asyncio.run(story()) == ["a", "b"]


def test_no_cluster_and_a_cluster_without_the_operator_are_told(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="no cluster is configured"):
        Client(kubeconfig=tmp_path / "none")
    monkeypatch.setattr("cptjob.cluster.PLURAL", "otherjobs")
    client = Client(world.namespace, kubeconfig=world.plane.kubeconfig)
    with pytest.raises(ClusterError, match="knows no CPTJobs"):
        client.list()


def test_the_commands_tell_a_story(world: World, cptjob: Cptjob) -> None:
    done = cptjob("submit", str(TINY))
    assert (done.returncode, done.stderr) == (0, "")
    name = load_manifest(TINY).job.metadata.name
    assert done.stdout == f"job {name} is made in namespace {world.namespace}\n"
    again = cptjob("submit", str(TINY))
    assert again.returncode == RefusedError.exit_code
    assert again.stderr.startswith(f"error: there is a job {name} in namespace")

    train(world, name)
    page = cptjob("status", name).stdout
    assert page.startswith(f"{name}: Running\n")
    head, line = cptjob("status").stdout.splitlines()
    assert head.split()[:3] == ["NAME", "STATE", "NODES"]
    assert line.split()[:2] == [name, "Running"]

    # Of these nodes, which run no programs, nobody can ask for logs.
    said = cptjob("logs", name).stdout.splitlines()
    assert {line.split()[0] for line in said} == {"c0", "w0"}
    assert all(" cannot be read: " in line and "no preferred addresses" in line for line in said)

    assert "will be suspended" in cptjob("suspend", name).stdout
    world.suspend(name)
    assert cptjob("suspend", name, "--wait").stdout.startswith(f"job {name} is suspended")
    assert cptjob("resume", name).stdout == f"job {name} goes on\n"
    world.prepare(name)
    world.run(name, world.job(name)["spec"]["trainer"].get("numNodes", 1))
    world.complete(name, REPORT)
    followed = cptjob("status", name, "--watch")
    assert followed.returncode == 0, followed.stderr
    assert followed.stdout.startswith(f"{name}: Complete\n")
    assert "step 30 of 100, loss 2.5000" in followed.stdout
    assert "step 20, pvc://results/job" in followed.stdout
    assert cptjob("cancel", name).stdout.startswith(f"job {name} is deleted; ")
    missing = cptjob("status", name)
    assert missing.returncode == MissingInputError.exit_code
    assert missing.stderr == f"error: there is no job {name} in namespace {world.namespace}\n"


def test_a_job_that_the_api_server_refuses_is_told_in_its_words(
    world: World, cptjob: Cptjob, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    text = TINY.read_text(encoding="utf-8")
    name = load_manifest(TINY).job.metadata.name
    file.write_text(text.replace(f"name: {name}", "name: " + "x" * 41, 1), encoding="utf-8")
    done = cptjob("submit", str(file))
    assert done.returncode == 78
    assert "at most 40 characters" in done.stderr


def test_a_job_that_is_refused_is_told_and_not_waited_for(
    world: World, cptjob: Cptjob, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    text = TINY.read_text(encoding="utf-8")
    file.write_text(text + "\n  scheduling: {pool: unknown}\n", encoding="utf-8")
    done = cptjob("submit", str(file), "--watch")
    assert done.returncode == 70
    assert "Pending\n  spec.scheduling.pool: there is no pool unknown" in done.stdout
    assert "Stalled" not in done.stderr


def test_kubectl_finds_the_commands_as_a_plugin(world: World) -> None:
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {
        "KUBECONFIG": str(world.plane.kubeconfig),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(world.plane.programs["kubectl"]), "cptjob", "status", "-n", world.namespace]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == f"there are no jobs in namespace {world.namespace}\n", done.stderr
