"""What a pass asks of the API server, and what it holds back."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from cptjob_api.job import CPTJob
from cptjob_operator.edge.cache import Cache
from cptjob_operator.edge.cluster import CHILDREN_SECONDS, REFUSED_SECONDS, Cluster
from cptjob_operator.edge.events import Recorder
from cptjob_operator.edge.progress import Reports
from cptjob_operator.identity import JobId, JobKey, job_labels, owner
from cptjob_operator.settings import parse
from cptjob_operator.wanted import Wanted
from job_cases import sound_job

GPU, POOL = "nvidia.com/gpu", "training.cptjob.io/pool"
UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"
Test = Callable[[Callable[[Any], Awaitable[None]]], None]


def _job() -> CPTJob:
    document = sound_job({"spec.output.storageUri": "pvc://results/runs"})
    document["metadata"] = {"name": "job", "namespace": "team", "uid": "uid"}
    return CPTJob.from_json(json.dumps(document))


def _manifest(kind: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": "job-uid"}}


def _cluster(server: Any) -> Cluster:
    api = server.api()
    return Cluster(api, Cache(), Reports(), Recorder(api, "test"), clock=lambda: 0.0)


def test_pods_wait_for_a_child_that_is_refused_and_not_for_one_that_is_there(
    with_server: Test,
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/services"):
            return web.json_response({"message": "the webhook is down"}, status=403)
        return web.json_response(await request.json())

    async def test(server: Any) -> None:
        server.answer = answer
        cluster = _cluster(server)
        service, pod = _manifest("Service"), _manifest("Pod")
        await cluster.apply(_job(), Wanted(objects=(service, pod)))
        assert server.requests == [("POST", "/api/v1/namespaces/team/services")]
        # Another operator made it, or a request of which no answer came.
        await cluster.apply(_job(), Wanted(objects=(pod,)))
        assert server.requests[1:] == [("POST", "/api/v1/namespaces/team/pods")]
        await cluster._api.close()

    with_server(test)


def test_what_pods_can_do_without_comes_last_and_its_refusal_is_told_and_holds_nothing_up(
    with_server: Test,
) -> None:
    refused = [True]

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/deployments") and refused[0]:
            return web.json_response({"message": "exceeded quota"}, status=403)
        return web.json_response(await request.json())

    async def test(server: Any) -> None:
        server.answer = answer
        clock, api = [0.0], server.api()
        recorder = Recorder(api, "test")
        cluster = Cluster(api, Cache(), Reports(), recorder, clock=lambda: clock[0])
        pod = _manifest("Pod")
        deployment = {"kind": "Deployment", "metadata": {"name": "job-tensorboard"}}
        job = _job()

        async def asked(wanted: Wanted) -> list[str]:
            server.requests.clear()
            await cluster.apply(job, wanted)
            return [path.rpartition("/")[2] for _, path in server.requests]

        both = Wanted(objects=(pod,), extras=(deployment,))
        assert await asked(both) == ["pods", "deployments"]
        assert await asked(both) == ["pods"], "not again at once"
        told = recorder._queue.get_nowait()
        assert told["note"] == (
            "Deployment job-tensorboard refused: exceeded quota; the job goes on without it"
        )
        clock[0], refused[0] = REFUSED_SECONDS, False
        assert await asked(Wanted(extras=(deployment,))) == ["deployments"]
        assert recorder._queue.empty()
        await api.close()

    with_server(test)


def _replacement(body: dict[str, Any], attempt: int) -> dict[str, Any]:
    """A manifest of the job's worker, in that attempt."""
    about = {"name": f"worker-{attempt}", "labels": dict(body["metadata"]["labels"])}
    about["labels"]["training.cptjob.io/attempt"] = str(attempt)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about}


def _service() -> dict[str, Any]:
    about = {"name": "job-uid", "namespace": "team", "uid": "service", "resourceVersion": "1"}
    about["labels"] = job_labels("job", "uid")  # type: ignore[assignment]
    about["ownerReferences"] = [owner("job", "uid")]  # type: ignore[assignment]
    return {"apiVersion": "v1", "kind": "Service", "metadata": about}


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0.0), (0, CHILDREN_SECONDS)])
def test_pods_are_not_made_beside_a_child_that_somebody_has_deleted(
    with_server: Test, pod_body: Callable[..., dict[str, Any]], attempt: int, seconds: float
) -> None:
    there = [True]

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == "POST" and request.path.endswith("/services"):
            return web.json_response(_service())
        if request.method == "GET" and there[0]:
            return web.json_response(_service())
        if request.method == "GET":
            return web.json_response({"message": "no such thing"}, status=404)
        return web.json_response(await request.json())

    async def test(server: Any) -> None:
        server.answer = answer
        clock, api = [0.0], server.api()
        told: list[JobKey] = []
        known = Cache(lambda key, seconds: told.append(key))
        cluster = Cluster(api, known, Reports(), Recorder(api, "test"), clock=lambda: clock[0])
        pod = _replacement(pod_body(), attempt)
        await cluster.apply(_job(), Wanted(objects=(_service(), _replacement(pod_body(), 0))))
        posts = [path for verb, path in server.requests if verb == "POST"]
        assert [path.rpartition("/")[2] for path in posts] == ["services", "pods"]
        assert len(server.requests) == 2, "a first pod costs no look at what was just made"
        there[0], clock[0] = False, seconds
        await cluster.apply(_job(), Wanted(objects=(pod,)))
        assert [verb for verb, _ in server.requests[2:]] == ["GET"]
        assert known.children_of(JobId("team", "uid")) == ()
        assert told == [JobKey("team", "job")], "the next pass makes it anew"
        there[0] = True
        await cluster.apply(_job(), Wanted(objects=(_service(), pod)))
        assert server.requests[-1] == ("POST", "/api/v1/namespaces/team/pods")
        await api.close()

    with_server(test)


def _manual_job(nodes: list[str], priority: str | None = None, uid: str = "uid") -> dict[str, Any]:
    changes = {"spec.output.storageUri": "pvc://results/runs", "spec.trainer.numNodes": len(nodes)}
    document = sound_job(changes)
    document["spec"]["scheduling"] = {"mode": "Manual", "nodeNames": nodes, "pool": "a100"}
    if priority:
        document["spec"]["scheduling"]["priorityClassName"] = priority
    document["metadata"] = {
        "name": "job",
        "namespace": "team",
        "uid": uid,
        "generation": 1,
        "resourceVersion": "1",
    }
    return document


def _with_gpus(pod: dict[str, Any], gpus: int, priority: str = "") -> dict[str, Any]:
    limits = {"nvidia.com/gpu": str(gpus)}
    pod["spec"] = {"containers": [{"name": "main", "resources": {"limits": limits}}]}
    return pod | {"spec": pod["spec"] | {"priorityClassName": priority}}


def _used(server: Any, job: dict[str, Any]) -> Awaitable[Any]:
    async def observe() -> Any:
        cluster = _cluster(server)
        cluster._known.put_job(job)
        looked = await cluster.observe(JobKey("team", "job"))
        await cluster._api.close()
        assert looked is not None
        return looked[1].used_gpus

    return observe()


def test_gpus_in_use_are_those_of_strangers_and_of_other_jobs_and_not_its_own(
    with_server: Test, pod_body: Any
) -> None:
    stranger = _with_gpus({"metadata": {"name": "notebook"}, "status": {"phase": "Running"}}, 1)
    worker, ended = _with_gpus(pod_body(1), 2, "high"), _with_gpus(pod_body(2, 1, "Succeeded"), 8)

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"items": [stranger, worker, ended]})

    async def test(server: Any) -> None:
        server.answer = answer
        assert await _used(server, _manual_job(["node-1"])) == {"node-1": 3}
        assert await _used(server, _manual_job(["node-1"], uid=UID)) == {"node-1": 1}
        assert await _used(server, _manual_job(["node-1"], "high")) == {"node-1": 3}
        # Whom it may drive away is for the scheduler to judge.
        assert await _used(server, _manual_job(["node-1"], "urgent")) == {"node-1": 1}

    with_server(test)


def test_named_nodes_are_read_some_at_once_and_none_when_that_is_forbidden(
    with_server: Test,
) -> None:
    names = [f"node-{index}" for index in range(20)]
    now, most = 0, 0

    async def slow(request: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.02)
        now -= 1
        return web.json_response({"items": []})

    async def forbid(request: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "no"}, status=403)

    async def test(server: Any) -> None:
        server.answer = slow
        assert await _used(server, _manual_job(names)) == dict.fromkeys(names, 0)
        assert 2 <= most <= 8
        server.answer = forbid
        server.requests.clear()
        assert await _used(server, _manual_job(names)) is None
        assert len(server.requests) <= 8

    with_server(test)


def test_in_a_pool_gpus_are_counted_once_the_scheduler_finds_no_node(
    with_server: Test, pod_body: Any, accepted: Any
) -> None:
    """Of the nodes that would do: nobody reads the pods of others."""
    asked = {"spec.trainer.resourcesPerNode": {"limits": {GPU: 8}}}
    profile = accepted(asked, parse("pools: {a100: {}}")).profile.model_dump_json()
    ready = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {GPU: "8"}}

    def node(name: str, pool: str) -> dict[str, Any]:
        about = {"name": name, "labels": {POOL: pool}, "resourceVersion": "1"}
        return {"metadata": about, "spec": {}, "status": ready}

    async def answer(request: web.Request) -> web.StreamResponse:
        stranger = _with_gpus({"metadata": {"name": "notebook"}, "status": {}}, 3)
        return web.json_response({"items": [stranger]})

    async def used(server: Any, pod: dict[str, Any]) -> Any:
        cluster = _cluster(server)
        job = _manual_job(["any"], uid=UID)
        job["spec"]["scheduling"] = {"pool": "a100"}
        cluster._known.put_job(job)
        cluster._known.put_node(node("one", "a100"))
        cluster._known.put_node(node("two", "a100"))
        cluster._known.put_node(node("other", "t4"))
        cluster._known.put_pod(pod)
        entry = cluster._known.jobs[JobKey("team", "job")]
        cluster._known._profiles[entry.id] = profile
        looked = await cluster.observe(JobKey("team", "job"))
        await cluster._api.close()
        assert looked is not None
        return looked[1].used_gpus

    async def test(server: Any) -> None:
        server.answer = answer
        pending = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        waits = pod_body(1, 0, "Pending", conditions=[pending | {"message": "no node"}])
        assert await used(server, waits) == {"one": 3, "two": 3}
        listed = server.requests.count(("GET", "/api/v1/pods"))
        assert await used(server, pod_body(1, 0, "Pending")) is None
        assert listed == server.requests.count(("GET", "/api/v1/pods")) == 2

    with_server(test)
