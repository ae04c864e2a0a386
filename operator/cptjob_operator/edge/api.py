"""The one edge to the API server: JSON documents over HTTP, errors translated, writes held back.

The official client is not used: importing it costs 45 MiB, more than the state of 1,000 jobs, and
the operator needs nine requests of it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from aiohttp.connector import Connection
from pydantic_core import from_json, to_json

from cptjob_operator.edge.api_errors import NotLeader, Unavailable, refused
from cptjob_operator.edge.kinds import Kind
from cptjob_operator.edge.login import Login

Document = dict[str, Any]

#: Objects in one answer to a list: large ones would double the operator's memory while they are read.
CHUNK = 200
_MERGE = "application/merge-patch+json"
#: JSON is YAML, and costs less.
_APPLY = "application/apply-patch+yaml"
_JSON = "application/json"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


class Watch(Protocol):
    """Is told each request: its verb, kind, status code (or the name of an error), seconds."""

    def __call__(self, verb: str, kind: str, code: str, seconds: float) -> None: ...


class Bucket:
    """Tokens for writes: `rate` a second, `burst` at once."""

    def __init__(
        self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._since = float(burst), clock()

    async def take(self) -> None:
        """Returns when a write may be sent; in the order of the calls."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._since) * self._rate)
        self._since = now
        self._tokens -= 1.0
        if self._tokens < 0.0:
            await asyncio.sleep(-self._tokens / self._rate)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, and the version at which the whole list was true."""

    items: list[Document]
    version: int


def _guarded(may_write: Callable[[], bool]) -> type[aiohttp.ClientRequest]:
    """Requests that ask once they have a connection.

    Nothing waits between this and the first byte, and what is sent a second time asks again.
    """

    class Request(aiohttp.ClientRequest):
        async def send(self, conn: Connection) -> aiohttp.ClientResponse:
            if self.method != "GET" and not may_write():
                raise NotLeader("another operator leads", "NotLeader")
            return await super().send(conn)

    return Request


class Api:
    """Requests as one identity. Each raises an ApiError, and nothing else, when it fails.

    may_write: asked before each write is sent; False makes it raise NotLeader.
    """

    def __init__(
        self,
        login: Login,
        *,
        manager: str,
        bucket: Bucket | None = None,
        may_write: Callable[[], bool] = lambda: True,
        watch: Watch = lambda verb, kind, code, seconds: None,
        connections: int = 64,
    ) -> None:
        self._login = login
        self._manager = manager
        self._bucket = bucket
        self._watch = watch
        self._session = login.session(connections, request=_guarded(may_write))

    async def close(self) -> None:
        await self._session.close()

    # --- reads ---

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Document:
        return await self._ask("GET", "get", kind, kind.path(namespace, name))

    async def pages(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        metadata_only: bool = False,
    ) -> AsyncIterator[Page]:
        """All objects of a kind, a page at a time; of every namespace when none is given.

        Raises Gone when the pages took so long that the rest of the list is no longer known.
        """
        query = {"limit": str(CHUNK)}
        if labels:
            query["labelSelector"] = labels
        if fields:
            query["fieldSelector"] = fields
        headers = {"Accept": _METADATA} if metadata_only else None
        while True:
            answer = await self._ask(
                "GET", "list", kind, kind.path(namespace), query=query, headers=headers
            )
            about = answer.get("metadata") or {}
            yield Page(answer.get("items") or [], int(about.get("resourceVersion") or 0))
            if not about.get("continue"):
                return
            query["continue"] = about["continue"]

    # --- writes ---

    async def post(self, kind: Kind, namespace: str | None, body: Mapping[str, Any]) -> Document:
        query = {"fieldManager": self._manager}
        return await self._write("POST", "create", kind, kind.path(namespace), body, query=query)

    async def apply(self, kind: Kind, namespace: str | None, body: Mapping[str, Any]) -> Document:
        """Server-side apply: what `body` names becomes ours and reads as it says."""
        path = kind.path(namespace, body["metadata"]["name"])
        query = {"fieldManager": self._manager, "force": "true"}
        return await self._write("PATCH", "apply", kind, path, body, _APPLY, query)

    async def put(
        self, kind: Kind, namespace: str | None, name: str, body: Mapping[str, Any]
    ) -> Document:
        return await self._write("PUT", "update", kind, kind.path(namespace, name), body)

    async def patch_status(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        patch: Mapping[str, Any],
        version: str,
        uid: str,
    ) -> Document:
        """Merges `patch` into the status, if the object is still that version of that object."""
        body = {"metadata": {"resourceVersion": version, "uid": uid}, "status": patch}
        path = kind.path(namespace, name, "status")
        query = {"fieldManager": self._manager}
        return await self._write("PATCH", "patch", kind, path, body, _MERGE, query)

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str,
        grace_seconds: int | None = None,
    ) -> Document:
        """Deletes the object if it is still the one of that uid; else raises Conflict."""
        body: Document = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        return await self._write("DELETE", "delete", kind, kind.path(namespace, name), body)

    # --- one request ---

    async def _write(
        self,
        method: str,
        verb: str,
        kind: Kind,
        path: str,
        body: Mapping[str, Any],
        content_type: str = _JSON,
        query: Mapping[str, str] | None = None,
    ) -> Document:
        if self._bucket is not None:
            await self._bucket.take()
        data = to_json(body)
        return await self._ask(
            method, verb, kind, path, data, {"Content-Type": content_type}, query
        )

    async def _ask(
        self,
        method: str,
        verb: str,
        kind: Kind,
        path: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Document:
        begun = time.perf_counter()
        code = "error"
        try:
            status, body, answered = await self._send(method, path, data, headers, query)
            code = str(status)
            if status == 401 and self._login.renew():
                status, body, answered = await self._send(method, path, data, headers, query)
                code = str(status)
        except NotLeader:
            code = "NotLeader"
            raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}", type(error).__name__) from error
        finally:
            self._watch(verb, kind.name, code, time.perf_counter() - begun)
        if status >= 300:
            raise refused(status, body, answered)
        try:
            document = from_json(body, cache_strings="keys")
        except ValueError as error:
            raise Unavailable(f"{path}: the answer is not JSON", status) from error
        if not isinstance(document, dict):
            raise Unavailable(f"{path}: the answer is not a JSON object", status)
        return document

    async def _send(
        self,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str] | None,
        query: Mapping[str, str] | None,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        async with self._session.request(
            method,
            self._login.server + path,
            data=data,
            headers=headers,
            params=query,
            allow_redirects=False,
        ) as answer:
            return answer.status, await answer.read(), answer.headers
