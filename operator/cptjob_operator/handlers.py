"""kopf's part: three watches that feed the cache. No finalizers, no annotations, no diffs.

kopf keeps the connections, follows the versions, lists anew after a gap, and gives each event to one
function here. What follows from it is decided in passes (reconciler.py), never here.
"""

from typing import Any

import aiohttp
import kopf

from cptjob_api.job import GROUP, PLURAL, VERSION
from cptjob_operator.edge.cache import Cache
from cptjob_operator.edge.freshness import Freshness
from cptjob_operator.edge.kinds import JOB, NODE, POD
from cptjob_operator.edge.login import Login
from cptjob_operator.identity import OURS, JobKey

#: Objects in one answer to a list; without it, 5,000 pods would be in memory at once.
_CHUNK = 200
#: A watch goes on; kopf bounds what it must.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
#: Every watch ends and begins anew after this, so that its silence means something.
_WATCH_SECONDS = 240
#: An operator whose oldest watch was not heard of for so long is dead.
DEAD_AFTER_SECONDS = 420.0


class _NoDiffs(kopf.DiffBaseStorage):
    """Nothing is stored on objects. Copying each one to compare it cost four fifths of an event."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> Any:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        pass


class _NoProgress(kopf.ProgressStorage):
    """No handler here is ever retried, so there is nothing to remember."""

    def fetch(self, *, key: Any, body: Any) -> Any:
        return None

    def store(self, *, key: Any, record: Any, body: Any, patch: Any) -> None:
        pass

    def purge(self, *, key: Any, body: Any, patch: Any) -> None:
        pass

    def touch(self, *, body: Any, patch: Any, value: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence


def settings() -> kopf.OperatorSettings:
    """kopf's settings."""
    found = kopf.OperatorSettings()
    found.posting.enabled = False
    found.peering.standalone = True
    # Neither namespaces nor CRDs are watched: that would take more rights.
    found.scanning.disabled = True
    found.persistence.diffbase_storage = _NoDiffs()
    found.persistence.progress_storage = _NoProgress()
    found.watching.chunk_size = _CHUNK
    found.watching.server_timeout = _WATCH_SECONDS
    found.watching.reconnect_backoff = 0.1
    found.watching.label_selectors["", "v1", "pods"] = OURS
    # A worker of an object holds its last event until it ends.
    found.queueing.idle_timeout = 0.1
    # An API server that is away for some minutes is no reason to end; the liveness probe is.
    found.networking.error_backoffs = (0.2, 0.5, 1.0, 2.0, *([3.0] * 200))
    found.networking.connect_timeout = 5.0
    return found


def registry(cache: Cache, login: Login, freshness: Freshness) -> kopf.OperatorRegistry:
    """kopf's handlers: what each event does to the cache."""
    found = kopf.OperatorRegistry()
    trace = freshness.trace()

    @kopf.on.login(registry=found)
    async def sign_in(**_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(
            server=login.server,
            aiohttp_session=login.session(0, _NO_TIMEOUT, [trace]),
        )

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=found)
    async def on_job(event: Any, **_: Any) -> None:
        body = event["object"]
        freshness.heard(JOB, body["metadata"]["namespace"])
        if event["type"] == "DELETED":
            about = body["metadata"]
            cache.drop_job(JobKey(about["namespace"], about["name"]), about["uid"])
        else:
            cache.put_job(body)

    @kopf.on.event("", "v1", "pods", registry=found)
    async def on_pod(event: Any, **_: Any) -> None:
        body = event["object"]
        freshness.heard(POD, body["metadata"]["namespace"])
        if event["type"] == "DELETED":
            cache.drop_pod(body)
        else:
            cache.put_pod(body)

    @kopf.on.event("", "v1", "nodes", registry=found)
    async def on_node(event: Any, **_: Any) -> None:
        freshness.heard(NODE)
        if event["type"] == "DELETED":
            cache.drop_node(event["object"]["metadata"]["name"])
        else:
            cache.put_node(event["object"])

    return found
