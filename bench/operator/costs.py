"""What each request costs the API server, in time of its processor, beside that of a plain pod.

It explains a rate: on a machine whose cores are all busy, a job costs what its requests cost.
"""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from arms import CHILDREN
from driver import COORDINATOR, JOBS, PODS, Client
from measures import WORKER, WORKERS, Sides
from stage import STILL, Stage, cpu_seconds

_TIMES = 100
_PAUSE_SECONDS = 1.0
_SERVERS_OWN = (
    *("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"),
    "ownerReferences",
)

Object = dict[str, Any]


@dataclass
class Parts:
    """A job as it stands when its workers wait for nodes, and what was made for it, by name."""

    job: Object
    objects: dict[str, tuple[str, Object]] = field(default_factory=dict)


async def parts(at: Sides) -> Parts:
    """Lets the operator make one job, and takes it apart."""
    arm, client, namespace = at.ours, at.client, at.ours.namespace
    arm.eager = True
    await arm.create("whole", WORKERS)
    await arm.pods.until(lambda: arm.pods.of_job["whole", WORKER] == WORKERS)
    await asyncio.sleep(2 * _PAUSE_SECONDS)
    found = Parts(await client.ask("GET", f"{JOBS.format(namespace)}/whole"))
    for path in (each.format(namespace) for each in CHILDREN):
        (child,) = (await client.ask("GET", f"{path}?labelSelector=training.cptjob.io/job-name"))[
            "items"
        ]
        found.objects[path.rsplit("/", 1)[1]] = path, child
    path = PODS.format(namespace)
    for role in (COORDINATOR, WORKER):
        name = arm.pods.names["whole", role][0]
        found.objects[f"pods: {role}"] = path, await client.ask("GET", f"{path}/{name}")
    arm.eager = False
    await arm.clear()
    return found


async def costs(stage: Stage, whole: Parts) -> dict[str, float]:
    """Milliseconds of the API server for each request, with no operator at work."""
    namespace, found = STILL[0], {}
    jobs = JOBS.format(namespace)
    async with Client(stage.plane) as client:

        async def ask(name: str, request: Callable[[int], Awaitable[object]]) -> None:
            found[name] = await _cost(stage, request)

        async def patch(number: int, status: Object) -> None:
            kind = "application/merge-patch+json"
            await client.ask("PATCH", f"{jobs}/job-{number}/status", {"status": status}, kind)

        status = whole.job["status"]
        await ask("create CPTJob", lambda n: client.ask("POST", jobs, _copy(whole.job, f"job-{n}")))
        await ask("first status", lambda n: patch(n, status))
        await ask("a later status", lambda n: patch(n, {"replicas": n + WORKERS + 1}))
        for name, (path, body) in {**whole.objects, "pods: plain": _plain(namespace)}.items():
            prefix = name.replace(": ", "-")
            await ask(
                f"create {name}",
                lambda n, path=path, body=body, prefix=prefix: client.ask(  # type: ignore[misc]
                    "POST", path, _copy(body, f"{prefix}-{n}")
                ),
            )
    return found


async def _cost(stage: Stage, request: Callable[[int], Awaitable[object]]) -> float:
    pid = stage.plane.daemons["kube-apiserver"].pid
    loop = asyncio.get_running_loop()
    await asyncio.sleep(_PAUSE_SECONDS)
    begun, before = loop.time(), cpu_seconds(pid)
    await asyncio.sleep(_PAUSE_SECONDS)
    idle = (cpu_seconds(pid) - before) / (loop.time() - begun)
    begun, before = loop.time(), cpu_seconds(pid)
    for number in range(_TIMES):
        await request(number)
    await asyncio.sleep(_PAUSE_SECONDS / 2)  # watchers are served
    spent = cpu_seconds(pid) - before - idle * (loop.time() - begun)
    return spent / _TIMES * 1000


def _copy(body: Object, name: str) -> Object:
    """An object like this one, of that name, as a client sends it. Its pods stay where they are."""
    made = copy.deepcopy(body)
    made.pop("status", None)
    about, spec = made["metadata"], made.get("spec", {})
    for each in _SERVERS_OWN:
        about.pop(each, None)
    about["name"] = name
    if "clusterIPs" in spec:
        spec |= {"clusterIP": "None"}
        del spec["clusterIPs"]
    if "containers" in spec:
        spec.pop("nodeName", None)
        spec["schedulingGates"] = [{"name": "example.com/held"}]
    return made


def _plain(namespace: str) -> tuple[str, Object]:
    containers = [{"name": "trainer", "image": "test.invalid/trainer:1"}]
    spec = {"restartPolicy": "Never", "containers": containers}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": spec}
    return PODS.format(namespace), body
