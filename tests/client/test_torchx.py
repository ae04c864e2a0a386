"""torchx's view of a job: what is taken, how it stands, and which lines are its pods'."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torchx.runner import Runner
from torchx.schedulers import (
    DEFAULT_SCHEDULER_MODULES,
    get_default_scheduler_name,
    get_scheduler_factories,
)
from torchx.schedulers.api import Stream
from torchx.specs import AppDef, AppState, Role
from torchx.specs.finder import get_components

from cptjob import jobs, logs, torchx_scheduler
from cptjob.logs import LogLine
from cptjob.torchx_component import train
from cptjob.torchx_scheduler import CPTJobScheduler, create_scheduler, state
from cptjob_api.job import CPTJob
from cptjob_trainer.errors import UsageError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "deploy" / "examples" / "tiny.yaml"


@pytest.fixture(name="scheduler")
def make_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CPTJobScheduler:
    """One whose configuration file says nothing."""
    file = tmp_path / ".torchxconfig"
    file.touch()
    monkeypatch.setenv("TORCHXCONFIG", str(file))
    return create_scheduler("test", any_option="is passed over")


def job(**status: Any) -> CPTJob:
    """A job on two nodes with that status; without any, when nobody has seen it yet."""
    document = jobs.read(TINY)[1].manifest() | ({"status": status} if status else {})
    document["metadata"] |= {"generation": 1}  # type: ignore[operator]
    document["spec"]["trainer"]["numNodes"] = 2  # type: ignore[index]
    return CPTJob.from_json(json.dumps(document))


def condition(kind: str) -> dict[str, Any]:
    about = {"lastTransitionTime": "2030-01-01T00:00:00Z", "reason": kind, "message": "so it is"}
    return {"type": kind, "status": "True", **about}


# --- what is taken ---


def test_the_request_is_the_manifest_with_what_was_given(scheduler: CPTJobScheduler) -> None:
    app = train(str(TINY), name="other", nodes=3)
    request = scheduler.submit_dryrun(app, {"namespace": "team"}).request
    made = request.job.manifest()
    assert made["metadata"] == {"name": "other", "namespace": "team"}
    assert made["spec"]["trainer"]["numNodes"] == 3
    assert request.place.namespace == "team"
    same = scheduler.submit_dryrun(train(str(TINY)), {}).request.job
    assert same.manifest()["spec"] == jobs.read(TINY)[1].manifest()["spec"]


def test_a_broken_manifest_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(TINY.read_text().replace("epochs:", "epoch:"))
    with pytest.raises(SystemExit) as ended:
        train(str(file))
    assert re.fullmatch(rf"error: {file}:\d+: spec\.training\.epoch: .*epochs.*", ended.value.code)


def test_what_is_given_is_checked_as_the_manifest_is() -> None:
    with pytest.raises(SystemExit, match=r"(?s)numNodes: must be at lea.*metadata\.name: must be"):
        train(str(TINY), name="Other_Name", nodes=-1)


def test_another_component_is_refused(scheduler: CPTJobScheduler) -> None:
    app = AppDef("echo", [Role("echo", image="", entrypoint="echo")])
    runner = Runner("test", {"cptjob": lambda session_name, **_: scheduler})
    with pytest.raises(SystemExit, match=r"echo has no manifest.* cptjob\.train --manifest FILE"):
        runner.run(app, "cptjob")


def test_a_manifest_that_somebody_else_put_there_is_checked(scheduler: CPTJobScheduler) -> None:
    app = train(str(TINY))
    app.metadata["cptjob.manifest"] = app.metadata["cptjob.manifest"].replace("epochs", "epoch")
    with pytest.raises(SystemExit, match=r"cptjob\.manifest:\d+: spec\.training\.epoch"):
        scheduler.submit_dryrun(app, {})


def test_two_namespaces_are_refused(scheduler: CPTJobScheduler, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(TINY.read_text().replace("name: tiny", "name: tiny\n  namespace: a", 1))
    with pytest.raises(SystemExit, match="the manifest is for namespace a, and not for b"):
        scheduler.submit_dryrun(train(str(file)), {"namespace": "b"})


def test_without_a_cluster_a_line_says_so(
    scheduler: CPTJobScheduler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"^no cluster is configured"):
        scheduler.describe("team:tiny")


# --- how it stands ---


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((), AppState.PENDING),
        (("Reconciling",), AppState.PENDING),
        (("Stalled",), AppState.PENDING),
        (("Suspended", "Ready"), AppState.PENDING),
        (("Running", "Ready"), AppState.RUNNING),
        (("Complete", "Ready"), AppState.SUCCEEDED),
        (("Failed", "Stalled"), AppState.FAILED),
    ],
)
def test_conditions_decide_the_state(kinds: tuple[str, ...], expected: AppState) -> None:
    found = job(observedGeneration=1, conditions=[condition(kind) for kind in kinds])
    assert state(found) is expected


def test_a_job_that_no_operator_has_seen_is_submitted_and_one_that_goes_is_cancelled() -> None:
    assert state(job()) is AppState.SUBMITTED
    running = job(observedGeneration=1, conditions=[condition("Running")])
    gone = {"deletion_timestamp": datetime.fromisoformat("2030-01-01T00:00:00Z")}
    going = running.metadata.model_copy(update=gone)
    assert state(running.model_copy(update={"metadata": going})) is AppState.CANCELLED


class StandinClient:
    """A cluster with one job, whose pods have said three lines a second apart."""

    namespace = "team"
    asked: dict[str, Any]

    def __init__(self, namespace: str | None, **place: Any) -> None:
        type(self).asked = {"namespace": namespace, **place}

    def __enter__(self) -> "StandinClient":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def create(self, made: CPTJob) -> CPTJob:
        return made

    def get(self, _name: str) -> CPTJob:
        return job(
            observedGeneration=1,
            restarts=2,
            phase="Running",
            conditions=[condition("Running"), condition("Ready")],
            resolved={"numProcPerNode": 2},
            nodes=[{"name": "b", "ranks": [2, 3]}, {"name": "a", "ranks": [0, 1]}],
        )

    def logs(self, name: str, *, follow: bool, pod: str) -> Iterator[LogLine]:
        self.asked.update(name=name, follow=follow, pod=pod)
        for second in range(3):
            yield LogLine(pod, f"2030-01-01T00:00:0{second}.123456789Z", f"step {second}")


@pytest.fixture(name="cluster")
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandinClient]:
    monkeypatch.setattr(torchx_scheduler, "Client", StandinClient)
    return StandinClient


def test_a_description_has_the_workers_by_the_rank_of_their_node(
    scheduler: CPTJobScheduler, cluster: type[StandinClient]
) -> None:
    found = scheduler.describe("team:tiny")
    assert found is not None
    assert (found.state, found.num_restarts) == (AppState.RUNNING, 2)
    assert found.msg.startswith("tiny: Running\n  so it is\n")
    assert [(role.name, role.num_replicas) for role in found.roles] == [
        ("coordinator", 1),
        ("worker", 2),
    ]
    (workers,) = found.roles_statuses
    assert [(each.id, each.hostname) for each in workers.replicas] == [(0, "a"), (1, "b")]
    assert cluster.asked == {"namespace": "team", "context": None, "kubeconfig": None}


def test_the_place_is_that_of_the_configuration_file(
    scheduler: CPTJobScheduler, cluster: type[StandinClient], tmp_path: Path
) -> None:
    (tmp_path / ".torchxconfig").write_text("[cptjob]\nnamespace = mine\ncontext = far\n")
    scheduler.describe("tiny")
    assert cluster.asked == {"namespace": "mine", "context": "far", "kubeconfig": None}
    scheduler.describe("team:tiny")
    assert cluster.asked == {"namespace": "team", "context": "far", "kubeconfig": None}


def test_a_job_is_looked_for_where_it_was_made(
    scheduler: CPTJobScheduler, cluster: type[StandinClient]
) -> None:
    app_id = scheduler.submit(train(str(TINY)), {"context": "far"})
    assert app_id == "team:tiny"
    cluster.asked.clear()
    scheduler.describe(app_id)
    assert cluster.asked == {"namespace": "team", "context": "far", "kubeconfig": None}


# --- logs ---


def test_lines_are_chosen_by_pod_words_and_time(
    scheduler: CPTJobScheduler, cluster: type[StandinClient]
) -> None:
    assert list(scheduler.log_iter("team:tiny", "worker", 1)) == [
        "step 0\n",
        "step 1\n",
        "step 2\n",
    ]
    assert cluster.asked["pod"] == "w1"
    assert not cluster.asked["follow"]
    matching = scheduler.log_iter("team:tiny", "coordinator", regex="[02]$", should_tail=True)
    assert list(matching) == ["step 0\n", "step 2\n"]
    assert (cluster.asked["pod"], cluster.asked["follow"]) == ("c0", True)
    since, until = map(
        datetime.fromisoformat, ("2030-01-01T01:00:01+01:00", "2030-01-01T00:00:02Z")
    )
    between = scheduler.log_iter("team:tiny", "worker", since=since, until=until)
    assert list(between) == ["step 1\n"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"role_name": "trainer"}, "there is no role trainer; roles: coordinator, worker"),
        ({"streams": Stream.STDERR}, "a pod's log is one stream: leave out --streams"),
        ({"regex": "("}, r"\( is no regular expression: "),
    ],
)
def test_what_logs_cannot_be_asked_is_told(
    scheduler: CPTJobScheduler, cluster: type[StandinClient], wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(SystemExit, match=f"^{words}"):
        list(scheduler.log_iter("team:tiny", **{"role_name": "worker", **wrong}))


def test_only_that_pods_are_asked_for() -> None:
    selectors = []

    class Cluster:
        namespace = "team"

        async def get(self, _name: str) -> CPTJob:
            return job()

        async def call(self, request: Callable[[Any], Awaitable[Any]]) -> Any:
            return await request(self)

        async def list_namespaced_pod(self, _namespace: str, **given: Any) -> Any:
            selectors.append(given["label_selector"])
            return SimpleNamespace(items=[])

    async def read(pod: str) -> list[LogLine]:
        return [line async for line in logs.read(Cluster(), "tiny", pod=pod)]

    for pod in ("w12", "c0"):
        assert asyncio.run(read(pod)) == []
    group, of_job = "training.cptjob.io", "training.cptjob.io/job-name=tiny"
    assert selectors == [
        f"{of_job},{group}/role=worker,{group}/index=12",
        f"{of_job},{group}/role=coordinator,{group}/index=0",
    ]
    with pytest.raises(UsageError, match="there is no pod worker1: w1 is worker 1"):
        asyncio.run(read("worker1"))


# --- beside torchx's own ---


def test_torchx_keeps_its_schedulers_and_components() -> None:
    left_out = {"aws_batch", "aws_sagemaker"}  # see pyproject.toml
    assert set(get_scheduler_factories()) == {"cptjob", *DEFAULT_SCHEDULER_MODULES} - left_out
    assert get_default_scheduler_name() == "cptjob"
    assert type(get_scheduler_factories()["local_cwd"]("test")).__name__ == "LocalScheduler"
    assert {"cptjob.train", "utils.echo", "dist.ddp"} <= set(get_components())
    assert [name for name in get_components() if name.startswith("cptjob.")] == ["cptjob.train"]
