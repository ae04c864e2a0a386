"""Any job that the API server takes: the operator reads it, decides, and makes what is taken too."""

import itertools
import json
import secrets
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.client import HTTPSConnection
from typing import Any

import pytest
from any_job import UID, documents
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from running import RunningOperator
from world import World

from cptjob_api.job import CPTJob
from cptjob_operator.identity import PodId, Role
from cptjob_operator.observed import Observed, Pod
from cptjob_operator.plan.accept import accept
from cptjob_operator.plan.rules import plan
from cptjob_operator.plan.waiting import gist
from cptjob_operator.settings import Settings
from job_cases import sound_job
from testplane.plane import ControlPlane

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
BAD_JOBS = 50
Start = Callable[..., RunningOperator]


PATHS = {
    "CPTJob": "/apis/training.cptjob.io/v1alpha1/namespaces/{}/cptjobs",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Service": "/api/v1/namespaces/{}/services",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Pod": "/api/v1/namespaces/{}/pods",
}


class Judge:
    """The API server, asked over one connection what it would say to an object."""

    def __init__(self, plane: ControlPlane) -> None:
        host = plane.url.removeprefix("https://")
        context = ssl.create_default_context(cafile=str(plane.ca))
        self._connection = HTTPSConnection(host, context=context, timeout=60)
        self._headers = {
            "Authorization": f"Bearer {plane.token}",
            "Content-Type": "application/json",
        }

    def ask(self, manifest: dict[str, Any], *, keep: bool = False) -> tuple[int, dict[str, Any]]:
        """Status code and answer to a creation, strictly read, which is not kept unless told."""
        path = PATHS[manifest["kind"]].format(manifest["metadata"]["namespace"])
        query = "?fieldValidation=Strict" + ("" if keep else "&dryRun=All")
        self._connection.request("POST", path + query, json.dumps(manifest), self._headers)
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def takes(self, manifest: dict[str, Any]) -> None:
        code, said = self.ask(manifest)
        # An account or a class that does not exist is forbidden; it may yet be made.
        waits = code == 403 and any(
            words in said["message"] for words in ("not found", "was found")
        )
        assert code == 201 or waits, f"{manifest['kind']}: {said['message']}"


@pytest.fixture(scope="module", name="judge")
def make_judge(plane: ControlPlane) -> Judge:
    return Judge(plane)


def follow(created: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """What becomes of a job until its workers are made: the last reason, and all manifests."""
    settings = Settings()
    job = CPTJob.from_json(json.dumps(created))
    answer = accept(job, settings)
    made: list[dict[str, Any]] = []
    observed, reason = Observed(), "left alone"
    for _ in range(3):
        wanted = plan(job, observed, settings, NOW)
        made += [each for each in wanted.objects if each not in made]
        if wanted.status is None:
            break
        ready = wanted.status.condition("Ready")
        reason = ready.reason if ready else reason
        # As the API server keeps it, with a coordinator that is done with preparing.
        document = created | {"status": json.loads(wanted.status.model_dump_json())}
        job = CPTJob.from_json(json.dumps(document))
        if not hasattr(answer, "profile"):
            continue
        observed = Observed(
            pods=(_ready(PodId(UID, 0, Role.COORDINATOR, 0, 0)),),
            profile=answer.profile,
            config=answer.config,
        )
    return reason, made


def _ready(identity: PodId) -> Pod:
    return Pod(
        id=identity,
        namespace="team",
        name="coordinator",
        uid="coordinator",
        version=1,
        phase="Running",
        created=NOW,
        ready=True,
        node="node",
        address="10.0.0.1",
        deleting=None,
        gated=False,
        unschedulable=None,
        waiting=None,
        ended=None,
        disruption=None,
        reason="",
        message="",
        image_id=None,
        owner_uid=identity.uid,
    )


def _follow_any(judge: Judge, namespace: str, examples: int, wanted: int) -> Counter[str]:
    """Generates jobs until `wanted` are accepted by the API server. Counts what became of them."""
    found: Counter[str] = Counter()

    @hypothesis_settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(documents())
    def one(document: dict[str, Any]) -> None:
        document["metadata"] |= {"namespace": namespace}
        code, created = judge.ask(document)
        assert code in (201, 422, 400), created
        if code != 201:
            found["refused by the API server"] += 1
            return
        created["metadata"]["uid"] = UID
        reason, made = follow(created)
        found[reason] += 1
        found["accepted"] += 1
        shown = Counter[str]()
        for manifest in made:
            manifest["metadata"]["namespace"] = namespace
            kind = manifest["kind"]
            shown[kind] += 1
            if kind != "Pod" or shown[kind] <= 2:  # all workers are alike
                judge.takes(manifest)
        found["objects"] += sum(shown.values())

    while found["accepted"] < wanted:
        one()
    return found


def test_any_job_that_the_api_server_takes_is_decided_on_and_so_are_its_objects(
    judge: Judge, namespace: str
) -> None:
    found = _follow_any(judge, namespace, 100, 250)
    assert found["objects"] > 250, found
    assert {"Starting", "NotSupported"} <= set(found), found


@pytest.mark.soak
def test_two_thousand_jobs_that_the_api_server_takes_are_decided_on(
    judge: Judge, namespace: str
) -> None:
    found = _follow_any(judge, namespace, 500, 2000)
    assert found["objects"] > 2000, found


# --- with the operator itself ---

#: What the schema takes and this cluster cannot serve.
UNSERVED: tuple[dict[str, Any], ...] = (
    {"spec.model.storageUri": "pvc://nowhere/m"},
    {"spec.trainer.serviceAccountName": "nobody"},
    {"spec.scheduling": {"priorityClassName": "none"}},
    {"spec.scheduling": {"pool": "nowhere"}},
    {"spec.scheduling": {"mode": "Manual", "nodeNames": ["nowhere"]}},
    {"spec.scheduling": {"instanceType": "none", "gpuTypes": ["none"]}},
    {"spec.trainer.resourcesPerNode": {"limits": {"no.such/device": 1, "memory": "1Ei"}}},
    {"spec.trainer.resourcesPerNode": {"limits": {"cpu": "-1"}}},
    {"spec.trainer.image": "not an image"},
    {"spec.trainer.numNodes": 500, "spec.model.storageUri": "pvc://nowhere/m"},
    {"spec.task": "MaskedLM"},
    {"spec.trainer.secretRefs": [{"name": "none"}]},
)


def test_jobs_that_cannot_be_served_neither_end_the_operator_nor_hold_up_others(
    world: World, start: Start, judge: Judge
) -> None:
    names = [f"bad-{number}" for number in range(BAD_JOBS)]
    for name, document in zip(names, _bad(judge, world), strict=False):
        document["metadata"] |= {"name": name}
        assert judge.ask(document, keep=True)[0] == 201
    operator = start().wait_leading()
    world.create("good", 2)
    world.prepare("good")
    world.run("good", 2)
    world.wait(lambda: all(_answered(world, name) for name in names), "an answer to each")
    for name, changes in zip(names, UNSERVED, strict=False):
        world.wait(lambda name=name: _told(world, name), f"an Event on the job with {changes}")
    assert "a fault of the operator" not in operator.log.read_text()
    assert not operator.died
    assert world.status("good")["phase"] == "Running"
    assert sum(world.find(name) is not None for name in names) > BAD_JOBS // 2


def _bad(judge: Judge, world: World) -> Iterator[dict[str, Any]]:
    """Jobs that the API server takes: those above, then any."""
    for changes in UNSERVED:
        document = sound_job({"spec.output.storageUri": "pvc://results/runs", **changes})
        document["metadata"] |= {"namespace": world.namespace}
        yield document
    drawn: list[dict[str, Any]] = []

    @hypothesis_settings(
        max_examples=BAD_JOBS * 2,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(documents())
    def draw(document: dict[str, Any]) -> None:
        document["metadata"] |= {"namespace": world.namespace, "name": f"a{secrets.token_hex(4)}"}
        document["metadata"].pop("uid", None)
        if judge.ask(document)[0] == 201:
            drawn.append(document)

    while len(drawn) < BAD_JOBS:
        draw()
    yield from itertools.islice(drawn, BAD_JOBS)


def _told(world: World, name: str) -> bool:
    """An Event says what the job says, whatever the scheduler counts by now."""
    ready = world.condition(name, "Ready")
    said = ready["reason"], gist(ready["message"])
    return said in [(each.reason, gist(each.message)) for each in world.events(name)]


def _answered(world: World, name: str) -> bool:
    """The job says how it stands, or is another controller's, or has ended and gone."""
    job = world.find(name)
    if job is None:
        return True
    status, manager = job["status"], job["spec"].get("managedBy")
    if manager not in (None, "cptjob-operator"):
        return not status.get("conditions")
    about = [each for each in status.get("conditions", []) if each["type"] == "Ready"]
    return status["observedGeneration"] == job["metadata"]["generation"] and bool(
        about and about[0]["message"]
    )
