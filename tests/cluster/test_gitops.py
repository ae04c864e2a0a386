"""GitOps and the operator side by side: who writes what, and what kstatus says of live jobs."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from running import RunningOperator
from world import World

from cptjob_api.conditions import PHASES, Phase
from testplane import binaries
from testplane.nodes import Nodes
from testplane.plane import ControlPlane

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
TINY = EXAMPLES / "tiny.yaml"
QUEUE = "kueue.x-k8s.io/queue-name"

Object = dict[str, Any]
Judge = Callable[..., list[str]]

pytestmark = pytest.mark.usefixtures("operator")


@pytest.fixture(scope="module", name="judge")
def make_judge(report: binaries.Report) -> Judge:
    """What kstatus says of each of these objects."""
    program = binaries.find(["health"], report)["kstatus"]

    def judge(*objects: Object) -> list[str]:
        text = "\n".join(json.dumps(each) for each in objects)
        done = subprocess.run(program, input=text, capture_output=True, text=True, check=True)
        return [json.loads(line)["status"] for line in done.stdout.splitlines()]

    return judge


@pytest.fixture(name="queue")
def make_queue(world: World, api: client.ApiClient) -> Iterator[None]:
    """Workers with a queue's label come with a gate, as Kueue's webhook gives them one."""
    admission, name = client.AdmissionregistrationV1Api(api), world.namespace
    admission.create_mutating_admission_policy(_policy(name))
    chosen = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
    admission.create_mutating_admission_policy_binding(
        {"metadata": {"name": name}, "spec": {"policyName": name, "matchResources": chosen}}
    )
    world.wait(lambda: _is_gated(world), "the gates")
    yield
    admission.delete_mutating_admission_policy_binding(name)
    admission.delete_mutating_admission_policy(name)


def _policy(name: str) -> Object:
    pods = {
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["pods"],
    }
    queued = f"has(object.metadata.labels) && '{QUEUE}' in object.metadata.labels"
    gate = "Object.spec.schedulingGates{name: 'kueue.x-k8s.io/admission'}"
    mutation = {"expression": f"Object{{spec: Object.spec{{schedulingGates: [{gate}]}}}}"}
    return {
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [pods]},
            "matchConditions": [{"name": "queued", "expression": queued}],
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": mutation}],
        },
    }


def _is_gated(world: World) -> bool:
    pod = {
        "metadata": {"name": "try", "labels": {QUEUE: "a"}},
        "spec": {"containers": [{"name": "a", "image": "test.invalid/a"}]},
    }
    tried = world.core.create_namespaced_pod(world.namespace, pod, dry_run="All")
    return bool(tried.spec.scheduling_gates)


def let_in(world: World, name: str, count: int) -> None:
    """What a queue does when it admits the job."""
    world.wait(lambda: len(world.living(name)) == count, "the workers")
    for pod in world.living(name):
        world.core.patch_namespaced_pod(
            pod.metadata.name, world.namespace, {"spec": {"schedulingGates": None}}
        )


def seen(world: World, phase: Phase, name: str = "job") -> Object:
    """The job as it stands when its phase is that one, for its newest spec."""
    found: Object = {}

    def stands() -> bool:
        found.update(world.job(name))
        status = found["status"]
        current = status["observedGeneration"] == found["metadata"]["generation"]
        return current and status.get("phase") == phase

    world.wait(stands, f"{name} to be {phase}")
    return dict(found)


def test_kstatus_says_of_a_living_job_what_the_table_says(
    world: World, queue: None, api: client.ApiClient, pool: list[str], judge: Judge
) -> None:
    nodes = Nodes(world.plane, api)
    for node in pool:
        nodes.cordon(node)
    found = [world.create("job", changes={"metadata.labels": {QUEUE: "night"}})]
    pending = seen(world, Phase.PENDING)
    for node in pool:
        nodes.cordon(node, on=False)
    found += [pending, seen(world, Phase.PREPARING)]
    world.prepare("job")
    found.append(seen(world, Phase.QUEUED))
    let_in(world, "job", 1)
    found.append(seen(world, Phase.STARTING))
    world.run("job", 1)
    found.append(seen(world, Phase.RUNNING))
    (worker,) = world.living("job")
    world.kubelet.exit(world.namespace, worker.metadata.name, 1, "boom")
    let_in(world, "job", 1)
    found.append(seen(world, Phase.RESTARTING))
    world.run("job", 1)
    world.suspend("job")
    found.append(seen(world, Phase.SUSPENDED))
    world.suspend("job", on=False)
    world.prepare("job")
    let_in(world, "job", 1)
    world.run("job", 1)
    world.complete("job")
    found.append(seen(world, Phase.COMPLETE))
    world.create("other")
    world.prepare("other")
    (pod,) = world.pods("coordinator", "other")
    said = {"exitCode": 65, "reason": "DataError", "message": "a.jsonl:7: not JSON"}
    world.kubelet.exit(world.namespace, pod.metadata.name, 65, json.dumps(said))
    found.append(seen(world, Phase.FAILED, "other"))
    table = {None: "InProgress"} | {row.phase: row.kstatus for row in PHASES}
    phases = [each["status"].get("phase") for each in found]
    assert set(phases) == set(table), "every phase was seen"
    assert dict(zip(phases, judge(*found), strict=True)) == table


def test_kstatus_says_failed_of_a_job_that_is_refused_until_it_is_mended(
    world: World, judge: Judge
) -> None:
    world.create("job", changes={"spec.scheduling": {"pool": "unknown"}})
    world.wait(lambda: world.condition("job", "Stalled"), "it to be refused")
    refused = world.job("job")
    world.patch("job", {"spec": {"scheduling": {"pool": None}}})
    assert judge(refused, seen(world, Phase.PREPARING)) == ["Failed", "InProgress"]


def test_a_change_that_the_operator_has_not_seen_is_in_progress(
    world: World, operator: RunningOperator, judge: Judge
) -> None:
    world.create("job")
    world.prepare("job")
    world.run("job", 1)
    operator.freeze()
    try:
        world.patch("job", {"spec": {"activeDeadlineSeconds": 1000}})
        unseen = world.job("job")
    finally:
        operator.thaw()
    assert judge(unseen, seen(world, Phase.RUNNING)) == ["InProgress", "Current"]


HOW = pytest.mark.parametrize("how", [(), ("--server-side",)], ids=["client", "server"])


@HOW
def test_nothing_differs_from_the_manifest_at_any_time(
    lively_world: World, how: tuple[str, ...]
) -> None:
    world = lively_world

    def kubectl(verb: str, manifest: str) -> str:
        arguments = (verb, *how, "-n", world.namespace, "-f", "-")
        done = world.plane.try_kubectl(*arguments, stdin=manifest)
        assert done.stderr == ""
        return done.stdout

    tiny = TINY.read_text("utf-8")
    kubectl("apply", tiny)
    seen(world, Phase.RUNNING, "tiny")
    assert kubectl("diff", tiny) == ""
    world.complete("tiny")
    seen(world, Phase.COMPLETE, "tiny")
    assert kubectl("diff", tiny) == ""
    assert "+  ttlSecondsAfterFinished: 60" in kubectl(
        "diff", f"{tiny.rstrip()}\n  ttlSecondsAfterFinished: 60\n"
    )


@HOW
def test_no_example_differs_from_its_manifest_once_the_operator_has_seen_it(
    world: World, how: tuple[str, ...]
) -> None:
    where = (*how, "-n", world.namespace, "-f", str(EXAMPLES))
    world.plane.kubectl("apply", *where)
    for path in EXAMPLES.glob("*.yaml"):
        world.wait(
            lambda name=path.stem: world.status(name).get("resolved"), f"{path.stem} to be accepted"
        )
    assert world.plane.kubectl("diff", *where) == ""


def managers(job: Object) -> dict[tuple[str, str], Object]:
    """What each manager owns, by its name and the subresource it wrote."""
    return {
        (each["manager"], each.get("subresource", "")): each["fieldsV1"]
        for each in job["metadata"]["managedFields"]
    }


def test_the_operator_and_other_managers_do_not_fight(
    lively_world: World, plane: ControlPlane
) -> None:
    world = lively_world

    def apply(manager: str, manifest: str) -> None:
        arguments = ("apply", "--server-side", f"--field-manager={manager}", "-f", "-")
        plane.kubectl(*arguments, "-n", world.namespace, stdin=manifest)

    apply("gitops", TINY.read_text("utf-8"))
    seen(world, Phase.RUNNING, "tiny")
    apply("gitops", TINY.read_text("utf-8"))
    running = world.job("tiny")
    assert running["metadata"]["generation"] == 1
    owned = managers(running)
    assert owned.keys() == {("gitops", ""), ("cptjob-operator", "status")}
    assert owned["cptjob-operator", "status"].keys() == {"f:status"}
    # Another one, such as a queue, owns a single field; nobody takes it back.
    about = {"apiVersion": running["apiVersion"], "kind": "CPTJob", "metadata": {"name": "tiny"}}
    apply("queue", json.dumps(about | {"spec": {"suspend": True}}))
    seen(world, Phase.SUSPENDED, "tiny")
    apply("gitops", TINY.read_text("utf-8"))
    suspended = seen(world, Phase.SUSPENDED, "tiny")
    assert suspended["metadata"]["generation"] == 2
    assert managers(suspended).keys() == owned.keys() | {("queue", "")}
    apply("queue", json.dumps(about))
    world.wait(lambda: world.status("tiny").get("phase") == "Running", "it to go on")
