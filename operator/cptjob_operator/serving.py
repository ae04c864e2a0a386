"""What the operator itself serves: /metrics, /healthz, /readyz."""

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

#: The event loop was away for longer than this: something blocks it.
_STUCK_SECONDS = 30.0
_BEAT_SECONDS = 1.0


class Probes:
    """Answers of the probes.

    healthy, ready: what is wrong, in words; empty when nothing is.
    """

    def __init__(self, healthy: Callable[[], str], ready: Callable[[], str]) -> None:
        self._healthy, self._ready = healthy, ready
        self._beat = time.monotonic()

    async def run(self) -> None:
        """Beats until it is cancelled."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_BEAT_SECONDS)

    async def healthz(self, request: web.Request) -> web.Response:
        away = time.monotonic() - self._beat
        return _answer(
            f"the event loop was away for {away:.0f} s"
            if away > _STUCK_SECONDS
            else self._healthy()
        )

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
        await probes.run()
    finally:
        for runner in runners:
            await runner.cleanup()
