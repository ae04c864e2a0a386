"""Lists of everything that there is, at the start and now and then.

Watches tell what changes while they hold. Lists tell what went while none did, and what nobody
watches: the children of jobs.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from cptjob_operator.edge import kinds
from cptjob_operator.edge.api import Api, Document
from cptjob_operator.edge.api_errors import ApiError
from cptjob_operator.edge.cache import Cache
from cptjob_operator.identity import OURS, JobKey

log = logging.getLogger(__name__)

_RETRY_SECONDS = 3.0


class _Seen(NamedTuple):
    """An object of a list."""

    key: JobKey
    uid: str


class Lister:
    """Keeps `cache` whole. namespaces: those that are watched; none means all."""

    def __init__(self, api: Api, cache: Cache, namespaces: tuple[str, ...], seconds: float) -> None:
        self._api, self._cache, self._seconds = api, cache, seconds
        self._namespaces: tuple[str | None, ...] = namespaces or (None,)
        self._soon = asyncio.Event()
        self._lock = asyncio.Lock()
        self._done = -math.inf

    @property
    def synced(self) -> bool:
        """Everything was listed at least once."""
        return self._done > -math.inf

    def soon(self) -> None:
        """Asks for new lists, after a gap in a watch."""
        self._soon.set()

    async def run(self) -> None:
        """Lists at intervals until it is cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._seconds * random.uniform(0.9, 1.1)):
                    await self._soon.wait()
                    await asyncio.sleep(0.5)  # one gap is one gap for all watches
            except TimeoutError:
                pass
            await self.sync()

    async def sync(self, unless_seconds: float = 0.0) -> None:
        """Returns when everything was listed once, however often that has to be tried.

        unless_seconds: not when that is how long ago it was done, or less.
        """
        while time.monotonic() - self._done >= unless_seconds:
            self._soon.clear()
            try:
                async with self._lock:
                    await self._all()
                self._done = time.monotonic()
                return
            except ApiError as error:
                log.warning("listing: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _all(self) -> None:
        # Children before jobs: a job without its ConfigMap would be accepted anew.
        for kind in kinds.CHILDREN:
            await self._children(kind)
        await self._pods()
        await self._nodes()
        await self._jobs()

    async def _children(self, kind: kinds.Kind) -> None:
        # Of what is not a ConfigMap only the annotation with its hash is looked at.
        slim = kind is not kinds.CONFIG_MAP
        put = partial(self._cache.put_child, kind.name)
        seen, version = await self._each(kind, self._namespaces, put, OURS, slim)
        self._cache.replace_children(kind.name, {each.uid for each in seen}, version)

    async def _pods(self) -> None:
        put = self._cache.put_pod
        seen, version = await self._each(kinds.POD, self._namespaces, put, OURS)
        self._cache.replace_pods({each.uid for each in seen}, version)

    async def _nodes(self) -> None:
        seen, version = await self._each(kinds.NODE, (None,), self._cache.put_node)
        self._cache.replace_nodes({each.key.name for each in seen}, version)

    async def _jobs(self) -> None:
        seen, version = await self._each(kinds.JOB, self._namespaces, self._cache.put_job)
        self._cache.replace_jobs({each.key: each.uid for each in seen}, version)

    async def _each(
        self,
        kind: kinds.Kind,
        namespaces: Iterable[str | None],
        put: Callable[[Document], object],
        labels: str = "",
        metadata_only: bool = False,
    ) -> tuple[list[_Seen], int]:
        """Puts each object. Returns all, and the version at which the lists were whole."""
        seen: list[_Seen] = []
        versions: list[int] = []
        for namespace in namespaces:
            pages = self._api.pages(kind, namespace, labels=labels, metadata_only=metadata_only)
            async for page in pages:
                versions.append(page.version)
                for body in page.items:
                    about = body["metadata"]
                    key = JobKey(about.get("namespace") or "", about["name"])
                    seen.append(_Seen(key, about["uid"]))
                    put(body)
        return seen, min(versions, default=0)
