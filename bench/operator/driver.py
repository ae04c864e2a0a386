"""The bench's own way to the API server: one process that asks little and notes when pods appear."""

import asyncio
import contextlib
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Self

import aiohttp
from pydantic_core import from_json, to_json

from testplane.plane import ControlPlane

#: A limit for whatever is waited for, so that a bench ends by itself.
PATIENCE_SECONDS = 420.0
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_JOB_LABELS = ("training.cptjob.io/job-name", "batch.kubernetes.io/job-name")
_ROLE = "training.cptjob.io/role"
COORDINATOR = "coordinator"

JOBS = "/apis/training.cptjob.io/v1alpha1/namespaces/{}/cptjobs"
PLAIN_JOBS = "/apis/batch/v1/namespaces/{}/jobs"
PODS = "/api/v1/namespaces/{}/pods"

#: What a kubelet says of a pod whose containers run.
READY = {
    "phase": "Running",
    "conditions": [
        {"type": kind, "status": "True"} for kind in ("Initialized", "ContainersReady", "Ready")
    ],
}


class Client:
    """Requests of an administrator."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def __aenter__(self) -> Self:
        context = ssl.create_default_context(cafile=str(self._plane.ca))
        self._session = aiohttp.ClientSession(
            self._plane.url,
            connector=aiohttp.TCPConnector(limit=48, ssl=context),
            headers={"Authorization": f"Bearer {self._plane.token}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self, method: str, path: str, body: Any = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        """The answer. Raises RuntimeError when the API server refuses."""
        data = None if body is None else to_json(body)
        headers = {"Content-Type": kind}
        async with self._session.request(method, path, data=data, headers=headers) as answer:
            text = await answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
            document: dict[str, Any] = from_json(text)
            return document

    async def patch_pod(self, namespace: str, name: str, status: Mapping[str, Any]) -> None:
        """Plays the kubelet: conditions are merged by their types."""
        path = f"{PODS.format(namespace)}/{name}/status"
        kind = "application/strategic-merge-patch+json"
        await self.ask("PATCH", path, {"status": status}, kind)

    async def count(self, path: str) -> int:
        """Number of objects in a list."""
        return len((await self.ask("GET", path))["items"])

    @contextlib.asynccontextmanager
    async def pods(self, namespace: str) -> AsyncIterator["Pods"]:
        """The pods of a namespace as they come and go."""
        pods = Pods()
        listed = await self.ask("GET", PODS.format(namespace) + "?limit=1")
        pods.version = listed["metadata"]["resourceVersion"]
        watching = asyncio.create_task(self._follow(PODS.format(namespace), pods))
        watching.add_done_callback(lambda _: pods.wake())
        pods.watching = watching
        try:
            yield pods
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _follow(self, path: str, pods: "Pods") -> None:
        """The API server ends a watch whose client falls behind: it goes on where it was."""
        while True:
            await self._watch(path, pods)
            print(f"the watch of {path} goes on", file=sys.stderr)

    async def _watch(self, path: str, pods: "Pods") -> None:
        query = f"?watch=1&resourceVersion={pods.version}&timeoutSeconds=3600"
        async with self._session.get(path + query, headers={"Accept": _METADATA}) as answer:
            answer.raise_for_status()
            buffer = b""
            async for part in answer.content.iter_any():
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    pods.heard(from_json(line))


class Pods:
    """What a watch told: names, jobs, and when each was first heard of."""

    def __init__(self) -> None:
        self.made: dict[str, float] = {}
        self.there: set[str] = set()
        self.of_job: Counter[tuple[str, str]] = Counter()  # pods ever made, by job and role
        self.names: dict[tuple[str, str], list[str]] = {}
        self.on_made: Callable[[str, str, str], object] = lambda name, job, role: None
        self.version = ""
        self.watching: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def wake(self) -> None:
        self._news.set()

    def heard(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "ERROR":
            raise RuntimeError(f"a watch of the bench failed: {event}")
        about = event["object"]["metadata"]
        self.version = about["resourceVersion"]
        name = about["name"]
        if event["type"] == "ADDED":
            self.made[name] = time.perf_counter()
            self.there.add(name)
            labels = about.get("labels") or {}
            job = next((labels[each] for each in _JOB_LABELS if each in labels), "")
            role = labels.get(_ROLE, "")
            self.of_job[job, role] += 1
            self.names.setdefault((job, role), []).append(name)
            self.on_made(name, job, role)
        elif event["type"] == "DELETED":
            self.there.discard(name)
        self._news.set()

    async def until(self, happened: Callable[[], bool]) -> float:
        """Waits for news until `happened`. Returns the time; raises TimeoutError."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not happened():
                if self.watching is not None and self.watching.done():
                    self.watching.result()
                self._news.clear()
                await self._news.wait()
        return time.perf_counter()
