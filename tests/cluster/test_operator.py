"""The operator against the real API server: what it makes, what it leaves alone, what it survives."""

import collections
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubernetes import client
from running import LEASE_SECONDS, RunningOperator
from world import OURS, SHOWN, World

from testplane.plane import ControlPlane
from testplane.proxy import FaultProxy

Start = Callable[..., RunningOperator]


def test_a_job_gets_its_children_and_its_workers_once_it_is_prepared(
    world: World, start: Start
) -> None:
    operator = start().wait_leading()
    uid = world.create("job", workers=3)["metadata"]["uid"]
    world.wait(lambda: world.pods("coordinator"), "the coordinator")
    assert world.pods() == []
    world.prepare("job")
    world.wait(lambda: len(world.pods()) == 3, "the workers")
    owned = [
        *world.core.list_namespaced_config_map(world.namespace, label_selector=OURS).items,
        *world.core.list_namespaced_service(world.namespace, label_selector=OURS).items,
        *world.pods(),
        *world.pods("coordinator"),
    ]
    assert len(owned) == 6
    assert {each.metadata.owner_references[0].uid for each in owned} == {uid}
    for pod in world.pods():
        world.kubelet.run(world.namespace, pod.metadata.name)
    world.wait(lambda: world.status("job").get("phase") == "Running", "it to run")
    assert operator.figures()['cptjob_jobs{phase="Running"}'] == 1


def test_an_operator_that_is_started_anew_writes_nothing(
    world: World, start: Start, proxy: FaultProxy
) -> None:
    operator = start(kubeconfig=proxy.kubeconfig()).wait_leading()
    names = ("one", "two", "three")
    for name in names:
        world.create(name, workers=2)
    world.prepare(*names)
    world.wait(lambda: len(world.pods()) == 6, "the workers")
    world.wait(lambda: _settled(proxy, operator), "the operator to settle")
    operator.kill()
    proxy.reset()
    operator.start()
    world.wait(lambda: operator.passes() >= len(names), "a pass over each job")
    operator.wait_quiet()
    assert [(call.method, call.resource) for call in proxy.writes] == []


def _settled(proxy: FaultProxy, operator: RunningOperator) -> bool:
    """Two looks, with passes between them, saw no write."""
    before = len(proxy.writes)
    operator.plane.wait(lambda: _seconds_apart(operator), "a moment")
    return len(proxy.writes) == before


def _seconds_apart(operator: RunningOperator) -> bool:
    """The operator renewed its lease: a second or more went by in it."""
    name = 'cptjob_api_calls_total{code="200",kind="Lease",verb="update"}'
    first = operator.figures().get(name, 0)
    operator.plane.wait(lambda: operator.figures().get(name, 0) >= first + 2, "two renewals")
    return True


def test_a_quota_for_some_pods_is_told_and_the_rest_follow_when_it_is_raised(
    world: World, start: Start, proxy: FaultProxy
) -> None:
    start(kubeconfig=proxy.kubeconfig()).wait_leading()
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"count/pods": "4"}}}
    world.core.create_namespaced_resource_quota(world.namespace, quota)
    world.wait(
        lambda: world.core.read_namespaced_resource_quota("few", world.namespace).status.hard,
        "the quota",
    )
    world.create("job", workers=8)
    world.prepare("job")
    world.wait(lambda: len(world.pods()) == 3, "three workers")
    world.wait(
        lambda: "exceeded quota" in world.condition("job", "Scheduled").get("message", ""),
        "the quota to be told",
    )
    asked = [call for call in proxy.writes if (call.method, call.resource) == ("POST", "pods")]
    refused = collections.Counter(
        json.loads(call.body)["metadata"]["name"] for call in asked if call.code == 403
    )
    again = [name for name, times in refused.items() if times > 1]
    assert len(again) <= 1, "after the first round one pod is tried, and no other"
    world.core.patch_namespaced_resource_quota(
        "few", world.namespace, {"spec": {"hard": {"count/pods": "20"}}}
    )
    world.wait(lambda: len(world.pods()) == 8, "the other workers")


def test_children_that_somebody_deleted_are_there_again_before_a_worker_is_replaced(
    world: World, start: Start
) -> None:
    """Nobody watches them, and a pod without its ConfigMap would hang for ever."""
    start().wait_leading()
    world.create("job", workers=2)
    world.prepare("job")
    world.run("job", 2)
    name = str(world.children()[0].metadata.name)
    network = client.NetworkingV1Api(world.core.api_client)
    for delete in (
        world.core.delete_namespaced_config_map,
        world.core.delete_namespaced_service,
        network.delete_namespaced_network_policy,
    ):
        delete(name, world.namespace)
    world.wait(lambda: not world.children(), "all to be gone")
    gone = world.pods()[0].metadata.name
    world.core.delete_namespaced_pod(gone, world.namespace, grace_period_seconds=0)
    world.wait(lambda: len(world.living("job")) == 2, "another worker")
    newest = max(pod.metadata.creation_timestamp for pod in world.pods())
    made = world.children()
    assert sorted(each.metadata.name for each in made) == [name] * 3
    assert all(each.metadata.creation_timestamp <= newest for each in made)


def test_tensorboard_belongs_to_the_job_and_its_pod_is_none_of_the_jobs(
    world: World, start: Start, proxy: FaultProxy
) -> None:
    operator = start(kubeconfig=proxy.kubeconfig()).wait_leading()
    uid = world.create("job", workers=2, changes=SHOWN)["metadata"]["uid"]
    world.wait(lambda: world.pods("coordinator"), "the coordinator")
    operator.wait_quiet()
    assert world.shown("job") == []
    world.prepare("job")
    world.run("job", 2)
    world.wait(lambda: _of_tensorboard(world), "its pod")
    made = world.shown("job")
    assert sorted(each.kind or type(each).__name__ for each in made) == [
        "V1Deployment",
        "V1NetworkPolicy",
        "V1Service",
    ]
    assert {each.metadata.owner_references[0].uid for each in made} == {uid}
    (pod,) = _of_tensorboard(world)
    world.kubelet.exit(world.namespace, pod.metadata.name, 1, "boom")
    operator.wait_quiet()
    status = world.status("job")
    assert (status["phase"], status["restarts"], status["pods"]["active"]) == ("Running", 0, 2)
    world.suspend("job")
    assert len(world.shown("job")) == 3
    operator.kill()
    proxy.reset()
    operator.start()
    world.wait(lambda: operator.passes() >= 1, "a pass over the job")
    operator.wait_quiet()
    assert [(call.method, call.resource) for call in proxy.writes] == []
    world.delete("job")
    world.wait(lambda: not world.shown("job"), "everything of the job to go")
    world.wait(lambda: not _of_tensorboard(world), "the pod to go")


def _of_tensorboard(world: World) -> list[Any]:
    """Its pods that shall live on."""
    pods = world.core.list_namespaced_pod(
        world.namespace, label_selector="training.cptjob.io/tensorboard"
    ).items
    return [pod for pod in pods if pod.metadata.deletion_timestamp is None]


def test_a_deployment_of_somebody_with_tensorboards_name_is_not_touched_and_training_goes_on(
    world: World, start: Start
) -> None:
    start().wait_leading()
    labels = {"matchLabels": {"app": "theirs"}}
    pod = {"metadata": {"labels": {"app": "theirs"}}, "spec": {"containers": [CONTAINER]}}
    theirs = {
        "metadata": {"name": "job-tensorboard"},
        "spec": {"replicas": 0, "selector": labels, "template": pod},
    }
    apps = client.AppsV1Api(world.core.api_client)
    before = apps.create_namespaced_deployment(world.namespace, theirs).metadata
    world.create("job", changes=SHOWN)
    world.prepare("job")
    world.run("job", 1)
    told = "there is a Deployment job-tensorboard that does not belong to this job"
    world.wait(lambda: world.told("job", "Refused", told, "goes on without it"), "it to be told")
    assert world.status("job")["phase"] == "Running"
    after = apps.read_namespaced_deployment("job-tensorboard", world.namespace).metadata
    assert (after.uid, after.generation) == (before.uid, before.generation)
    assert after.labels is None
    apps.delete_namespaced_deployment("job-tensorboard", world.namespace)
    world.wait(lambda: len(world.shown("job")) == 3, "its own Deployment")


CONTAINER = {"name": "a", "image": "test.invalid/a"}


def test_a_job_made_anew_gets_its_tensorboard_though_the_old_one_is_still_there(
    world: World, start: Start
) -> None:
    """The garbage collector takes its time, and both have one name."""
    start().wait_leading()
    world.create("job", changes=SHOWN)
    world.prepare("job")
    world.wait(lambda: len(world.shown("job")) == 3, "the first one's")
    world.delete("job")
    uid = world.create("job", changes=SHOWN)["metadata"]["uid"]
    world.wait(lambda: len(world.pods("coordinator")) == 1, "the coordinator alone")
    world.prepare("job")

    def owners() -> list[str]:
        return [each.metadata.owner_references[0].uid for each in world.shown("job")]

    world.wait(lambda: owners() == [uid] * 3, "the second one's")


def test_a_job_scaled_beyond_the_limit_says_so_and_goes_on_when_that_is_taken_back(
    world: World, start: Start
) -> None:
    start(settings={"limits": {"maxNodes": 3}}).wait_leading()
    world.create("job", workers=2)
    world.prepare("job")
    world.run("job", 2)
    world.suspend("job")
    world.scale("job", 5)
    world.suspend("job", on=False)
    world.wait(lambda: world.says("job", "LimitExceeded", "5", "3"), "it to be told")
    assert world.living("job") == []
    world.suspend("job")
    world.scale("job", 2)
    world.suspend("job", on=False)
    world.prepare("job")
    world.run("job", 2)


def test_what_belongs_to_others_is_not_touched(world: World, start: Start) -> None:
    uid = world.create("job")["metadata"]["uid"]
    name = f"job-{uid[:5]}"
    world.core.create_namespaced_service(
        world.namespace,
        {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}], "clusterIP": "None"}},
    )
    pod = {"containers": [{"name": "a", "image": "test.invalid/a"}]}
    theirs = world.core.create_namespaced_pod(
        world.namespace, {"metadata": {"name": f"{name}-0-c0-0"}, "spec": pod}
    )
    operator = start().wait_leading()
    told = "does not belong to this job"
    world.wait(lambda: told in str(world.status("job").get("conditions")), "it to be told")
    operator.wait_quiet()
    assert world.pods("coordinator") == []
    service = world.core.read_namespaced_service(name, world.namespace)
    assert service.metadata.owner_references is None
    now = world.core.read_namespaced_pod(theirs.metadata.name, world.namespace)
    assert (now.metadata.uid, now.metadata.labels) == (theirs.metadata.uid, None)
    world.core.delete_namespaced_pod(theirs.metadata.name, world.namespace, grace_period_seconds=0)
    world.core.delete_namespaced_service(name, world.namespace)
    world.wait(lambda: world.pods("coordinator"), "the job to go on")


def test_a_frozen_leader_has_no_effect_when_it_thaws(
    world: World, start: Start, proxy: FaultProxy
) -> None:
    first = start(identity="first", kubeconfig=proxy.kubeconfig()).wait_leading()
    second = start(identity="second").wait_ready()
    assert second.figure("cptjob_leader") == 0
    first.freeze()
    world.create("job")
    second.wait_leading()
    world.wait(lambda: world.pods("coordinator"), "the second one to act")
    proxy.reset()
    first.thaw()
    world.create("other")
    world.wait(lambda: len(world.pods("coordinator")) == 2, "the second one to act")
    world.wait(lambda: first.figure("cptjob_leader") == 0, "the first one to see that it lost")
    second.wait_quiet()
    assert [(call.method, call.path) for call in proxy.writes] == []


def test_a_leader_that_was_frozen_and_leads_again_does_what_it_missed(
    world: World, start: Start
) -> None:
    operator = start().wait_leading()
    operator.freeze()
    world.create("job")
    world.wait(lambda: _seconds_since_renewal(world) > LEASE_SECONDS, "its lease to lapse")
    operator.thaw()
    world.wait(lambda: world.pods("coordinator"), "the coordinator")


def _seconds_since_renewal(world: World) -> float:
    leases = client.CoordinationV1Api(world.core.api_client)
    lease = leases.read_namespaced_lease("cptjob-operator", world.namespace)
    return (datetime.now(UTC) - lease.spec.renew_time).total_seconds()


def test_an_operator_that_ends_hands_over_at_once(world: World, start: Start) -> None:
    first = start(identity="first").wait_leading()
    second = start(identity="second").wait_ready()
    assert first.stop() == 0
    second.wait_leading()
    lease = client.CoordinationV1Api(world.core.api_client).read_namespaced_lease(
        "cptjob-operator", world.namespace
    )
    assert lease.spec.holder_identity.startswith("second")


def test_what_goes_while_no_watch_holds_is_noticed(
    world: World, start: Start, proxy: FaultProxy
) -> None:
    start(kubeconfig=proxy.kubeconfig()).wait_leading()
    world.create("job", workers=2)
    world.prepare("job")
    world.wait(lambda: len(world.pods()) == 2, "the workers")
    for pod in world.pods():
        world.kubelet.run(world.namespace, pod.metadata.name)
    world.wait(lambda: world.status("job").get("phase") == "Running", "it to run")
    world.wait(lambda: proxy.open_watches >= 3, "the watches")
    gone = world.pods()[0].metadata.name
    with proxy.no_watches(expire=True):
        world.kubelet.finish(world.namespace, gone)
    world.wait(lambda: len(world.pods()) == 2, "its replacement")
    assert gone not in [pod.metadata.name for pod in world.pods()]


def test_its_probes_fail_while_its_watches_do_not_begin_or_do_not_go_on(
    world: World, start: Start, proxy: FaultProxy
) -> None:
    hasty = (str(Path(__file__).with_name("hasty_operator.py")),)

    def says(path: str, code: int, words: str) -> bool:
        answer = operator.get(path)
        return answer[0] == code and words in answer[1]

    with proxy.no_watches():
        operator = start(kubeconfig=proxy.kubeconfig(), program=hasty)
        world.wait(lambda: says("readyz", 503, "not everything is watched yet"), "its lists")
        world.wait(lambda: says("healthz", 503, "a watch was not heard of for"), "it to be sick")
    world.wait(lambda: says("healthz", 200, "ok"), "it to be well again")
    operator.wait_leading()
    world.create("before")
    world.wait(lambda: world.pods("coordinator"), "the coordinator")
    with proxy.no_watches():
        world.wait(lambda: says("healthz", 503, "a watch was not heard of for"), "it to be sick")
        assert operator.get("readyz")[0] == 200, "no other would serve what it serves"
        world.create("after")
    world.wait(lambda: says("healthz", 200, "ok"), "it to be well again")
    world.wait(lambda: len(world.pods("coordinator")) == 2, "it to go on")


def test_it_goes_on_when_the_api_server_is_back(
    world: World, start: Start, plane: ControlPlane
) -> None:
    operator = start().wait_leading()
    world.create("before")
    world.wait(lambda: world.pods("coordinator"), "the coordinator")
    with plane.apiserver_down():
        plane.wait(lambda: operator.figure("cptjob_leader") == 0, "it to miss the lease")
        assert operator.get("healthz")[0] == 200
    world.create("after")
    world.wait(lambda: len(world.pods("coordinator")) == 2, "it to go on")
    assert operator.stop() == 0, "the same process all along"


def test_nothing_is_left_of_a_deleted_job(world: World, start: Start) -> None:
    operator = start().wait_leading()
    world.create("job", workers=2)
    world.prepare("job")
    world.wait(lambda: len(world.pods()) == 2, "the workers")
    world.custom.delete_namespaced_custom_object(
        "training.cptjob.io", "v1alpha1", world.namespace, "cptjobs", "job"
    )
    world.wait(lambda: not world.pods() and not world.pods("coordinator"), "its pods to go")
    world.wait(lambda: operator.figures()['cptjob_jobs{phase="Starting"}'] == 0, "to be forgotten")
    operator.wait_quiet()
    assert world.pods() == []
