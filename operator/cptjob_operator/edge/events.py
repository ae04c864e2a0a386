"""Events on jobs, as `kubectl describe` shows them.

They are for people: sent in the background, never twice within some minutes, few for one job, and
lost rather than waited for.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from cptjob_api.job import API_VERSION, GROUP, KIND
from cptjob_operator.edge.api import Api, Document
from cptjob_operator.edge.api_errors import ApiError
from cptjob_operator.edge.kinds import EVENT
from cptjob_operator.identity import MANAGER, JobKey
from cptjob_operator.wanted import Event

log = logging.getLogger(__name__)

#: The same event of a job is told once in this time.
SAME_SECONDS = 600.0
#: Events of one job within a minute.
MOST_PER_MINUTE = 10
_QUEUE = 1000
_NOTE_BYTES = 1000  # the API server takes up to 1024


class Recorder:
    """Sends events one after the other. `instance`: the name of this process."""

    def __init__(
        self, api: Api, instance: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api, self._instance, self._clock = api, instance, clock
        self._told: dict[str, dict[tuple[str, str], float]] = {}  # uid of a job -> event -> when
        self._queue: asyncio.Queue[Document] = asyncio.Queue(_QUEUE)

    def tell(self, key: JobKey, uid: str, event: Event) -> None:
        now = self._clock()
        told = {each: at for each, at in self._told.get(uid, {}).items() if now - at < SAME_SECONDS}
        self._told[uid] = told
        same = (event.reason, event.message)
        if same in told or sum(now - at < 60.0 for at in told.values()) >= MOST_PER_MINUTE:
            return
        told[same] = now
        if not self._queue.full():
            self._queue.put_nowait(self._body(key, uid, event))

    def forget(self, uid: str) -> None:
        self._told.pop(uid, None)

    async def run(self) -> None:
        """Until it is cancelled; what was not sent by then is for whoever leads next to tell."""
        try:
            while True:
                await self._send(await self._queue.get())
        finally:
            self._queue = asyncio.Queue(_QUEUE)
            self._told.clear()

    async def _send(self, body: Document) -> None:
        try:
            await self._api.post(EVENT, body["metadata"]["namespace"], body)
        except ApiError as error:
            log.debug("event %s: %s", body["reason"], error)

    def _body(self, key: JobKey, uid: str, event: Event) -> Document:
        now = datetime.now(UTC)
        # Made anew by an operator that was started anew, it is the same one.
        turn = int(now.timestamp() // SAME_SECONDS)
        digest = hashlib.sha256(f"{uid} {event.reason} {event.message} {turn}".encode()).hexdigest()
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"namespace": key.namespace, "name": f"{key.name}.{digest[:16]}"},
            "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": f"{GROUP}/{MANAGER}",
            "reportingInstance": self._instance[:128],
            "action": "Reconcile",
            "reason": event.reason[:128],
            "note": _cut(event.message),
            "type": event.type,
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": key.namespace,
                "name": key.name,
                "uid": uid,
            },
        }


def _cut(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= _NOTE_BYTES:
        return text
    return encoded[:_NOTE_BYTES].decode(errors="ignore") + "..."
