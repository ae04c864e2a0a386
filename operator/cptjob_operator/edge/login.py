"""How the operator proves who it is: a service account's token, or a kubeconfig.

The token of a service account changes every hour or so; it is read anew each minute, and at once
when the API server refuses it. So are the certificates of the cluster's authority.
"""

import logging
import os
import time
from collections.abc import Callable

import aiohttp
import kopf
import yaml

log = logging.getLogger(__name__)

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
    """There is neither a service account nor a kubeconfig, or it cannot be used."""


def find() -> kopf.ConnectionInfo:
    """The credentials of the pod that this runs in, else those of $KUBECONFIG or ~/.kube/config.

    Raises LoginError.
    """
    settings = kopf.OperatorSettings()
    place = "the service account"
    try:
        info = kopf.login_with_service_account(settings=settings)
        if info is None:
            place = f"kubeconfig {os.environ.get('KUBECONFIG') or '~/.kube/config'}"
            info = kopf.login_with_kubeconfig(settings=settings)
    except Exception as error:  # kopf looks at nothing before it reads it
        raise LoginError(f"{place} cannot be used: {_why(error)}") from error
    if info is None:
        raise LoginError(
            "no credentials: run in a pod with a service account, or set KUBECONFIG to a file"
        )
    if not info.server:
        raise LoginError(f"{place} cannot be used: its cluster has no server")
    return info


def _why(error: Exception) -> str:
    match error:
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error}"
        case KeyError():
            return f"{error.args[0]!r} is missing in it"
        case yaml.MarkedYAMLError(problem_mark=yaml.Mark() as mark):
            return f"line {mark.line + 1} is no YAML"
        case kopf.LoginError() | ValueError():
            return str(error)
    return "it is no kubeconfig"


class Login:
    """Credentials that stay fresh. Raises LoginError when there are none at the start."""

    def __init__(
        self,
        find: Callable[[], kopf.ConnectionInfo] = find,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find, self._clock = find, clock
        self._info, self._read = find(), clock()
        try:
            self._trust = self._info.as_ssl_context()
        except (OSError, ValueError) as error:  # of ssl, too
            raise LoginError(f"certificates cannot be used: {_why(error)}") from error

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
        """Reads the credentials anew. True when they are others than before.

        What cannot be read now, as it is just being written, stays what it was.
        """
        before, self._read = self._info, self._clock()
        try:
            self._info = self._find()
            if self._info.ca_path or self._info.ca_data:
                # An authority that took over is trusted by new connections; the old one still is.
                found = self._info.as_ssl_context().get_ca_certs(binary_form=True)
                self._trust.load_verify_locations(cadata=b"".join(found))
        except (LoginError, OSError, ValueError) as error:
            log.warning("credentials are not renewed: %s", error)
        return self._info != before

    def session(
        self,
        connections: int,
        timeout: aiohttp.ClientTimeout | None = None,
        traces: list[aiohttp.TraceConfig] | None = None,
        request: type[aiohttp.ClientRequest] = aiohttp.ClientRequest,
    ) -> aiohttp.ClientSession:
        """At most so many connections; each request carries the credentials of that moment."""
        context = self._trust if self.server.startswith("https") else False
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=context),
            headers=_HEADERS,
            timeout=timeout or _TIMEOUT,
            middlewares=(self._sign,),
            trace_configs=traces,
            request_class=request,
        )

    async def _sign(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        request.headers.update(self.headers())
        return await handler(request)
