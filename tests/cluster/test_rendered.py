"""What is made for a job, in the hands of the real API server: each object as a dry run."""

import json
from typing import Any

import pytest
from any_job import jobs
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from kubernetes import client

from cptjob_api.job import CPTJob
from cptjob_operator.identity import PodId, Role
from cptjob_operator.objects import children, pods, tensorboard
from cptjob_operator.plan.accept import Accepted, Refused, accept
from cptjob_operator.settings import Network, Settings, parse
from job_cases import sound_job
from testplane.plane import ControlPlane

UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"
ENFORCE = "pod-security.kubernetes.io/enforce"
PATHS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Service": "/api/v1/namespaces/{}/services",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Pod": "/api/v1/namespaces/{}/pods",
}
PLATFORM = """
pools:
  restricted:
    labels: {tier: gold}
    runtimeClassName: nvidia
    tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}]
    extraResources: {rdma/hca: 8}
  baseline: {fsGroup: null, security: {profile: baseline, namespaces: [baseline]}}
"""
# Each uses fields that the others leave out.
JOBS: dict[str, dict[str, Any]] = {
    "small": {},
    "everything": {
        "spec.tracking.tensorBoard": True,
        "spec.trainer": {
            "numNodes": 3,
            "resourcesPerNode": {
                "limits": {"nvidia.com/gpu": 8, "memory": "9Gi", "hugepages-2Mi": "4Mi"},
                "requests": {"cpu": "1500m"},
            },
            "secretRefs": [{"name": "hub"}],
            "imagePullSecrets": [{"name": "registry"}],
            "env": [{"name": "A", "value": "é$(B)"}],
        },
        "spec.scheduling": {
            "gpuTypes": ["H100", "H200"],
            "instanceType": "big",
            "priorityClassName": "urgent",
            "schedulerName": "other",
        },
        "metadata.labels": {"kueue.x-k8s.io/queue-name": "night"},
        "metadata.annotations": {"training.cptjob.io/pod-group": "gang"},
    },
    "by hand": {
        "spec.scheduling": {"mode": "Manual", "nodeNames": ["a.b", "c"], "gpuTypes": ["a", "b"]},
        "spec.trainer.numNodes": 2,
    },
}


@pytest.fixture(scope="module", name="api_server", autouse=True)
def prepare(plane: ControlPlane, api: client.ApiClient) -> client.ApiClient:
    """Namespaces by the standard that they enforce, and the classes that pods ask for."""
    for standard in ("restricted", "baseline"):
        labels = {ENFORCE: standard, f"{ENFORCE}-version": "latest"}
        namespace = {"metadata": {"name": standard, "labels": labels}}
        client.CoreV1Api(api).create_namespace(namespace)
        plane.wait(
            lambda name=standard: (
                plane.get(f"/api/v1/namespaces/{name}/serviceaccounts/default")[0] == 200
            ),
            "the default service account",
        )
    client.SchedulingV1Api(api).create_priority_class(
        {"metadata": {"name": "urgent"}, "value": 1000}
    )
    client.NodeV1Api(api).create_runtime_class(
        {"metadata": {"name": "nvidia"}, "handler": "nvidia"}
    )
    return api


def offer(api: client.ApiClient, manifest: dict[str, Any]) -> tuple[int, str]:
    """What the API server says to an object, which it does not keep: status and message."""
    path = PATHS[manifest["kind"]].format(manifest["metadata"]["namespace"])
    try:
        api.call_api(
            path,
            "POST",
            query_params=[("dryRun", "All"), ("fieldValidation", "Strict")],
            header_params={"Content-Type": "application/json"},
            body=manifest,
            auth_settings=["BearerToken"],
            response_types_map={},
        )
    except client.ApiException as error:
        return error.status, json.loads(error.body)["message"]
    return 201, ""


def made_for(job: CPTJob, answer: Accepted) -> list[dict[str, Any]]:
    last = job.spec.trainer.num_nodes - 1
    return [
        *children.missing(job, answer.profile, answer.config, Network(), {}),
        *tensorboard.missing(job, answer.profile, {}),
        pods.coordinator(job, answer.profile, PodId(UID, 0, Role.COORDINATOR, 0, 0)),
        pods.worker(job, answer.profile, PodId(UID, 3, Role.WORKER, last, 2), {"x"}, {"y"}),
    ]


@pytest.mark.parametrize("standard", ["restricted", "baseline"])
@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_what_is_made_is_taken_under_the_pods_standard(
    changes: dict[str, Any], standard: str, api: client.ApiClient
) -> None:
    document = sound_job({"spec.output.storageUri": "pvc://results"} | changes)
    document["metadata"] |= {"namespace": standard, "uid": UID}
    document["spec"].setdefault("scheduling", {})["pool"] = standard
    job = CPTJob.from_json(json.dumps(document))
    answer = accept(job, parse(PLATFORM))
    assert isinstance(answer, Accepted), answer
    for each in made_for(job, answer):
        assert offer(api, each) == (201, ""), each["kind"]


def test_a_pod_of_the_looser_standard_does_not_pass_the_stricter(api: client.ApiClient) -> None:
    document = sound_job({"spec.output.storageUri": "pvc://results"})
    document["metadata"] |= {"namespace": "baseline", "uid": UID}
    document["spec"]["scheduling"] = {"pool": "baseline"}
    job = CPTJob.from_json(json.dumps(document))
    answer = accept(job, parse(PLATFORM))
    assert isinstance(answer, Accepted)
    pod = made_for(job, answer)[-1]
    pod["metadata"]["namespace"] = "restricted"
    status, message = offer(api, pod)
    assert status == 403
    assert "violates PodSecurity" in message


@hypothesis_settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(jobs())
def test_of_any_job_that_is_accepted_the_api_server_takes_every_object(
    api: client.ApiClient, job: CPTJob
) -> None:
    job = job.model_copy(
        update={"metadata": job.metadata.model_copy(update={"namespace": "restricted"})}
    )
    answer = accept(job, Settings())
    if isinstance(answer, Refused):
        return
    for each in made_for(job, answer):
        status, message = offer(api, each)
        # An account or a class that does not exist is forbidden; it may yet be made.
        assert status in (201, 403), message
        assert status == 201 or "not found" in message or "was found" in message, message
