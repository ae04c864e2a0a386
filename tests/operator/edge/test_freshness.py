"""What the watches' requests tell: that they live, and when something may have gone unseen."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from yarl import URL

from cptjob_operator.edge.freshness import Freshness
from cptjob_operator.edge.kinds import NODE, POD

SERVER = "https://api.invalid/api/v1"


class _Watches:
    """A `Freshness` of pods and nodes, and how often it told of a gap."""

    def __init__(self, *namespaces: str) -> None:
        self.gaps, self.now = 0, 0.0
        self.freshness = Freshness((POD, NODE), namespaces, self._missed, lambda: self.now)
        self._trace = self.freshness.trace()

    def _missed(self) -> None:
        self.gaps += 1

    def ask(self, kind: str, query: str = "", status: int = 200) -> None:
        """A request of kopf has its answer."""
        about = SimpleNamespace(
            url=URL(f"{SERVER}/{kind}?{query}"),
            method="GET",
            response=SimpleNamespace(status=status),
        )
        asyncio.run(self._tell(about))

    async def _tell(self, about: Any) -> None:
        for told in self._trace.on_request_end:
            await told(cast(Any, None), SimpleNamespace(), about)


def _begin(watches: _Watches) -> None:
    for kind in ("pods", "nodes"):
        watches.ask(kind, "limit=200")
        watches.ask(kind, "watch=true")


def test_what_went_before_the_watches_began_is_missed_once() -> None:
    watches = _Watches()
    watches.ask("pods", "limit=200")
    watches.ask("pods", "watch=true")
    assert (watches.freshness.begun, watches.gaps) == (False, 0)
    watches.ask("nodes", "limit=200")
    watches.ask("nodes", "watch=true")
    assert (watches.freshness.begun, watches.gaps) == (True, 1)
    watches.ask("pods", "watch=true&resourceVersion=7")
    assert watches.gaps == 1, "a watch that goes on missed nothing"


def test_a_list_in_place_of_a_watch_missed_what_went_meanwhile() -> None:
    watches = _Watches()
    _begin(watches)
    watches.ask("pods", "limit=200", status=410)
    assert watches.gaps == 1
    watches.ask("pods", "limit=200")
    watches.ask("pods", "limit=200&continue=more")
    assert watches.gaps == 2, "its further pages are the same list"


def test_a_watch_that_is_silent_in_one_namespace_is_stale_whatever_is_heard_of_others() -> None:
    watches = _Watches("one", "two")
    for path in ("namespaces/one/pods", "nodes"):
        watches.ask(path, "watch=true")
    assert not watches.freshness.begun
    watches.ask("namespaces/two/pods", "watch=true")
    assert watches.freshness.begun
    watches.now = 100.0
    watches.ask("namespaces/one/pods", "watch=true")
    watches.freshness.heard(NODE)
    assert watches.freshness.ages() == {"Pod": 100.0, "Node": 0.0}
    watches.freshness.heard(POD, "two")
    assert watches.freshness.age() == 0.0


def test_an_event_of_any_namespace_is_heard_where_all_are_watched_together() -> None:
    watches = _Watches()
    watches.now = 50.0
    watches.freshness.heard(POD, "any")
    assert watches.freshness.ages() == {"Pod": 0.0, "Node": 50.0}
