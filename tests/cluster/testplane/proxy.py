"""A proxy between one client and the API server that does harm at a chosen moment.

    with FaultProxy(plane, folder) as proxy:
        operator = start_operator(proxy.kubeconfig())
        killed = proxy.kill_before(3, operator.kill)  # the API server did the third write
        ...
        assert killed.wait()

Writes (POST, PUT, PATCH, DELETE) are numbered from 1 in the order in which they arrive. Give each
client a proxy of its own, or the numbers mean nothing. It speaks HTTP/1.1 over TLS, runs in a thread
of its own, and passes everything else on as it is, watches included. `exec` and its like are not
passed on.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import trustme
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from testplane.plane import ControlPlane

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
PATIENCE_SECONDS = 120.0  # a limit for a loaded machine, no measure
# A client gets this long after a response to ask for more, before it is killed "after" that response.
DIGEST_SECONDS = 0.25
# What an API server says that has too much to do.
RETRY_AFTER_SECONDS = 1
# Headers that speak of one connection only.
_OWN_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
REASONS = {
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
T = TypeVar("T")


@dataclass
class Call:
    """One request. number: of a counted write, else 0. code: None until the API server answered."""

    method: str
    path: str
    query: str
    body: bytes
    number: int = 0
    code: int | None = None

    @property
    def resource(self) -> str:
        """Plural name, with the subresource: `pods`, `cptjobs/status`."""
        parts = self.path.strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        if (
            parts[:1] == ["namespaces"]
            and len(parts) > 2
            and parts[2] not in ("status", "finalize")
        ):
            parts = parts[2:]
        return "/".join([*parts[:1], *parts[2:]])


class Trigger:
    """Something that shall happen at a write; `wait` says whether it did."""

    def __init__(self, release: Callable[[], object] = lambda: None) -> None:
        self._happened = threading.Event()
        self.release = release

    @property
    def happened(self) -> bool:
        return self._happened.is_set()

    def wait(self, seconds: float = PATIENCE_SECONDS) -> bool:
        return self._happened.wait(seconds)

    def _set(self) -> None:
        self._happened.set()


@dataclass(eq=False)
class _Rule:
    """What happens at a write.

    forwarded: whether the API server gets the write.
    answer: sent in place of the API server's answer.
    kill: ends the client, before its answer is sent or (`digested`) when it has had that.
    gate: the write waits for it before it is passed on.
    """

    trigger: Trigger = field(default_factory=Trigger)
    forwarded: bool = True
    answer: tuple[int, dict[str, Any]] | None = None
    kill: Callable[[], object] | None = None
    digested: bool = False
    gate: asyncio.Event | None = None


@dataclass(eq=False)
class _Watch:
    key: str
    request: web.BaseRequest


@dataclass(eq=False)
class _Freeze:
    """From the write at which the client is killed on, no other write of it is passed on."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)


def _all_but_leases(call: Call) -> bool:
    return call.resource != "leases"


class FaultProxy:
    """One client's way to the API server.

    counts: which writes get a number. Leases are written by the clock, so by default they get none.
    """

    def __init__(
        self,
        plane: ControlPlane,
        folder: Path,
        *,
        counts: Callable[[Call], bool] = _all_but_leases,
    ) -> None:
        self._plane = plane
        self._folder = folder
        self._counts = counts
        self._rules: dict[int, _Rule] = {}
        self._calls: list[Call] = []
        self._number = 0
        self._freeze: _Freeze | None = None
        self._watches: set[_Watch] = set()
        self._expired: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.latency = 0.0  # seconds before each request is passed on
        self.url = ""

    # --- life ---

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca))
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(self._tls)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._in_loop(self._open())

    def stop(self) -> None:
        if self._thread is None:
            return
        self._in_loop(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._thread = None

    @property
    def ca(self) -> Path:
        return self._folder / "proxy-ca.crt"

    def kubeconfig(self, token: str | None = None) -> Path:
        """A kubeconfig that leads through this proxy, of an administrator unless told otherwise."""
        return self._plane.write_kubeconfig(
            self._folder / "kubeconfig", token or self._plane.token, self.url, self.ca
        )

    # --- what passed ---

    @property
    def calls(self) -> list[Call]:
        """Every request since the start or `reset`, in the order of arrival."""
        with self._lock:
            return list(self._calls)

    @property
    def writes(self) -> list[Call]:
        """The writes that have a number."""
        return [call for call in self.calls if call.number]

    def reset(self) -> None:
        """Forgets what passed and every rule; the next write is number 1."""
        with self._lock:
            self._calls.clear()
            self._rules.clear()
            self._number = 0

    # --- harm to writes ---

    def kill_before(self, number: int, kill: Callable[[], object]) -> Trigger:
        """Calls `kill` when the API server has done this write and before the client hears of it.

        `kill` shall end the client at once (SIGKILL). No later write reaches the API server.
        """
        return self._rule(number, _Rule(kill=kill))

    def kill_after(self, number: int, kill: Callable[[], object]) -> Trigger:
        """Calls `kill` when the client has the answer to this write, before it writes again.

        That is when it next asks to write, or a moment later when it does not.
        """
        return self._rule(number, _Rule(kill=kill, digested=True))

    def fail(
        self, number: int, code: int, *, message: str = "by the proxy", reaches: bool = False
    ) -> Trigger:
        """This write is answered with a failure. reaches: but the API server did it all the same.

        429 comes with Retry-After, as from an API server that has too much to do.
        """
        return self._rule(number, _Rule(forwarded=reaches, answer=(code, status(code, message))))

    def hold(self, number: int) -> Trigger:
        """This write waits on its way to the API server for the trigger's `release`.

        Then it arrives, even if its client has died meanwhile.
        """
        gate = asyncio.Event()
        trigger = Trigger(release=lambda: self._loop.call_soon_threadsafe(gate.set))
        return self._rule(number, _Rule(trigger, gate=gate))

    def _rule(self, number: int, rule: _Rule) -> Trigger:
        with self._lock:
            if number <= self._number:
                raise ValueError(f"write {number} has passed already; there were {self._number}")
            self._rules[number] = rule
        return rule.trigger

    # --- harm to watches ---

    def cut_watches(self, *, expire: bool = False) -> int:
        """Breaks every open watch off and says how many there were.

        expire: each gets 410 Gone when it comes back with its resourceVersion, and must list anew.
        """
        return self._in_loop(self._cut(expire))

    @contextmanager
    def no_watches(self, *, expire: bool = False) -> Iterator[None]:
        """Breaks every watch off and lets none come back until the end of the with statement."""
        self._loop.call_soon_threadsafe(self._watching.clear)
        try:
            self.cut_watches(expire=expire)
            yield
        finally:
            self._loop.call_soon_threadsafe(self._watching.set)

    @property
    def open_watches(self) -> int:
        return len(self._watches)

    # --- the thread ---

    def _in_loop(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_SECONDS)

    async def _open(self) -> None:
        self._watching = asyncio.Event()
        self._watching.set()
        upstream = ssl.create_default_context(cafile=str(self._plane.ca))
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            connector=aiohttp.TCPConnector(limit=0, ssl=upstream),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        server = web.Server(
            self._handle, access_log=None, handler_cancellation=True, auto_decompress=False
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.url = f"https://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        for watch in list(self._watches):
            _abort(watch.request)
        await self._runner.cleanup()
        await self._session.close()

    async def _cut(self, expire: bool) -> int:
        watches = list(self._watches)
        if expire:
            self._expired |= {watch.key for watch in watches}
        for watch in watches:
            _abort(watch.request)
            self._watches.discard(watch)
        return len(watches)

    # --- requests ---

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.content.read()
        call = Call(request.method, request.path, request.query_string, body)
        rule = self._note(call)
        if self.latency:
            await asyncio.sleep(self.latency)
        if call.method in WRITES:
            return await self._write(request, call, rule)
        if request.query.get("watch", "").lower() in ("1", "t", "true"):
            return await self._watch(request, call)
        return await self._answer(request, call)

    def _note(self, call: Call) -> _Rule | None:
        with self._lock:
            self._calls.append(call)
            if call.method not in WRITES or not self._counts(call):
                return None
            self._number += 1
            call.number = self._number
            return self._rules.pop(call.number, None)

    async def _write(
        self, request: web.BaseRequest, call: Call, rule: _Rule | None
    ) -> web.StreamResponse:
        if self._freeze is not None and call.number:
            self._freeze.asked.set()
            await self._freeze.over.wait()
            return _broken(request)
        if rule is None:
            return await self._answer(request, call)
        if rule.kill is not None:
            return await self._kill(request, call, rule)
        rule.trigger._set()
        if rule.answer is None:
            return await self._answer(request, call, rule.gate)
        if rule.forwarded:
            await self._answer(request, call)
        call.code, document = rule.answer
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if call.code == 429 else None
        return web.json_response(document, status=call.code, headers=headers)

    async def _kill(self, request: web.BaseRequest, call: Call, rule: _Rule) -> web.StreamResponse:
        assert rule.kill is not None
        self._freeze = freeze = _Freeze()
        try:
            response = await self._answer(request, call)
            if rule.digested:
                await response.prepare(request)
                await response.write_eof()
                with suppress(TimeoutError):
                    await asyncio.wait_for(freeze.asked.wait(), DIGEST_SECONDS)
            rule.kill()
            rule.trigger._set()
        finally:
            self._freeze = None
            freeze.over.set()
        return _broken(request)

    async def _answer(
        self, request: web.BaseRequest, call: Call, gate: asyncio.Event | None = None
    ) -> web.StreamResponse:
        """The API server's answer. What is under way goes on when the client is gone."""
        asked = asyncio.ensure_future(self._ask(request, call, gate))
        try:
            code, headers, body = await asyncio.shield(asked)
        except aiohttp.ClientError:
            return _broken(request)
        return web.Response(status=code, headers=headers, body=body)

    async def _ask(
        self, request: web.BaseRequest, call: Call, gate: asyncio.Event | None
    ) -> tuple[int, CIMultiDict[str], bytes]:
        if gate is not None:
            await gate.wait()
        async with self._session.request(
            call.method,
            self._address(request),
            headers=_passed(request.headers),
            data=call.body or None,
        ) as answer:
            body = await answer.read()
            call.code = answer.status
            return answer.status, _passed(answer.headers), body

    async def _watch(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        key = _watch_key(request)
        await self._watching.wait()
        if key in self._expired and request.query.get("resourceVersion", "0") not in ("", "0"):
            self._expired.discard(key)
            event = {"type": "ERROR", "object": status(410, "too old resource version")}
            return web.Response(text=json.dumps(event) + "\n", content_type="application/json")
        watch = _Watch(key, request)
        self._watches.add(watch)
        try:
            async with self._session.get(
                self._address(request), headers=_passed(request.headers)
            ) as answer:
                call.code = answer.status
                response = web.StreamResponse(status=answer.status, headers=_passed(answer.headers))
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except (aiohttp.ClientError, ConnectionError):
            return _broken(request)
        finally:
            self._watches.discard(watch)

    def _address(self, request: web.BaseRequest) -> URL:
        return URL(self._plane.url + request.raw_path, encoded=True)


def status(code: int, message: str) -> dict[str, Any]:
    """A failure as the API server tells it."""
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": REASONS.get(code, "Unknown"),
        "code": code,
    }


def _watch_key(request: web.BaseRequest) -> str:
    """What is watched, without from where on."""
    query = {
        key: value
        for key, value in request.query.items()
        if key not in ("resourceVersion", "timeoutSeconds", "resourceVersionMatch")
    }
    return request.path + json.dumps(query, sort_keys=True)


def _passed(headers: Any) -> CIMultiDict[str]:
    return CIMultiDict(
        (key, value) for key, value in headers.items() if key.lower() not in _OWN_HEADERS
    )


def _abort(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.abort()


def _broken(request: web.BaseRequest) -> web.StreamResponse:
    """For a client that shall get no (further) answer."""
    _abort(request)
    return web.Response(status=502)
