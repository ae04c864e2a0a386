"""Gangs that cannot start, claims that do not do, budgets and deadlines: told, and mended by itself."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client
from running import RunningOperator
from world import World

from testplane.nodes import GPU, Nodes

Start = Callable[..., RunningOperator]

WHOLE = {"spec.trainer.resourcesPerNode": {"limits": {GPU: 8}}}
#: Short waits. What is broken gives back what it holds after 2 s instead of 2 minutes.
SOON: dict[str, Any] = {
    "timing": {"backoff": {"baseSeconds": 0.5, "capSeconds": 1}, "brokenStartSeconds": 2},
}


def counts(world: World, name: str) -> tuple[int, int, int]:
    status = world.status(name)
    return status["restarts"], status["restartsCountTowardsMax"], status["attempt"]


def attempts(world: World, name: str) -> set[str]:
    key = "training.cptjob.io/attempt"
    return {pod.metadata.labels[key] for pod in world.living(name)}


def test_a_gang_with_quota_for_some_gives_them_back_and_starts_when_it_is_raised(
    world: World, start: Start
) -> None:
    operator = start(settings=SOON).wait_leading()
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"count/pods": "4"}}}
    world.core.create_namespaced_resource_quota(world.namespace, quota)
    world.wait(
        lambda: world.core.read_namespaced_resource_quota("few", world.namespace).status.hard,
        "the quota",
    )
    world.create("job", 8, {"spec.startupDeadlineSeconds": 3})
    world.prepare("job")
    world.wait(lambda: len(world.pods()) == 3, "as many as the quota allows")
    held = {pod.metadata.uid for pod in world.pods()}
    said = ("not all workers started in time", "exceeded quota: few")
    world.wait(lambda: world.told("job", "StartupDeadlineExceeded", *said), "it to give up")
    world.wait(lambda: not held & {pod.metadata.uid for pod in world.pods()}, "what it held to go")
    world.patch("job", {"spec": {"startupDeadlineSeconds": 900}})
    world.wait(lambda: len(world.living("job")) == 3, "another try")
    world.wait(lambda: world.says("job", "WaitingForQuota", "exceeded quota: few"), "the quota")
    more = {"spec": {"hard": {"count/pods": "20"}}}
    world.core.patch_namespaced_resource_quota("few", world.namespace, more)
    world.run("job", 8)
    assert counts(world, "job")[1] == 0, "that counts against nothing"
    # The log names the job, and the generation and attempt that the pass looked at.
    about = {"namespace": world.namespace, "job": "job"}
    first, later = about | {"generation": 1, "attempt": 0}, about | {"generation": 2, "attempt": 1}
    for message, passed in (
        ("Pod refused: ", first),
        ("deleting Pod", first),
        ("Pod refused", later),
    ):
        said = [line for line in operator.lines if line["message"].startswith(message)]
        assert any(passed.items() <= line.items() for line in said), (message, passed)


def test_a_gang_of_which_half_finds_nodes_leaves_them_to_others_and_tries_again(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="anywhere", pool=None)
    nodes.add(1)
    start(settings={"timing": {"backoff": {"baseSeconds": 5, "capSeconds": 5}}}).wait_leading()
    world.create("wide", 2, WHOLE | {"spec.startupDeadlineSeconds": 3})
    world.prepare("wide")
    world.wait(lambda: any(pod.spec.node_name for pod in world.pods()), "one of them to get it")
    world.create("narrow", 1, WHOLE)
    world.prepare("narrow")
    world.wait(lambda: world.pods(job="narrow"), "its worker")
    assert world.living("narrow")[0].spec.node_name is None
    world.wait(lambda: world.told("wide", "StartupDeadlineExceeded", "Insufficient"), "giving back")

    def got_it() -> bool:
        world.finish_what_leaves("wide")
        return world.living("narrow")[0].spec.node_name == "node-0"

    world.wait(got_it, "the other job to get the node")
    world.run("narrow", 1)
    world.patch("wide", {"spec": {"startupDeadlineSeconds": 900}})
    nodes.add(2, prefix="more")
    world.wait(
        lambda: [bool(pod.spec.node_name) for pod in world.living("wide")] == [True] * 2,
        "nodes for both",
    )
    world.run("wide", 2)


BROKEN = {
    "image": ("ImagePullBackOff", 'Back-off pulling image "x"', "ImagePullFailed", "image"),
    "secret": (
        *("CreateContainerConfigError", 'secret "hub" not found'),
        *("WaitingForSecret", "secret hub does not exist in namespace"),
    ),
    "config": (
        *("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"),
        *("ContainerConfigError", "image will run as root"),
    ),
    "mount": ("FailedMount", "server not found", "MountFailed", "server not found"),
}


def test_what_keeps_pods_from_starting_is_told_and_given_back_and_tried_again(
    world: World, start: Start
) -> None:
    start(settings=SOON).wait_leading()
    for name in BROKEN:
        world.create(name, 2)
    world.prepare(*BROKEN)
    for name, (reason, message, _, _) in BROKEN.items():
        world.wait(lambda name=name: len(world.living(name)) == 2, "the workers")
        first, second = world.living(name)
        world.kubelet.run(world.namespace, first.metadata.name)
        world.kubelet.wait_for(world.namespace, second.metadata.name, reason, message)
    for name, (_, _, reason, words) in BROKEN.items():
        world.wait(lambda n=name, r=reason, w=words: world.told(n, r, w), f"{reason} to be told")
        world.wait(
            lambda n=name, w=words: world.told(n, "StartupDeadlineExceeded", w), "giving back"
        )
    for name in BROKEN:
        world.wait(lambda name=name: attempts(world, name) == {"1"}, f"{name} to try again")
        world.run(name, 2)
        assert counts(world, name) == (0, 0, 1)


def test_a_coordinator_that_cannot_start_says_why(world: World, start: Start) -> None:
    start().wait_leading()
    world.create("job")
    world.wait(lambda: world.pods("coordinator"), "the coordinator")
    name = world.pods("coordinator")[0].metadata.name
    world.kubelet.wait_for(world.namespace, name, "ErrImagePull", "no such image")
    world.wait(lambda: world.says("job", "ImagePullFailed", "no such image", name), "the reason")
    world.kubelet.run(world.namespace, name)
    world.wait(lambda: world.pods(), "the worker")


def test_claims_that_are_missing_or_not_shared_are_named_and_missing_ones_are_waited_for(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(2)
    start().wait_leading()
    for name, workers in (("one", 1), ("two", 2)):
        world.create(name, workers, {"spec.model.storageUri": f"pvc://late-{name}/m"})
    world.claim("mine", "ReadWriteOnce")
    world.create("shared", 2, {"spec.output.storageUri": "pvc://mine/runs"})
    world.create("alone", 1, {"spec.output.storageUri": "pvc://mine/runs"})
    refused = "volume claim mine (ReadWriteOnce) cannot serve 2 nodes"
    world.wait(lambda: world.told("shared", "ClaimNotShared", refused), "the refusal")
    assert world.status("shared")["phase"] == "Failed"
    for name in ("one", "two"):
        missing = f"volume claim late-{name} does not exist in namespace {world.namespace}"
        world.wait(
            lambda n=name, m=missing: world.says(n, "WaitingForClaim", m), "the missing claim"
        )
    world.prepare("alone")
    world.run("alone", 1)
    for name in ("one", "two"):
        world.claim(f"late-{name}")
    world.prepare("one", "two")
    world.run("one", 1)
    world.run("two", 2)


def test_a_claim_without_a_volume_is_named(
    world: World, start: Start, nodes: Nodes, core: client.CoreV1Api
) -> None:
    nodes.add(1)
    start().wait_leading()
    # Of no class: nobody makes a volume for it.
    resources = {"requests": {"storage": "1Gi"}}
    spec = {"accessModes": ["ReadWriteMany"], "resources": resources, "storageClassName": ""}
    body = {"metadata": {"name": "unbound"}, "spec": spec}
    core.create_namespaced_persistent_volume_claim(world.namespace, body)
    world.create("job", 1, {"spec.model.storageUri": "pvc://unbound/m"})
    told = "no volume is bound to volume claim unbound (it has no storage class"
    world.wait(lambda: world.says("job", "WaitingForClaim", told), "the claim")


def test_what_is_done_to_a_job_does_not_count_and_what_it_does_itself_does(
    world: World, start: Start
) -> None:
    """The difference that upstream's rules do not make: evicted for its own use of memory."""
    start(settings=SOON).wait_leading()
    names = ("drained", "evicted", "killed", "stopped")
    for name in names:
        world.create(name, 2)
    world.create("spent", 2, {"spec.failurePolicy": {"maxRestarts": 0}})
    world.prepare(*names, "spent")
    for name in (*names, "spent"):
        world.run(name, 2)
    target = {"type": "DisruptionTarget", "status": "True", "message": "by a test"}
    _end(world, "drained", 137, conditions=[target | {"reason": "EvictionByEvictionAPI"}])
    _end(
        *(world, "evicted", 137),
        pod_reason="Evicted",
        conditions=[target | {"reason": "TerminationByKubelet"}],
    )
    _end(world, "killed", 137, reason="OOMKilled")
    _end(world, "stopped", 143)
    _end(world, "spent", 1, message="boom")
    for name in names:
        world.run(name, 2)
    found = {name: counts(world, name) for name in names}
    assert found == {
        "drained": (1, 0, 0),
        "evicted": (1, 1, 0),
        "killed": (1, 1, 0),
        "stopped": (1, 0, 0),
    }
    world.wait(lambda: world.told("spent", "RestartsExhausted", "boom"), "the end")
    assert world.status("spent")["phase"] == "Failed"
    world.wait(lambda: all(_leaves(pod) for pod in world.pods(job="spent")), "all of it to go")


def _end(world: World, name: str, code: int, **more: Any) -> None:
    """One of its workers ends so."""
    pod = world.living(name)[0].metadata.name
    world.kubelet.exit(world.namespace, pod, code, **more)
    world.wait(
        lambda: world.status(name)["restarts"] == 1 or world.status(name)["phase"] == "Failed",
        "the loss to be seen",
    )


def _leaves(pod: Any) -> bool:
    return pod.metadata.deletion_timestamp is not None or pod.status.phase == "Failed"


def test_a_job_that_fails_again_waits_before_it_tries_again(world: World, start: Start) -> None:
    start(settings={"timing": {"backoff": {"baseSeconds": 3, "capSeconds": 3}}}).wait_leading()
    world.create("job", 1)
    world.prepare("job")
    world.run("job", 1)
    _end(world, "job", 1, message="first")
    world.run("job", 1)
    failed = datetime.datetime.fromisoformat(world.status("job")["lastFailure"]["time"])
    # What comes sooner is part of the same failure.
    world.wait(lambda: (_now() - failed).total_seconds() > 16, "a failure of its own")
    pod = world.living("job")[0].metadata.name
    world.kubelet.exit(world.namespace, pod, 1, "second")
    world.wait(lambda: world.status("job")["restarts"] == 2, "the second failure")
    status = world.status("job")
    due = datetime.datetime.fromisoformat(status["retryTime"])
    world.wait(lambda: world.living("job"), "the next try")
    made = world.living("job")[0].metadata.creation_timestamp
    assert made >= due
    assert due > datetime.datetime.fromisoformat(status["lastFailure"]["time"])
    assert "trying again at" in str(status["conditions"])
    assert counts(world, "job") == (2, 2, 2)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def test_a_job_fails_when_its_time_is_over_and_goes_after_its_end(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1)
    start().wait_leading()
    late = {"spec.activeDeadlineSeconds": 2}
    world.create("preparing", 1, late)
    world.create("starting", 1, late)
    world.create("running", 1, late | {"spec.activeDeadlineSeconds": 60})
    world.prepare("starting", "running")
    world.run("running", 1)
    world.patch("running", {"spec": {"activeDeadlineSeconds": 1}})
    for name in ("preparing", "starting", "running"):
        world.wait(lambda name=name: world.status(name).get("phase") == "Failed", f"{name} to end")
        assert world.condition(name, "Failed")["reason"] == "DeadlineExceeded"
        words = "more than activeDeadlineSeconds"
        world.wait(lambda n=name, w=words: world.told(n, "DeadlineExceeded", w), "it to be told")

    def all_leave() -> bool:
        return all(_leaves(pod) for role in ("coordinator", "worker") for pod in world.pods(role))

    world.wait(all_leave, "the pods to be given back")
    world.patch("running", {"spec": {"ttlSecondsAfterFinished": 1}})
    world.wait(lambda: world.find("running") is None, "the job to go")
    assert world.find("starting") is not None


def test_the_number_of_workers_of_a_job_that_is_not_elastic_moves_only_while_it_is_suspended(
    world: World, start: Start
) -> None:
    start().wait_leading()
    world.create("job", 2)
    world.create("elastic", 2, {"spec.elasticPolicy": {"minNodes": 1, "maxNodes": 4}})
    world.prepare("job")
    world.run("job", 2)
    with pytest.raises(client.ApiException) as refused:
        world.scale("job", 3)
    assert refused.value.status == 422
    assert "spec.trainer.numNodes" in refused.value.body
    scale = world.scale("job")
    assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (2, 2)
    assert scale["status"]["selector"]
    world.wait(lambda: world.told("elastic", "NotSupported", "minNodes", "maxNodes"), "the refusal")
    world.patch("job", {"spec": {"suspend": True}})

    def suspended() -> bool:
        world.finish_what_leaves()
        return world.status("job")["phase"] == "Suspended"

    world.wait(suspended, "it to be suspended")
    world.scale("job", 3)
    world.patch("job", {"spec": {"suspend": False}})
    world.prepare("job")
    world.run("job", 3)
