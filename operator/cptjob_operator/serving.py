"""What the operator itself serves: /metrics, /healthz, /readyz."""

import asyncio
from collections.abc import Callable

from aiohttp import web


class Probes:
    """Answers of the probes.

    healthy, ready: what is wrong, in words; empty when nothing is. An event loop that is stuck
    answers neither, which to a kubelet is the same.
    """

    def __init__(self, healthy: Callable[[], str], ready: Callable[[], str]) -> None:
        self._healthy, self._ready = healthy, ready

    async def healthz(self, request: web.Request) -> web.Response:
        return _answer(self._healthy())

    async def readyz(self, request: web.Request) -> web.Response:
        return _answer(self._ready())


def _answer(wrong: str) -> web.Response:
    return web.Response(status=503 if wrong else 200, text=(wrong or "ok") + "\n")


async def serve(
    probes: Probes, text: Callable[[], bytes], probe_port: int, metrics_port: int
) -> None:
    """Serves until it is cancelled. Port 0 is any free one; both may be the same."""
    probing, metering = web.Application(), web.Application()
    if probe_port == metrics_port != 0:
        metering = probing
    probing.add_routes([web.get("/healthz", probes.healthz), web.get("/readyz", probes.readyz)])

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=text(), content_type="text/plain", charset="utf-8")

    metering.add_routes([web.get("/metrics", metrics)])
    runners: list[web.AppRunner] = []
    try:
        for application, port in {
            id(probing): (probing, probe_port),
            id(metering): (metering, metrics_port),
        }.values():
            runner = web.AppRunner(application, access_log=None, handle_signals=False)
            runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, None, port).start()
        await asyncio.Event().wait()
    finally:
        for runner in runners:
            await runner.cleanup()
