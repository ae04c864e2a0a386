"""Jobs that need a pass: each at most once, at its time, and never two passes of one job at once."""

import asyncio
import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from cptjob_operator.edge.api_errors import Throttled
from cptjob_operator.identity import JobKey

#: First and longest wait after a pass that failed.
BACKOFF_SECONDS = 0.2
BACKOFF_CAP_SECONDS = 60.0

Clock = Callable[[], float]
#: One pass. Returns the seconds until the next one is due, or None.
Pass = Callable[[JobKey], Awaitable[float | None]]

_Wish = tuple[float, int, JobKey]

#: Wishes that no longer hold stay in the heap until their time comes, or until they are so many.
_STALE = 1000


class Queue:
    """Passes that are due.

    limit: passes that may be under way at once. share: of one namespace, so that one whose passes
    are slow leaves some to the others. Times are seconds of `clock`, a monotonic one.
    """

    def __init__(self, limit: int = 16, share: int = 12, clock: Clock = time.monotonic) -> None:
        self._limit, self._share, self._clock = limit, share, clock
        self._due: dict[JobKey, float] = {}
        self._heap: list[_Wish] = []
        #: Wishes that are due, of namespaces that have their share: taken up as passes of it end.
        self._parked: dict[str, list[_Wish]] = {}
        self._of: Counter[str] = Counter()  # passes under way, by namespace
        self._count = 0
        self._active: set[JobKey] = set()
        self._failures: dict[JobKey, int] = {}
        self._not_before: dict[JobKey, float] = {}
        self._wake = asyncio.Event()

    def add(self, key: JobKey, seconds: float = 0.0) -> None:
        """Asks for a pass in so many seconds. Of several wishes the earliest holds.

        A job whose last pass failed waits for its back-off, whatever happens meanwhile.
        """
        at = max(self._clock() + seconds, self._not_before.get(key, 0.0))
        if self._due.get(key, math.inf) <= at:
            return
        self._due[key] = at
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, key))
        if len(self._heap) > 2 * len(self._due) + _STALE:
            self._heap = [each for each in self._heap if self._due.get(each[2]) == each[0]]
            heapq.heapify(self._heap)
        self._wake.set()

    def forget(self, key: JobKey) -> None:
        """The job is gone: nothing is due any more."""
        self._due.pop(key, None)
        self._failures.pop(key, None)
        self._not_before.pop(key, None)

    async def run(self, work: Pass) -> None:
        """Runs passes until it is cancelled; those under way are then cancelled too."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    key = await self._next()
                    self._begin(key)
                    group.create_task(self._one(key, work), name=f"pass of {key}")
        finally:
            for key in list(self._active):
                self._end(key)  # it was cancelled before it began
            for namespace, parked in list(self._parked.items()):
                for _ in range(len(parked)):
                    self._unpark(namespace)

    async def _next(self) -> JobKey:
        while True:
            key, wait = self._ready()
            if key is not None:
                return key
            self._wake.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _ready(self) -> tuple[JobKey | None, float | None]:
        """A job that is due and free, or the seconds until one may be (None: unknown)."""
        if len(self._active) >= self._limit:
            return None, None
        now, busy = self._clock(), []
        found: JobKey | None = None
        wait: float | None = None
        while self._heap:
            at, _, key = self._heap[0]
            if self._due.get(key) != at:
                heapq.heappop(self._heap)  # it was asked for earlier, or forgotten
                self._unpark(key.namespace)
                continue
            if at > now:
                wait = at - now
                break
            entry = heapq.heappop(self._heap)
            if key in self._active:
                busy.append(entry)
                continue
            if self._of[key.namespace] >= self._share:
                heapq.heappush(self._parked.setdefault(key.namespace, []), entry)
                continue
            del self._due[key]
            found = key
            break
        for entry in busy:
            heapq.heappush(self._heap, entry)
        return found, wait

    def _begin(self, key: JobKey) -> None:
        self._active.add(key)
        self._of[key.namespace] += 1

    def _end(self, key: JobKey) -> None:
        self._active.discard(key)
        self._of[key.namespace] -= 1
        if not self._of[key.namespace]:
            del self._of[key.namespace]
        self._unpark(key.namespace)
        self._wake.set()

    def _unpark(self, namespace: str) -> None:
        """One of the namespace may begin: the one that waits for longest."""
        parked = self._parked.get(namespace)
        if parked:
            heapq.heappush(self._heap, heapq.heappop(parked))
            if not parked:
                del self._parked[namespace]

    async def _one(self, key: JobKey, work: Pass) -> None:
        try:
            again = await work(key)
        except Exception as error:
            self._not_before[key] = self._clock() + self._backoff(key, error)
            self._due.pop(key, None)  # what came meanwhile waits as well
            self.add(key)
        else:
            self._failures.pop(key, None)
            self._not_before.pop(key, None)
            if again is not None:
                self.add(key, again)
        finally:
            self._end(key)

    def _backoff(self, key: JobKey, error: Exception) -> float:
        """Doubling, within a factor of two of chance, and no less than the API server asks for."""
        times = self._failures.get(key, 0)
        self._failures[key] = times + 1
        seconds = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2.0 ** min(times, 20))
        seconds *= random.uniform(0.5, 1.0)
        return max(seconds, error.retry_after if isinstance(error, Throttled) else 0.0)

    # --- figures ---

    def depth(self) -> int:
        """Passes that are due now and have not begun."""
        now = self._clock()
        return sum(at <= now for at in self._due.values())

    def age(self) -> float:
        """Seconds that the oldest of them has waited."""
        now = self._clock()
        return max(0.0, now - min(self._due.values(), default=now))

    @property
    def active(self) -> int:
        """Passes that are under way."""
        return len(self._active)
