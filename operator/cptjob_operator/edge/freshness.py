"""When each watch was last heard of: the operator's liveness rests on it.

kopf ends and begins each watch every few minutes, and at once when it is silent for too long. So a
watch of which nothing was heard for longer than that is dead, and with it what the operator knows.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace

import aiohttp

from cptjob_operator.edge.kinds import Kind


class Freshness:
    """Of the watches of `kinds`.

    missed: is told when objects may have gone unseen, so that everything must be listed.
    """

    def __init__(
        self,
        kinds: tuple[Kind, ...],
        missed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._missed, self._clock = missed, clock
        self._heard = {kind.plural: clock() for kind in kinds}
        self._watched: set[str] = set()

    def heard(self, kind: Kind) -> None:
        """An event of that kind came."""
        self._heard[kind.plural] = self._clock()

    def age(self) -> float:
        """Seconds since the stalest watch was heard of."""
        return self._clock() - min(self._heard.values())

    @property
    def begun(self) -> bool:
        """Every kind is being watched."""
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
        plural = params.url.path.rsplit("/", 1)[-1]
        if params.method.upper() != "GET" or plural not in self._heard:
            return
        if params.response.status != 200:
            return
        self._heard[plural] = self._clock()
        if params.url.query.get("watch") == "true":
            before = self.begun
            self._watched.add(plural)
            if self.begun and not before:
                # What went since the list at the start, and before kopf's own, is in no event.
                self._missed()
        elif plural in self._watched and "continue" not in params.url.query:
            # Objects that went in the gap are in no event: kopf does not tell of them.
            self._missed()
