"""Which of several operators acts: the one that holds a Lease and renews it in time.

A holder trusts its own clock only, and only for a part of the lease: it stops writing before any
other operator may begin. A process that was frozen finds on waking that its time is over, as the
clock runs on while it is frozen.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from cptjob_operator.edge.api import Api, Document
from cptjob_operator.edge.api_errors import AlreadyExists, ApiError, Conflict, NotFound
from cptjob_operator.edge.kinds import LEASE

log = logging.getLogger(__name__)


def boottime() -> float:
    """Seconds of a clock that runs on while the process, or the machine, is frozen."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leader:
    """The election. `api` must be one that asks nobody before it writes.

    lease_seconds: a lease that did not change for so long may be taken. valid_seconds: how long
    after a renewal was sent the holder may act. renew_seconds: time between renewals.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        identity: str,
        *,
        name: str = "cptjob-operator",
        lease_seconds: float = 15.0,
        renew_seconds: float = 2.0,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._api, self._namespace, self._identity, self._name = api, namespace, identity, name
        self._lease_seconds, self._renew_seconds = lease_seconds, renew_seconds
        self._retry_seconds = min(2.0, renew_seconds)
        self._valid_seconds = lease_seconds * 2 / 3
        self._clock = clock
        self._until = 0.0  # of our clock: when the right to act ends
        self._seen: tuple[str, float] = ("", 0.0)  # version of another's lease, since when

    def leads(self) -> bool:
        """Whether we may act now. Asked before each write."""
        return self._clock() < self._until

    async def run(self, act: Callable[[], Awaitable[None]]) -> None:
        """Runs `act` whenever we lead, and cancels it when we no longer do; forever."""
        try:
            while True:
                while not await self._try():
                    await asyncio.sleep(self._retry_seconds * random.uniform(0.9, 1.1))
                log.info("leading as %s", self._identity)
                await self._lead(act)
                log.warning("no longer leading")
        finally:
            # Not if we were cancelled amid a request that nobody knows the end of: harmless then.
            await self._release()

    async def _lead(self, act: Callable[[], Awaitable[None]]) -> None:
        acting = asyncio.ensure_future(act())
        try:
            wait = self._renew_seconds
            while self.leads():
                # A fault of the work itself ends the process, which is then started anew.
                done, _ = await asyncio.wait({acting}, timeout=wait)
                if done:
                    acting.result()
                    raise RuntimeError("the work of the leader has ended")
                if not self.leads():
                    return  # what was held back meanwhile is to be done anew, even if we lead again
                before = self._until
                await self._try()
                wait = self._renew_seconds if self._until > before else self._retry_seconds
        finally:
            acting.cancel()
            with suppress(asyncio.CancelledError):
                await acting

    async def _try(self) -> bool:
        """Takes or renews the lease if that is possible. True when we lead."""
        try:
            async with asyncio.timeout(self._valid_seconds / 2):
                await self._take()
        except (Conflict, AlreadyExists):
            self._until = 0.0  # somebody else has written: no doubt is allowed
        except (ApiError, TimeoutError) as error:
            log.warning("lease %s: %s", self._name, error)
        return self.leads()

    async def _take(self) -> None:
        sent = self._clock()
        try:
            lease = await self._api.get(LEASE, self._namespace, self._name)
        except NotFound:
            await self._api.post(LEASE, self._namespace, self._body({}, 0))
            self._until = sent + self._valid_seconds
            return
        spec = _spec(lease)
        holder = str(spec.get("holderIdentity") or "")
        if holder not in ("", self._identity) and not self._stale(lease):
            self._until = 0.0
            return
        changes = _number(spec.get("leaseTransitions")) + (holder != self._identity)
        sent = self._clock()
        await self._api.put(LEASE, self._namespace, self._name, self._body(lease, changes))
        self._until = sent + self._valid_seconds

    def _stale(self, lease: Document) -> bool:
        """Another's lease that has not changed for its whole time, by our own clock."""
        version = str((lease.get("metadata") or {}).get("resourceVersion"))
        now = self._clock()
        if version != self._seen[0]:
            self._seen = version, now
        duration = _number(_spec(lease).get("leaseDurationSeconds")) or self._lease_seconds
        return now - self._seen[1] >= duration

    def _body(self, lease: Document, transitions: int) -> Document:
        about = lease.get("metadata") or {"name": self._name, "namespace": self._namespace}
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = _spec(lease)
        same = spec.get("holderIdentity") == self._identity
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": {key: about[key] for key in _KEPT if key in about},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._lease_seconds)),
                "acquireTime": spec.get("acquireTime") or now if same else now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }

    async def _release(self) -> None:
        """Lets the next one begin at once."""
        if not self.leads():
            return
        self._until = 0.0
        with suppress(ApiError, TimeoutError):
            async with asyncio.timeout(2.0):
                lease = await self._api.get(LEASE, self._namespace, self._name)
                spec = _spec(lease)
                if spec.get("holderIdentity") != self._identity:
                    return
                body = self._body(lease, _number(spec.get("leaseTransitions")))
                body["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._api.put(LEASE, self._namespace, self._name, body)


_KEPT = ("name", "namespace", "resourceVersion", "uid", "labels", "annotations")


def _spec(lease: Document) -> dict[str, Any]:
    spec = lease.get("spec")
    return spec if isinstance(spec, dict) else {}


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
