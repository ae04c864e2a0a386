"""Reads what coordinators say about their training: http://POD:9400/progress.

Whatever answers there is not trusted: no redirects, a short time, a small size, and what is no JSON
object is as good as no answer. Training never waits for this.
"""

import asyncio
import heapq
import ipaddress
import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp
from pydantic_core import from_json

from cptjob_operator.edge.cache import Cache
from cptjob_operator.identity import JobKey, Role
from cptjob_operator.observed import Pod, Report

log = logging.getLogger(__name__)

PORT = 9400
_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
_MOST_BYTES = 65_536
_AT_ONCE = 16
#: How often to look for coordinators that came or went.
_LOOK_SECONDS = 1.0


class Reports:
    """The newest report of each job, by the job's uid. port: where coordinators answer."""

    def __init__(self, port: int = PORT) -> None:
        self._known: dict[str, Report] = {}
        self._port = port

    def get(self, uid: str) -> Report | None:
        return self._known.get(uid)

    def put(self, uid: str, report: Report) -> None:
        self._known[uid] = report

    def forget(self, uid: str) -> None:
        self._known.pop(uid, None)

    async def ask(self, pod: Pod) -> None:
        """Asks this coordinator now, out of turn; without an answer what was known stays."""
        try:
            async with new_session() as session:
                said = await fetch(session, pod.address or "", self._port)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.debug("%s: no last word: %s", pod.name, error)
            return
        self.put(pod.id.uid, Report(said, datetime.now(UTC)))


class Puller:
    """Asks each running coordinator once in `seconds`, spread over that time.

    changed: is told each job with a new report. outcome: counts "ok", "failed" and "invalid".
    """

    def __init__(
        self,
        cache: Cache,
        reports: Reports,
        changed: Callable[[JobKey], None],
        *,
        seconds: float = 30.0,
        outcome: Callable[[str], None] = lambda word: None,
        port: int = PORT,
    ) -> None:
        self._cache, self._reports, self._changed = cache, reports, changed
        self._seconds, self._outcome, self._port = seconds, outcome, port
        self._due: list[tuple[float, str]] = []
        self._scheduled: set[str] = set()  # uids of coordinator pods

    async def run(self) -> None:
        """Until it is cancelled."""
        gate = asyncio.Semaphore(_AT_ONCE)
        async with (
            new_session() as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                for pod in self._take():
                    await gate.acquire()
                    task = group.create_task(self._one(session, pod))
                    task.add_done_callback(lambda _: gate.release())
                await asyncio.sleep(_LOOK_SECONDS)

    def _take(self) -> list[Pod]:
        """Coordinators that are due. New ones get their turn by chance within the interval."""
        now = time.monotonic()
        running = {
            pod.uid: pod
            for pod in self._cache.all_pods()
            if pod.role is Role.COORDINATOR and pod.phase == "Running" and pod.address
        }
        for uid in running.keys() - self._scheduled:
            heapq.heappush(self._due, (now + random.uniform(0.0, self._seconds), uid))
        self._scheduled |= running.keys()
        found: list[Pod] = []
        while self._due and self._due[0][0] <= now:
            _, uid = heapq.heappop(self._due)
            if uid not in running:
                self._scheduled.discard(uid)
                continue
            found.append(running[uid])
            again = now + self._seconds * random.uniform(0.95, 1.05)
            heapq.heappush(self._due, (again, uid))
        return found

    async def _one(self, session: aiohttp.ClientSession, pod: Pod) -> None:
        try:
            said = await fetch(session, pod.address or "", self._port)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.debug("%s: no progress: %s", pod.name, error)
            self._outcome("failed")
            return
        except ValueError as error:
            log.debug("%s: progress makes no sense: %s", pod.name, error)
            self._outcome("invalid")
            return
        self._outcome("ok")
        key = self._cache.key_of(pod.job)
        before = self._reports.get(pod.id.uid)
        if key is not None and (before is None or before.progress != said):
            self._reports.put(pod.id.uid, Report(said, datetime.now(UTC)))
            self._changed(key)


def new_session() -> aiohttp.ClientSession:
    """Keeps nothing between two answers and unpacks none. Call it within a running loop."""
    return aiohttp.ClientSession(
        timeout=_TIMEOUT,
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(limit=_AT_ONCE, force_close=True),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
    )


async def fetch(session: aiohttp.ClientSession, address: str, port: int) -> Mapping[str, Any]:
    """The JSON object at /progress. Raises ValueError for anything else that answers."""
    host = ipaddress.ip_address(address)
    place = f"[{host}]" if host.version == 6 else str(host)
    url = f"http://{place}:{port}/progress"
    async with session.get(url, allow_redirects=False) as answer:
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        data = bytearray()
        async for part in answer.content.iter_chunked(8192):
            data += part
            if len(data) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES} bytes")
    value = from_json(bytes(data))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
