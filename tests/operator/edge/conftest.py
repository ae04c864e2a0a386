"""Objects as the API server sends them, and an HTTP server that answers as a test tells it to."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import kopf
import pytest
from aiohttp import web

from cptjob_operator.edge.api import Api
from cptjob_operator.edge.login import Login
from cptjob_operator.identity import PodId, Role, owner

Document = dict[str, Any]
UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def job_body(version: int = 1, name: str = "job", uid: str = UID, **status: Any) -> Document:
    return {
        "apiVersion": "training.cptjob.io/v1alpha1",
        "kind": "CPTJob",
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": uid,
            "generation": 1,
            "resourceVersion": str(version),
        },
        "spec": {},
        "status": status,
    }


def pod_body(version: int = 1, index: int = 0, phase: str = "Running", **more: Any) -> Document:
    """A worker of the job of `UID`; `more` goes into its status."""
    identity = PodId(UID, 0, Role.WORKER, index, 0)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": identity.name("job"),
            "namespace": "team",
            "uid": f"pod-{index}",
            "resourceVersion": str(version),
            "labels": identity.labels("job"),
            "ownerReferences": [owner("job", UID)],
            "creationTimestamp": "2026-01-31T12:00:00Z",
        },
        "spec": {"containers": [{"name": "main"}]},
        "status": {"phase": phase, **more},
    }


class Server:
    """Answers requests as `answer` says, and remembers them."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.answer: Answer = _not_found
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> "Server":
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        return await self.answer(request)

    def api(self, **more: Any) -> Api:
        """An Api that asks this server."""
        address = f"http://127.0.0.1:{self.port}"
        return Api(
            Login(lambda: kopf.ConnectionInfo(server=address, token="old")), manager="test", **more
        )


async def _not_found(request: web.Request) -> web.StreamResponse:
    return web.json_response({"message": "no such thing"}, status=404)


With = Callable[[Callable[[Server], Awaitable[None]]], None]


@pytest.fixture(name="with_server")
def run_with_server() -> With:
    """`with_server(test)` runs `await test(server)` in an event loop of its own."""

    def run(test: Callable[[Server], Awaitable[None]]) -> None:
        async def body() -> None:
            server = await Server().start()
            try:
                await asyncio.wait_for(test(server), timeout=60)
            finally:
                await server.stop()

        asyncio.run(body())

    return run


@pytest.fixture(name="job_body")
def give_job_body() -> Callable[..., Document]:
    return job_body


@pytest.fixture(name="pod_body")
def give_pod_body() -> Callable[..., Document]:
    return pod_body
