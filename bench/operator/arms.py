"""The two sides: CPTJobs, and plain Indexed Jobs with as many pods in all."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any, Protocol

from driver import COORDINATOR, JOBS, PLAIN_JOBS, PODS, READY, Client, Pods

CHILDREN = (
    "/api/v1/namespaces/{}/configmaps",
    "/api/v1/namespaces/{}/services",
    "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
)
_OURS = "labelSelector=app.kubernetes.io/managed-by%3Dcptjob-operator"
_CREATIONS_AT_ONCE = 16
_DELETIONS = 5
_TERMINATION = '{"exitCode": 0, "reason": "Complete", "message": "{}"}'


class Arm(Protocol):
    """One side. Jobs have `workers` workers; `pods_of` says how many pods that makes."""

    namespace: str

    def pods_of(self, workers: int) -> int: ...
    async def create(self, job: str, workers: int) -> None: ...
    async def clear(self) -> None: ...


class Ours:
    """CPTJobs. Their coordinators become ready when the bench says so, at once if `eager`.

    group: runs what makes them ready; a failure there ends the measurement.
    """

    def __init__(
        self, client: Client, namespace: str, pods: Pods, group: asyncio.TaskGroup
    ) -> None:
        self.client, self.namespace, self.pods = client, namespace, pods
        self.eager = False
        self._group = group
        pods.on_made = self._made

    def pods_of(self, workers: int) -> int:
        return workers + 1

    async def create(self, job: str, workers: int) -> None:
        spec = {
            "task": "CausalLM",
            "model": {"storageUri": "pvc://models/tiny"},
            "datasets": [{"name": "domain", "storageUri": "pvc://data/domain"}],
            "output": {"storageUri": "pvc://results/runs"},
            "trainer": {"numNodes": workers, "numProcPerNode": 1},
        }
        body = {
            "apiVersion": "training.cptjob.io/v1alpha1",
            "kind": "CPTJob",
            "metadata": {"name": job},
            "spec": spec,
        }
        await self.client.ask("POST", JOBS.format(self.namespace), body)

    def _made(self, name: str, _job: str, role: str) -> None:
        if role == COORDINATOR and self.eager:
            self._group.create_task(self.make_ready(name))

    async def make_ready(self, pod: str) -> None:
        await self.client.patch_pod(self.namespace, pod, READY)

    async def fail(self, pod: str) -> None:
        await self._end(pod, 1, "")

    async def succeed(self, pod: str) -> None:
        await self._end(pod, 0, _TERMINATION)

    async def _end(self, pod: str, code: int, message: str) -> None:
        ended = {
            "exitCode": code,
            "message": message,
            "reason": "Completed" if code == 0 else "Error",
            "finishedAt": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        }
        container = {
            "name": "trainer",
            "image": "a",
            "imageID": "a",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": ended},
        }
        status = {
            "phase": "Succeeded" if code == 0 else "Failed",
            "conditions": [{"type": "Ready", "status": "False"}],
            "containerStatuses": [container],
        }
        await self.client.patch_pod(self.namespace, pod, status)

    async def phase(self, job: str) -> str:
        found = await self.client.ask("GET", f"{JOBS.format(self.namespace)}/{job}")
        return str((found.get("status") or {}).get("phase"))

    async def clear(self) -> None:
        await _delete(self.client, JOBS.format(self.namespace))
        for each in CHILDREN:
            await _delete(self.client, each.format(self.namespace) + f"?{_OURS}")
        await _clear_pods(self.client, self.namespace, self.pods)


_BARE = {
    "restartPolicy": "Never",
    "nodeSelector": {"training.cptjob.io/pool": "pool-a"},
    "containers": [{"name": "trainer", "image": "test.invalid/trainer:1"}],
}


class Plain:
    """Indexed Jobs of batch/v1 with one pod more than workers, and nothing else.

    pod: the spec of their pods; by default as small as one can be.
    """

    def __init__(
        self, client: Client, namespace: str, pods: Pods, pod: dict[str, Any] | None = None
    ) -> None:
        self.client, self.namespace, self.pods = client, namespace, pods
        self._pod = _BARE if pod is None else pod

    def pods_of(self, workers: int) -> int:
        return workers + 1

    async def create(self, job: str, workers: int) -> None:
        count = self.pods_of(workers)
        body = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job},
            "spec": {
                "completionMode": "Indexed",
                "completions": count,
                "parallelism": count,
                "backoffLimit": 100,
                "template": {"spec": self._pod},
            },
        }
        await self.client.ask("POST", PLAIN_JOBS.format(self.namespace), body)

    async def clear(self) -> None:
        await _delete(self.client, PLAIN_JOBS.format(self.namespace))
        await _clear_pods(self.client, self.namespace, self.pods)


async def _delete(client: Client, path: str) -> None:
    """All of them. The API server gives up after a minute and has by then deleted some."""
    body = {"propagationPolicy": "Background", "gracePeriodSeconds": 0}
    for attempt in range(_DELETIONS):
        try:
            await client.ask("DELETE", path, body)
            return
        except RuntimeError as error:
            if ": 504 " not in str(error) or attempt == _DELETIONS - 1:
                raise


async def _clear_pods(client: Client, namespace: str, pods: Pods) -> None:
    """Until all are gone; the Job controller takes its finalizers away first."""
    deadline = time.monotonic() + 300
    while await client.count(PODS.format(namespace) + "?limit=1"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"pods of {namespace} do not go")
        await _delete(client, PODS.format(namespace))
        await asyncio.sleep(1.0)
    await pods.until(lambda: not pods.there)


async def create_all(arm: Arm, names: list[str], workers: int) -> None:
    """Sends the creations, some at once, as a pipeline would."""
    waiting = iter(names)

    async def work() -> None:
        for name in waiting:
            await arm.create(name, workers)

    await asyncio.gather(*(work() for _ in range(min(_CREATIONS_AT_ONCE, len(names)))))
