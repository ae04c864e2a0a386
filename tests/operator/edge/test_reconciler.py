"""A pass that cannot be done as usual: what is told, and that others go on."""

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web

from cptjob_api.job import CPTJob
from cptjob_operator.edge.api_errors import ApiError
from cptjob_operator.edge.cache import Cache
from cptjob_operator.edge.cluster import Cluster
from cptjob_operator.edge.events import Recorder
from cptjob_operator.edge.progress import Reports
from cptjob_operator.identity import JobKey
from cptjob_operator.metrics import Metrics
from cptjob_operator.observed import Observed
from cptjob_operator.reconciler import Plan, Reconciler
from cptjob_operator.settings import Settings
from cptjob_operator.wanted import Deletion, Event, Wanted
from job_cases import sound_job

Test = Callable[[Callable[[Any], Awaitable[None]]], None]
Document = dict[str, Any]
KEY = JobKey("team", "job")
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def sound_body(version: int = 1, **status: Any) -> Document:
    body = sound_job({"spec.output.storageUri": "pvc://results/runs"})
    about = {"name": "job", "namespace": "team", "uid": "uid", "generation": 1}
    body["metadata"] = about | {"resourceVersion": str(version)}
    return json.loads(json.dumps(body | {"status": status}))  # type: ignore[no-any-return]


class Bench:
    """A reconciler whose requests go to `server`, and what it has written there."""

    def __init__(self, server: Any, plan: Plan) -> None:
        self.patches: list[Document] = []
        self.code = 200
        self.answered: Document = {}
        self.told: list[str] = []
        self.seconds, self.busy = 0.0, False
        server.answer = self._answer
        self.leads = True
        self.api = server.api(may_write=lambda: self.leads)
        self.cache = Cache()
        recorder = Recorder(self.api, "test")
        recorder.tell = lambda key, uid, event: self.told.append(event.message)  # type: ignore[method-assign]
        self.metrics = Metrics()
        cluster = Cluster(
            *(self.api, self.cache, Reports(), recorder),
            busy=lambda: self.busy,
            clock=lambda: self.seconds,
        )
        self.reconciler = Reconciler(cluster, plan, Settings(), self.metrics, now=lambda: NOW)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "PATCH":
            self.patches.append(await request.json())
            return web.json_response(self.answered, status=self.code)
        return web.json_response(self.answered)

    def outcomes(self) -> set[str]:
        samples = next(iter(self.metrics.passes.collect())).samples
        return {each.labels["outcome"] for each in samples if each.name.endswith("_count")}


def never(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
    raise AssertionError("a job that cannot be read is not planned")


def test_a_job_that_cannot_be_read_is_told_so_once(with_server: Test) -> None:
    async def test(server: Any) -> None:
        bench = Bench(server, never)
        body = sound_body()
        body["spec"]["training"] = {"epoochs": 3}
        bench.cache.put_job(body)
        bench.answered = body
        assert await bench.reconciler.reconcile(KEY) is None
        (patch,) = bench.patches
        told = {each["type"]: each for each in patch["status"]["conditions"]}
        assert (told["Stalled"]["status"], told["Stalled"]["reason"]) == ("True", "InvalidSpec")
        assert told["Ready"]["status"] == "False"
        assert "epoochs" in told["Stalled"]["message"]
        assert patch["metadata"] == {"resourceVersion": "1", "uid": "uid"}
        body["metadata"]["resourceVersion"] = "2"
        body["status"] = patch["status"]
        bench.cache.put_job(body)
        await bench.reconciler.reconcile(KEY)
        assert len(bench.patches) == 1
        await bench.api.close()

    with_server(test)


def test_a_finished_job_that_cannot_be_read_keeps_its_end_and_goes_in_time(
    with_server: Test,
) -> None:
    async def test(server: Any) -> None:
        bench = Bench(server, never)
        body = sound_body(phase="Complete", completionTime="2026-01-31T11:59:00Z")
        body["spec"] |= {"unheardOf": 1, "ttlSecondsAfterFinished": 90}
        bench.cache.put_job(body)
        assert await bench.reconciler.reconcile(KEY) == 30.0
        assert server.requests == []
        body["metadata"]["resourceVersion"] = "2"
        body["spec"]["ttlSecondsAfterFinished"] = 60
        bench.cache.put_job(body)
        assert await bench.reconciler.reconcile(KEY) is None
        assert [method for method, _ in server.requests] == ["DELETE"]
        await bench.api.close()

    with_server(test)


def test_a_job_of_another_manager_is_left_alone_even_when_it_cannot_be_read(
    with_server: Test,
) -> None:
    async def test(server: Any) -> None:
        bench = Bench(server, never)
        body = sound_body()
        body["spec"] |= {"managedBy": "example.com/other", "unheardOf": 1}
        bench.cache.put_job(body)
        await bench.reconciler.reconcile(KEY)
        assert server.requests == []
        await bench.api.close()

    with_server(test)


def test_a_fault_of_the_plan_is_counted_and_backed_off_from(with_server: Test) -> None:
    def broken(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
        raise ZeroDivisionError

    async def test(server: Any) -> None:
        bench = Bench(server, broken)
        bench.cache.put_job(sound_body())
        with pytest.raises(ZeroDivisionError):
            await bench.reconciler.reconcile(KEY)
        assert bench.outcomes() == {"error"}
        assert server.requests == []
        await bench.api.close()

    with_server(test)


def test_what_a_late_lease_held_back_is_tried_again(with_server: Test) -> None:
    def start(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
        assert job.status is not None
        return Wanted(status=job.status.model_copy(update={"attempt": 1}))

    async def test(server: Any) -> None:
        bench = Bench(server, start)
        bench.leads = False
        bench.cache.put_job(sound_body())
        again = await bench.reconciler.reconcile(KEY)
        assert again is not None, "nothing else may ever happen to it"
        assert bench.outcomes() == {"not leader"}
        await bench.api.close()

    with_server(test)


def test_a_job_that_changed_meanwhile_is_read_again_and_looked_at_soon(with_server: Test) -> None:
    def start(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
        assert job.status is not None
        return Wanted(status=job.status.model_copy(update={"attempt": 1}))

    async def test(server: Any) -> None:
        bench = Bench(server, start)
        bench.cache.put_job(sound_body(1))
        bench.code, bench.answered = 409, sound_body(7)
        again = await bench.reconciler.reconcile(KEY)
        assert again is not None
        assert again < 0.1
        assert bench.cache.jobs[KEY].version == 7
        assert bench.outcomes() == {"stale"}
        await bench.api.close()

    with_server(test)


def test_only_what_differs_is_written_and_nothing_when_nothing_does(with_server: Test) -> None:
    def same(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
        assert job.status is not None
        return Wanted(status=job.status.model_copy(update={"attempt": 2}))

    async def test(server: Any) -> None:
        bench = Bench(server, same)
        known = {
            "observedGeneration": 1,
            "attempt": 1,
            "restarts": 0,
            "replicas": 0,
            "restartsCountTowardsMax": 0,
            "activeSeconds": 0,
            "nodeSeconds": 0,
            "gpuSeconds": 0,
            "lostGpuSeconds": 0,
            "conditions": [],
            "incarnations": [],
            "nodes": [],
            "excludedNodes": [],
        }
        bench.cache.put_job(sound_body(1, **known))
        bench.answered = sound_body(2, **known | {"attempt": 2})
        await bench.reconciler.reconcile(KEY)
        assert [each["status"] for each in bench.patches] == [{"attempt": 2}]
        assert await bench.reconciler.reconcile(KEY) is None
        assert len(bench.patches) == 1
        await bench.api.close()

    with_server(test)


def news(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
    assert job.status is not None
    status = job.status.model_copy(update={"replicas": 3})
    return Wanted(status=status, urgent=False, events=(Event("Normal", "Running", "they train"),))


def test_news_waits_for_more_and_is_told_when_it_is_written(with_server: Test) -> None:
    async def test(server: Any) -> None:
        bench = Bench(server, news)
        bench.cache.put_job(sound_body(1))
        again = await bench.reconciler.reconcile(KEY)
        assert again is not None
        assert 0.0 < again <= 1.0
        assert (bench.patches, bench.told) == ([], [])
        bench.seconds = again
        bench.answered = sound_body(2, replicas=3)
        await bench.reconciler.reconcile(KEY)
        assert [each["status"]["replicas"] for each in bench.patches] == [3]
        assert bench.told == ["they train"]
        await bench.api.close()

    with_server(test)


def test_news_waits_longer_while_other_jobs_wait_for_their_turn(with_server: Test) -> None:
    async def test(server: Any) -> None:
        bench = Bench(server, news)
        bench.busy = True
        bench.cache.put_job(sound_body(1))
        await bench.reconciler.reconcile(KEY)
        bench.seconds = 4.9
        await bench.reconciler.reconcile(KEY)
        assert bench.patches == []
        bench.busy = False
        bench.answered = sound_body(2, replicas=3)
        await bench.reconciler.reconcile(KEY)
        assert len(bench.patches) == 1
        await bench.api.close()

    with_server(test)


def test_what_was_written_is_told_and_counted_though_a_deletion_fails(with_server: Test) -> None:
    def restart(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
        assert job.status is not None
        gone = Deletion("Pod", "job-0-0", "pod-uid", "a worker failed")
        return Wanted(
            status=job.status.model_copy(update={"attempt": 1}),
            deletions=(gone,),
            events=(Event("Normal", "Restarting", "a worker failed"),),
            restarts=("Deleted",),
        )

    async def test(server: Any) -> None:
        bench = Bench(server, restart)
        bench.cache.put_job(sound_body(1))
        bench.answered = sound_body(2, attempt=1)

        async def without_deletions(request: web.Request) -> web.StreamResponse:
            if request.method == "DELETE":
                return web.json_response({"message": "not now"}, status=503)
            return await bench._answer(request)

        server.answer = without_deletions
        with pytest.raises(ApiError):
            await bench.reconciler.reconcile(KEY)
        assert bench.told == ["a worker failed"]
        assert (
            bench.metrics.registry.get_sample_value("cptjob_restarts_total", {"cause": "Deleted"})
            == 1
        )
        await bench.api.close()

    with_server(test)
