"""When each watch was last heard of: the operator's liveness rests on it.

kopf ends and begins each watch every few minutes, and at once when it is silent for too long. So a
watch of which nothing was heard for longer than that is dead, and with it what the operator knows.
"""

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import aiohttp

from cptjob_operator.edge.kinds import Kind


class Freshness:
    """Of the watches of `kinds`: one for each of `namespaces`, or where none are given one for all.

    missed: is told when objects may have gone unseen, so that everything must be listed.
    """

    def __init__(
        self,
        kinds: tuple[Kind, ...],
        namespaces: tuple[str, ...] = (),
        missed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._missed, self._clock = missed, clock
        # By path: a watch that goes on in one namespace says nothing of another's.
        self._kinds = {
            kind.path(namespace): kind
            for kind in kinds
            for namespace in (namespaces if kind.namespaced and namespaces else (None,))
        }
        self._heard = dict.fromkeys(self._kinds, clock())
        self._watched: set[str] = set()

    def heard(self, kind: Kind, namespace: str | None = None) -> None:
        """An event of that kind came."""
        path = kind.path(namespace)
        self._heard[path if path in self._heard else kind.path()] = self._clock()

    def age(self) -> float:
        """Seconds since the stalest watch was heard of."""
        return max(self.ages().values())

    def ages(self) -> Mapping[str, float]:
        """Seconds since the stalest watch of each kind was heard of."""
        now, found = self._clock(), dict[str, float]()
        for path, heard in self._heard.items():
            name = self._kinds[path].name
            found[name] = max(found.get(name, 0.0), now - heard)
        return found

    @property
    def begun(self) -> bool:
        """Everything is being watched."""
        return self._watched >= self._heard.keys()

    def trace(self) -> aiohttp.TraceConfig:
        """Hears of the requests of the session that it is given to."""
        trace = aiohttp.TraceConfig()
        trace.on_request_end.append(self._ended)
        return trace

    async def _ended(
        self,
        session: aiohttp.ClientSession,
        context: SimpleNamespace,
        params: aiohttp.TraceRequestEndParams,
    ) -> None:
        """An answer has begun: for a watch that is its start, for a list all of it is near."""
        if params.method.upper() != "GET" or params.response.status != 200:
            return
        # The server's own address may have a path in front.
        path = next((each for each in self._heard if params.url.path.endswith(each)), None)
        if path is None:
            return
        self._heard[path] = self._clock()
        if params.url.query.get("watch") == "true":
            before = self.begun
            self._watched.add(path)
            if self.begun and not before:
                # What went since the list at the start, and before kopf's own, is in no event.
                self._missed()
        elif path in self._watched and "continue" not in params.url.query:
            # Objects that went in the gap are in no event: kopf does not tell of them.
            self._missed()
