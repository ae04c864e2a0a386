"""Pods and nodes are read as they come, whatever they hold."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cptjob_operator.edge import parse
from cptjob_operator.identity import PodId, Role

MakePod = Callable[..., dict[str, Any]]
UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"

_NAMES = (
    *("status", "phase", "conditions", "type", "reason", "message", "spec", "containers", "name"),
    *("limits", "resources", "state", "terminated", "waiting", "exitCode", "metadata", "labels"),
    "nvidia.com/gpu",
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=6)
    ),
    max_leaves=30,
)


def test_a_running_pod_says_where_it_is(pod_body: MakePod) -> None:
    body = pod_body(7, 3, podIP="10.0.0.9", conditions=[{"type": "Ready", "status": "True"}])
    body["spec"]["nodeName"] = "node-1"
    pod = parse.pod(body)
    assert pod is not None
    assert pod.id == PodId(UID, 0, Role.WORKER, 3, 0)
    assert (pod.version, pod.phase, pod.ready) == (7, "Running", True)
    assert (pod.node, pod.address, pod.owner_uid) == ("node-1", "10.0.0.9", UID)


def test_secrets_to_pull_with_are_read_as_far_as_they_have_a_name(pod_body: MakePod) -> None:
    body = pod_body()
    body["spec"]["imagePullSecrets"] = [{"name": "one"}, {}, "two", {"name": "three"}]
    pod = parse.pod(body)
    assert pod is not None
    assert pod.pull_secrets == ("one", "three")


def test_other_devices_are_no_gpus(pod_body: MakePod) -> None:
    body = pod_body()
    limits = {"rdma/hca": "1", "nvidia.com/gpu": "2", "cpu": "4", "hugepages-2Mi": "1Gi"}
    body["spec"]["containers"][0]["resources"] = {"limits": limits}
    assert parse.holder(body) == (UID, "", 2)


def test_what_the_process_said_at_its_end_is_read(pod_body: MakePod) -> None:
    said = json.dumps({"exitCode": 65, "reason": "DataError", "message": "a.jsonl:3: no text"})
    ended = {"exitCode": 65, "reason": "Error", "message": said}
    status = {"name": "main", "state": {"terminated": ended}}
    pod = parse.pod(pod_body(phase="Failed", containerStatuses=[status]))
    assert pod is not None
    assert pod.ended is not None
    assert pod.ended.termination is not None
    assert (pod.ended.exit_code, pod.ended.termination.reason) == (65, "DataError")
    assert pod.finished


def test_a_termination_message_that_is_none_leaves_the_exit_code(pod_body: MakePod) -> None:
    ended = {"exitCode": 137, "reason": "OOMKilled", "message": '{"exitCode": 1e999}'}
    status = {"name": "main", "state": {"terminated": ended}}
    pod = parse.pod(pod_body(phase="Failed", containerStatuses=[status]))
    assert pod is not None
    assert pod.ended is not None
    assert (pod.ended.exit_code, pod.ended.reason, pod.ended.termination) == (
        137,
        "OOMKilled",
        None,
    )


def test_the_container_that_waits_with_a_reason_is_told(pod_body: MakePod) -> None:
    states = [
        {"name": "main", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such tag"}}}
    ]
    pod = parse.pod(pod_body(phase="Pending", containerStatuses=states))
    assert pod is not None
    assert pod.waiting is not None
    assert pod.waiting.reason == "ErrImagePull"


def test_what_the_scheduler_says_is_told_only_of_unschedulable_pods(pod_body: MakePod) -> None:
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "g"}
    late = gated | {"reason": "Unschedulable", "message": "0/4 nodes are available"}
    one, other = parse.pod(pod_body(conditions=[gated])), parse.pod(pod_body(conditions=[late]))
    assert one is not None
    assert other is not None
    assert (one.unschedulable, other.unschedulable) == (None, "0/4 nodes are available")


def test_a_pod_without_our_labels_is_none_of_ours(pod_body: MakePod) -> None:
    body = pod_body()
    del body["metadata"]["labels"]["training.cptjob.io/attempt"]
    assert parse.pod(body) is None


def test_a_copy_of_a_pod_and_one_without_its_job_are_none_of_ours(pod_body: MakePod) -> None:
    assert parse.pod(pod_body()) is not None
    copied, orphan = pod_body(), pod_body()
    copied["metadata"]["name"] += "-debug"
    orphan["metadata"]["ownerReferences"] = []
    assert parse.pod(copied) is None
    assert parse.pod(orphan) is None


@given(_json, _json)
def test_no_object_is_too_strange_to_be_read(spec: Any, status: Any) -> None:
    identity = PodId(UID, 0, Role.WORKER, 0, 0)
    about = {
        "labels": identity.labels("job"),
        "name": identity.name("job"),
        "ownerReferences": [{"controller": True, "uid": UID}],
    }
    body = {"metadata": about, "spec": spec, "status": status}
    pod = parse.pod(body)
    assert pod is not None
    assert pod.phase in ("Pending", "Running", "Succeeded", "Failed", "Unknown")
    assert parse.node(body).name == identity.name("job")


def test_a_node_that_is_out_of_service_is_fenced() -> None:
    node = parse.node(
        {
            "metadata": {"name": "node-1", "labels": {"zone": "a"}},
            "spec": {
                "unschedulable": True,
                "taints": [{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}],
            },
            "status": {
                "conditions": [{"type": "Ready", "status": "Unknown"}],
                "allocatable": {"cpu": "96", "nvidia.com/gpu": "8"},
            },
        }
    )
    assert (node.ready, node.cordoned, node.fenced) == (False, True, True)
    assert node.gpus == {"nvidia.com/gpu": 8}


def test_a_job_is_kept_without_what_nobody_reads() -> None:
    about = {
        "name": "a",
        "managedFields": [{"manager": "kubectl"}],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "own": "yes"},
    }
    kept = json.loads(parse.job({"metadata": about, "spec": {"task": "CausalLM"}}).whole)
    assert kept == {
        "apiVersion": "training.cptjob.io/v1alpha1",
        "kind": "CPTJob",
        "metadata": {"name": "a", "annotations": {"own": "yes"}},
        "spec": {"task": "CausalLM"},
        "status": None,
    }
