"""What a job names and the cluster does not have is told, with what to do, and holds up no other.

Once it is there, the job goes on by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kubernetes import client
from running import RunningOperator
from world import World

from testplane.nodes import Nodes

Start = Callable[..., RunningOperator]

#: Of every object that is missing at first. Classes are the cluster's own.
LATE = "late"


@dataclass(frozen=True)
class Missing:
    """A job that names what is not there: what it is told, and how it comes to be there."""

    changes: dict[str, Any]
    reason: str
    words: tuple[str, ...]
    make: Callable[[World], object]


def _secret(name: str) -> Callable[[World], object]:
    def make(world: World) -> object:
        return world.core.create_namespaced_secret(world.namespace, {"metadata": {"name": name}})

    return make


def _account(world: World) -> object:
    about = {"metadata": {"name": LATE}}
    return world.core.create_namespaced_service_account(world.namespace, about)


def _priority(world: World) -> object:
    classes = client.SchedulingV1Api(world.core.api_client)
    return classes.create_priority_class({"metadata": {"name": _class(world)}, "value": 0})


def _runtime(world: World) -> object:
    classes = client.NodeV1Api(world.core.api_client)
    return classes.create_runtime_class({"metadata": {"name": _class(world)}, "handler": "any"})


def _class(world: World) -> str:
    """Name of a class, which is of no namespace."""
    return f"{world.namespace}.{LATE}"


def _missing(world: World) -> dict[str, Missing]:
    """By the name of the job that names it."""
    where, named = f"namespace {world.namespace}", _class(world)
    return {
        "priority": Missing(
            {"spec.scheduling": {"priorityClassName": named}},
            "Refused",
            (
                f"no PriorityClass with name {named} was found",
                f"make priority class {named} and the job goes on",
            ),
            _priority,
        ),
        "account": Missing(
            {"spec.trainer.serviceAccountName": LATE},
            "Refused",
            (f"{world.namespace}/{LATE}", f"make service account {LATE} and the job goes on"),
            _account,
        ),
        "runtime": Missing(
            {"spec.scheduling": {"pool": "sandboxed"}},
            "Refused",
            (f'"{named}" not found', f"make runtime class {named} and the job goes on"),
            _runtime,
        ),
        "secret": Missing(
            {"spec.trainer.secretRefs": [{"name": "hub"}]},
            "WaitingForSecret",
            (f"secret hub does not exist in {where}; make it and the job goes on",),
            _secret("hub"),
        ),
        "pull-secret": Missing(
            {"spec.trainer.imagePullSecrets": [{"name": "registry"}]},
            "ImagePullFailed",
            ("401 Unauthorized", f"pulled with secret registry of {where}: make it if missing"),
            _secret("registry"),
        ),
    }


POOL = (
    "there is no pool late; pools: pool-a, sandboxed",
    "edit the job, or the platform its settings, and it goes on",
)


def test_what_is_missing_is_told_and_holds_up_no_other_and_jobs_go_on_once_it_is_there(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(2)
    nodes.add(1, pool="sandboxed", prefix="sandboxed")
    jobs, settings = _missing(world), _settings(world)
    operator = start(settings=settings).wait_leading()
    for name, each in jobs.items():
        world.create(name, 1, each.changes)
    world.create("pool", 1, {"spec.scheduling": {"pool": LATE}})

    def stuck() -> bool:
        _play_kubelet(world)
        told = [world.says(name, each.reason, *each.words) for name, each in jobs.items()]
        return all(told) and world.says("pool", "InvalidSpec", *POOL)

    world.wait(stuck, "what is missing to be told")
    world.create("good", 2)
    world.wait(lambda: _runs(world, "good"), "another job to run beside them")
    assert stuck()
    _looks_seldom(operator, jobs=len(jobs))
    for each in jobs.values():
        each.make(world)
    for name in jobs:
        world.wait(lambda name=name: _runs(world, name), f"the job without its {name} to go on")
    assert world.says("pool", "InvalidSpec", *POOL)
    nodes.add(1, pool=LATE, prefix=LATE)
    operator.stop()
    settings["pools"][LATE] = {}
    start(identity="two", settings=settings)
    world.wait(lambda: _runs(world, "pool"), "the job without its pool to go on")
    assert all(world.status(name)["restarts"] == 0 for name in (*jobs, "pool", "good"))


def _settings(world: World) -> dict[str, Any]:
    return {
        "pools": {"pool-a": {}, "sandboxed": {"runtimeClassName": _class(world)}},
        "jobs": {
            "image": "test.invalid/trainer:1",
            "pool": "pool-a",
            "allowedServiceAccounts": [LATE],
        },
    }


def _runs(world: World, name: str) -> bool:
    _play_kubelet(world)
    return bool(world.status(name).get("phase") == "Running")


def _looks_seldom(operator: RunningOperator, jobs: int) -> None:
    """Jobs that wait are looked at now and then: until a refused pod is asked for once more."""
    operator.wait_quiet()
    asked = 'cptjob_api_calls_total{code="403",kind="Pod",verb="create"}'
    passes, refused = operator.passes(), operator.figure(asked) or 0
    operator.plane.wait(lambda: (operator.figure(asked) or 0) > refused, "another try")
    assert operator.passes() - passes <= 4 * jobs


def _play_kubelet(world: World) -> None:
    """Runs the pods that have a node and whose secrets are there; says of the others what lacks."""
    secrets = world.core.list_namespaced_secret(world.namespace).items
    known = {each.metadata.name for each in secrets}
    for pod in (*world.pods(), *world.pods("coordinator")):
        name, (container,) = pod.metadata.name, pod.spec.containers
        if pod.spec.node_name is None or pod.status.phase != "Pending":
            continue
        pull = [each.name for each in pod.spec.image_pull_secrets or ()]
        refs = [each.secret_ref.name for each in container.env_from or ()]
        if not known.issuperset(pull):
            said = f"failed to pull {container.image}: 401 Unauthorized"
            world.kubelet.wait_for(world.namespace, name, "ErrImagePull", said)
        elif not known.issuperset(refs):
            (lacking,) = {*refs} - known
            said = f'secret "{lacking}" not found'
            world.kubelet.wait_for(world.namespace, name, "CreateContainerConfigError", said)
        else:
            world.kubelet.run(world.namespace, name)
