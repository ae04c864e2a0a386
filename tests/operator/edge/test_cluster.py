"""What a pass asks of the API server, and what it holds back."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from cptjob_api.job import CPTJob
from cptjob_operator.edge.cache import Cache
from cptjob_operator.edge.cluster import Cluster
from cptjob_operator.edge.events import Recorder
from cptjob_operator.edge.progress import Reports
from cptjob_operator.wanted import Wanted
from job_cases import sound_job

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
