"""How the operator proves who it is: a service account's token, or a kubeconfig.

The token of a service account changes every hour or so; it is read anew each minute, and at once
when the API server refuses it.
"""

import time
from collections.abc import Callable

import aiohttp
import kopf

_AGE_SECONDS = 60.0
#: No single request takes longer than this; what it did is then unknown.
_TIMEOUT = aiohttp.ClientTimeout(total=20.0, sock_connect=5.0)
#: The API server is near: packing its answers would cost more time than it saves.
_HEADERS = {
    "User-Agent": "cptjob-operator",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
}


class LoginError(Exception):
    """There is neither a service account nor a kubeconfig."""


def find() -> kopf.ConnectionInfo:
    """The credentials of the pod that this runs in, else those of $KUBECONFIG or ~/.kube/config."""
    settings = kopf.OperatorSettings()
    info = kopf.login_with_service_account(settings=settings)
    if info is None:
        info = kopf.login_with_kubeconfig(settings=settings)
    if info is None:
        raise LoginError(
            "no credentials: run in a pod with a service account, or set KUBECONFIG to a file"
        )
    return info


class Login:
    """Credentials that stay fresh."""

    def __init__(
        self,
        find: Callable[[], kopf.ConnectionInfo] = find,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find, self._clock = find, clock
        self._info, self._read = find(), clock()

    @property
    def server(self) -> str:
        """Address of the API server, such as https://10.96.0.1."""
        return self._info.server.rstrip("/")

    def headers(self) -> dict[str, str]:
        """What goes with each request."""
        if self._clock() - self._read > _AGE_SECONDS:
            self.renew()
        return self._info.as_http_headers()

    def renew(self) -> bool:
        """Reads the credentials anew. True when they are others than before."""
        before, self._read = self._info, self._clock()
        self._info = self._find()
        return self._info != before

    def session(
        self,
        connections: int,
        timeout: aiohttp.ClientTimeout | None = None,
        traces: list[aiohttp.TraceConfig] | None = None,
    ) -> aiohttp.ClientSession:
        """At most so many connections; each request carries the credentials of that moment."""
        context = self._info.as_ssl_context() if self.server.startswith("https") else False
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=context),
            headers=_HEADERS,
            timeout=timeout or _TIMEOUT,
            middlewares=(self._sign,),
            trace_configs=traces,
        )

    async def _sign(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        request.headers.update(self.headers())
        return await handler(request)
