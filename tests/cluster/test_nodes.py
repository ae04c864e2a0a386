"""Where workers go, as the real scheduler decides, and what becomes of them when nodes change."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client
from running import RunningOperator
from world import World

from testplane.nodes import GPU, INSTANCE_TYPE, POOL, PRODUCT, Nodes
from testplane.proxy import FaultProxy

Start = Callable[..., RunningOperator]

H100, A100 = "NVIDIA-H100-80GB-HBM3", "NVIDIA-A100-SXM4-80GB"
#: A worker takes all GPUs of a node.
WHOLE = {"spec.trainer.resourcesPerNode": {"limits": {GPU: 8}}}
#: Short, so that a lost node need not be waited for.
SOON: dict[str, Any] = {
    "jobs": {"image": "test.invalid/trainer:1", "tolerationSeconds": 1},
    "timing": {"backoff": {"baseSeconds": 0.1, "capSeconds": 1}},
}


def on_one_node(world: World) -> dict[str, Any]:
    """A worker's fields that bind it to its coordinator's node: one node only mounts its output."""
    world.claim("own", "ReadWriteOnce")
    return WHOLE | {"spec.output.storageUri": "pvc://own/runs"}


def by_hand(*names: str) -> dict[str, Any]:
    return WHOLE | {"spec.scheduling": {"mode": "Manual", "nodeNames": list(names)}}


def on(world: World, name: str) -> list[str | None]:
    """The nodes of a job's workers that shall live on, by index."""
    key = "training.cptjob.io/index"
    pods = sorted(world.living(name), key=lambda pod: int(pod.metadata.labels[key]))
    return [pod.spec.node_name for pod in pods]


def run_on(world: World, name: str, workers: int) -> None:
    """The job runs, each worker on the node that the scheduler chose."""
    world.wait(lambda: len(on(world, name)) == workers and all(on(world, name)), "nodes for all")
    world.run(name, workers)


def test_workers_go_only_to_nodes_of_the_pool_product_and_type_that_are_asked_for(
    world: World, start: Start, nodes: Nodes
) -> None:
    fit = nodes.add(2, prefix="fit")
    (outside,) = nodes.add(1, prefix="outside", pool=None)
    nodes.add(1, prefix="other-pool", pool="pool-b")
    nodes.add(1, prefix="other-product", product=A100)
    (other_type,) = nodes.add(1, prefix="other-type", instance_type="gpu.8x-old")
    start().wait_leading()
    asked = {"spec.scheduling": {"gpuTypes": [H100, "other"], "instanceType": "gpu.8x"}}
    world.create("job", 3, WHOLE | asked)
    world.prepare("job")
    told = ("has room for 2 of 3 workers", "other-product-0", "other-type-0")
    world.wait(lambda: world.says("job", "Unschedulable", *told), "the third to be explained")
    world.wait(lambda: {node for node in on(world, "job") if node} == set(fit), "two to have one")
    # The coordinator needs no GPU and leaves the pool's nodes to the workers.
    (coordinator,) = world.pods("coordinator")
    assert coordinator.spec.node_name == outside
    nodes.patch(other_type, {"metadata": {"labels": {INSTANCE_TYPE: "gpu.8x"}}})
    run_on(world, "job", 3)
    assert set(on(world, "job")) == {*fit, other_type}


def test_each_named_node_that_cannot_serve_is_told_and_the_job_goes_on_when_all_are_mended(
    world: World, start: Start, nodes: Nodes, core: client.CoreV1Api
) -> None:
    nodes.add(1, prefix="anywhere", pool=None)
    for prefix in ("silent", "cordoned", "full"):
        nodes.add(1, prefix=prefix)
    nodes.add(1, prefix="outside", pool=None)
    nodes.add(1, prefix="product", product=A100)
    nodes.add(1, prefix="small", gpus=4)
    _make_unready(nodes, core, "silent-0")
    nodes.cordon("cordoned-0")
    theirs = _take_gpus(world, "full-0")
    names = ["missing-0", "silent-0", "cordoned-0", "outside-0", "product-0", "full-0"]
    changes = by_hand(*names, "small-0")
    changes["spec.scheduling"]["gpuTypes"] = [H100]
    start().wait_leading()
    world.create("job", 6, changes)
    world.prepare("job")
    faults = (
        "node missing-0 does not exist",
        "node silent-0 is not ready",
        "node cordoned-0 is cordoned",
        "node outside-0 is not in pool pool-a",
        f"node product-0 has {PRODUCT}={A100} and not {H100}",
        f"node full-0 has 0 of 8 {GPU} free and 8 are wanted",
        f"node small-0 has 4 {GPU} and 8 are wanted",
    )
    world.wait(lambda: world.says("job", "WaitingForNode", *faults), "each node to be named")
    assert world.pods() == [], "nothing is sent to nodes that cannot serve"
    nodes.add(1, prefix="missing")
    nodes.find_again("silent-0")
    nodes.cordon("cordoned-0", on=False)
    nodes.patch("outside-0", {"metadata": {"labels": {POOL: "pool-a"}}})
    nodes.patch("product-0", {"metadata": {"labels": {PRODUCT: H100}}})
    core.delete_namespaced_pod(theirs, world.namespace, grace_period_seconds=0)
    run_on(world, "job", 6)
    assert sorted(str(name) for name in on(world, "job")) == sorted(names)


def _make_unready(nodes: Nodes, core: client.CoreV1Api, name: str) -> None:
    """Its kubelet says that it is not ready."""
    nodes.lose(name)
    condition = {"type": "Ready", "status": "False", "reason": "KubeletNotReady"}
    core.patch_node_status(name, {"status": {"conditions": [condition]}})


def _take_gpus(world: World, node: str, gpus: int = 8) -> str:
    """Name of a pod of somebody else that holds GPUs of that node."""
    container = {"name": "a", "image": "test.invalid/a", "resources": {"limits": {GPU: str(gpus)}}}
    spec = {"nodeName": node, "containers": [container]}
    body = {"metadata": {"name": f"theirs-{node}"}, "spec": spec}
    made = world.core.create_namespaced_pod(world.namespace, body)
    world.kubelet.run(world.namespace, made.metadata.name)
    return str(made.metadata.name)


def test_a_named_node_is_used_once_and_no_other_is(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(4)
    start().wait_leading()
    changes = by_hand("node-2", "node-0")
    changes["spec.trainer.resourcesPerNode"] = {"limits": {GPU: 2}}
    world.create("job", 2, changes)
    world.prepare("job")
    run_on(world, "job", 2)
    assert sorted(str(name) for name in on(world, "job")) == ["node-0", "node-2"]


def test_a_job_that_runs_is_not_disturbed_by_a_node_that_is_cordoned_or_relabelled(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(3)
    operator = start().wait_leading()
    world.create("auto", 2, WHOLE)
    world.prepare("auto")
    run_on(world, "auto", 2)
    first, second = on(world, "auto")
    before = {pod.metadata.uid for pod in world.pods()}
    nodes.cordon(str(first))
    nodes.patch(str(second), {"metadata": {"labels": {POOL: "pool-b", PRODUCT: "other"}}})
    # What comes after it in the same watch shows that the operator has seen both.
    world.create("later", 1, by_hand(str(first)))
    world.prepare("later")
    named = f"node {first} is cordoned"
    world.wait(lambda: named in world.condition("later", "Ready").get("message", ""), "the cordon")
    operator.wait_quiet()
    assert {pod.metadata.uid for pod in world.pods()} == before
    status = world.status("auto")
    assert (status["phase"], status["restarts"]) == ("Running", 0)


def test_a_job_waits_for_a_node_that_goes_and_takes_the_one_that_comes(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="anywhere", pool=None)
    nodes.add(1, prefix="old")
    nodes.cordon("old-0")
    start().wait_leading()
    world.create("auto", 1, WHOLE)
    world.prepare("auto")
    told = ("has room for 0 of 1 workers", "old-0: is cordoned")
    world.wait(lambda: world.says("auto", "Unschedulable", *told), "the cordoned node")
    nodes.remove("old-0")
    none = ("pool pool-a has no nodes: none carries training.cptjob.io/pool=pool-a",)
    world.wait(lambda: world.says("auto", "Unschedulable", *none), "the empty pool")
    nodes.add(1, prefix="new")
    run_on(world, "auto", 1)
    assert on(world, "auto") == ["new-0"]


def test_a_pool_that_another_job_fills_and_a_device_that_it_does_not_have_are_told(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(2, prefix="pool")
    start().wait_leading()
    world.create("first", 2, WHOLE)
    world.prepare("first")
    run_on(world, "first", 2)
    misspelt = {"spec.trainer.resourcesPerNode": {"limits": {"nvidia.com/gpus": 8}}}
    world.create("second", 1, WHOLE)
    world.create("third", 1, misspelt)
    world.prepare("second", "third")
    full = ("has room for 0 of 1 workers", "has 0 of 8 nvidia.com/gpu free and 8 are wanted")
    world.wait(lambda: world.says("second", "Unschedulable", *full), "the full pool")
    told = "no node of pool pool-a offers nvidia.com/gpus; its nodes offer nvidia.com/gpu"
    world.wait(lambda: world.says("third", "Unschedulable", told), "the device")


def test_workers_of_a_lost_node_are_replaced_while_their_pods_still_hang_there(
    world: World, start: Start, nodes: Nodes, proxy: FaultProxy
) -> None:
    nodes.add(1, prefix="anywhere", pool=None)
    nodes.add(3)
    start(kubeconfig=proxy.kubeconfig(), settings=SOON).wait_leading()
    world.create("job", 2, WHOLE)
    world.prepare("job")
    run_on(world, "job", 2)
    lost = str(on(world, "job")[0])
    hanging = next(pod.metadata.name for pod in world.pods() if pod.spec.node_name == lost)
    nodes.lose(lost)
    world.wait(lambda: _leaving(world, hanging), "the lost node's pod to be asked to go")
    # The node never answers, so the pod stays; that keeps nothing up.
    run_on(world, "job", 2)
    assert lost not in on(world, "job")
    assert _leaving(world, hanging)
    status = world.status("job")
    assert (status["restarts"], status["restartsCountTowardsMax"], status["attempt"]) == (1, 0, 0)
    # With the node gone, nobody else can say that the pod is.
    nodes.remove(lost)
    world.wait(lambda: not _find(world, hanging), "the pod to be removed")
    assert any(
        call.method == "DELETE"
        and call.path.endswith(f"/{hanging}")
        and b'"gracePeriodSeconds":0' in call.body.replace(b" ", b"")
        for call in proxy.writes
    ), "by the operator, not by the garbage collector"


def test_a_single_worker_is_replaced_elsewhere_with_its_coordinator_when_their_node_is_lost(
    world: World, start: Start, nodes: Nodes
) -> None:
    """Both sit on one node, for the sake of volumes that only one node can mount."""
    nodes.add(3)
    start(settings=SOON).wait_leading()
    world.create("job", 1, on_one_node(world))
    world.prepare("job")
    run_on(world, "job", 1)
    (lost,) = on(world, "job")
    (coordinator,) = world.pods("coordinator")
    assert coordinator.spec.node_name == lost
    nodes.lose(str(lost))

    def together() -> bool:
        """Whichever pod finds a node first, the coordinator ends up on the worker's."""
        nodes_of = {
            pod.spec.node_name: pod.metadata.name
            for pod in world.pods("coordinator")
            if pod.spec.node_name not in (None, lost)
        }
        for name in nodes_of.values():
            world.kubelet.run(world.namespace, name)
        return world.finish_what_leaves() and on(world, "job") == list(nodes_of) != []

    world.wait(together, "both pods to be on another node")
    run_on(world, "job", 1)
    assert world.status("job")["restartsCountTowardsMax"] == 0


def test_a_coordinator_follows_its_only_worker_to_the_node_that_has_room_for_it(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="full")
    _take_gpus(world, "full-0")
    start(settings=SOON).wait_leading()
    world.create("job", 1, on_one_node(world))
    world.wait(lambda: _coordinators(world) == ["full-0"], "the coordinator's node")
    nodes.add(1, prefix="free")
    world.prepare("job")
    world.wait(lambda: on(world, "job") == ["free-0"], "the worker to find the other")
    world.wait(lambda: "free-0" in _coordinators(world), "the coordinator to follow")
    (now,) = [pod for pod in world.pods("coordinator") if pod.spec.node_name == "free-0"]
    world.kubelet.run(world.namespace, now.metadata.name)
    run_on(world, "job", 1)
    world.wait(
        lambda: world.finish_what_leaves() and _coordinators(world) == ["free-0"], "one to be left"
    )
    assert world.status("job")["restarts"] == 0


def test_the_coordinator_of_an_only_worker_keeps_away_from_the_pool_where_claims_are_shared(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="outside", pool=None)
    nodes.add(1)
    start().wait_leading()
    world.create("job", 1, WHOLE)
    world.prepare("job")
    run_on(world, "job", 1)
    assert _coordinators(world) == ["outside-0"]
    assert on(world, "job") == ["node-0"]


def _coordinators(world: World) -> list[str | None]:
    """The nodes of coordinators."""
    return [pod.spec.node_name for pod in world.pods("coordinator")]


def _find(world: World, name: str) -> Any:
    return next((pod for pod in world.pods() if pod.metadata.name == name), None)


def _leaving(world: World, name: str) -> bool:
    pod = _find(world, name)
    return pod is not None and pod.metadata.deletion_timestamp is not None


def test_a_node_where_pods_failed_twice_is_avoided_at_any_price_until_its_time_is_over(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="anywhere", pool=None)
    nodes.add(1, prefix="bad")
    nodes.add(1, prefix="fine")
    start(settings=SOON).wait_leading()
    world.create("job", 2, WHOLE)
    world.prepare("job")
    run_on(world, "job", 2)
    _fail(world, "bad-0")
    # There is no other, and it is better than none.
    run_on(world, "job", 2)
    assert set(on(world, "job")) == {"bad-0", "fine-0"}
    nodes.add(1, prefix="full")
    _take_gpus(world, "full-0")
    last = world.status("job")["lastFailure"]["time"]
    world.wait(lambda: _seconds_since(last) > 16, "a failure that is no part of the last one")
    world.patch("job", {"spec": {"failurePolicy": {"excludedNodeTTLSeconds": 4}}})
    _fail(world, "bad-0")
    world.wait(world.finish_what_leaves, "the pods of the attempt before")
    avoided = ("didn't match Pod's node affinity", "bad-0: is avoided because pods failed")
    world.wait(lambda: world.told("job", "Unschedulable", *avoided), "the node to be avoided")
    (excluded,) = world.status("job")["excludedNodes"]
    assert (excluded["name"], excluded["failures"]) == ("bad-0", 2)
    world.wait(
        lambda: set(on(world, "job")) == {"fine-0", None}, "one to wait, though bad-0 is free"
    )
    world.patch("job", {"spec": {"startupDeadlineSeconds": 5}})
    world.wait(
        lambda: world.finish_what_leaves() and set(on(world, "job")) == {"bad-0", "fine-0"},
        "it to be tried again",
    )
    world.run("job", 2)


def _fail(world: World, node: str) -> None:
    """The worker on that node fails."""
    (pod,) = [each for each in world.living("job") if each.spec.node_name == node]
    before = world.status("job")["restarts"]
    world.kubelet.exit(world.namespace, pod.metadata.name, 1, "boom")
    world.wait(lambda: world.status("job")["restarts"] == before + 1, "the failure to be seen")


def test_a_coordinator_leaves_a_node_that_is_avoided_for_its_only_worker(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="bad")
    start(settings=SOON).wait_leading()
    world.create("job", 1, on_one_node(world))
    world.prepare("job")
    run_on(world, "job", 1)
    _fail(world, "bad-0")
    run_on(world, "job", 1)
    last = world.status("job")["lastFailure"]["time"]
    world.wait(lambda: _seconds_since(last) > 16, "a failure that is no part of the last one")
    nodes.add(1, prefix="good")
    _fail(world, "bad-0")
    moved = "another coordinator"
    world.wait(lambda: "good-0" in [pod.spec.node_name for pod in world.pods("coordinator")], moved)
    (now,) = [pod for pod in world.pods("coordinator") if pod.spec.node_name == "good-0"]
    world.kubelet.run(world.namespace, now.metadata.name)
    run_on(world, "job", 1)
    assert on(world, "job") == ["good-0"]


def _seconds_since(time: str) -> float:
    then = datetime.datetime.fromisoformat(time)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


@pytest.mark.soak  # Kubernetes itself waits for most of a minute before it gives such pods up
def test_workers_of_a_node_that_was_removed_are_replaced(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="anywhere", pool=None)
    nodes.add(3)
    start(settings=SOON).wait_leading()
    world.create("job", 2, WHOLE)
    world.prepare("job")
    run_on(world, "job", 2)
    gone, stays = (str(name) for name in on(world, "job"))
    nodes.remove(gone)
    world.wait(lambda: world.status("job")["restarts"] == 1, "the loss to be seen")
    run_on(world, "job", 2)
    assert gone not in on(world, "job")
    assert stays in on(world, "job")
    assert world.status("job")["restartsCountTowardsMax"] == 0
