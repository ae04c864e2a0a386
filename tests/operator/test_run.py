"""Who the operator is, which namespaces it looks after, and what it says to its probes."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from aiohttp import web
from yarl import URL

from cptjob_operator import handlers, run
from cptjob_operator.edge import kinds
from cptjob_operator.edge.freshness import Freshness
from cptjob_operator.plan.rules import plan
from cptjob_operator.run import Operator, own_identity
from cptjob_operator.settings import parse

MANIFESTS = Path(__file__).parents[2] / "deploy" / "operator.yaml"
WATCHED = (kinds.JOB, kinds.POD, kinds.NODE)


def _environment() -> dict[str, str]:
    """Variables of the operator's container that say something of its pod, and the field of each."""
    with MANIFESTS.open() as file:
        documents: list[dict[str, Any]] = list(yaml.safe_load_all(file))
    (deployment,) = (each for each in documents if each and each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {
        each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"]
        for each in container["env"]
        if "valueFrom" in each
    }


def test_a_container_that_is_started_anew_in_its_pod_keeps_the_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, field in _environment().items():
        monkeypatch.setenv(name, field)
    assert own_identity() == "metadata.name_metadata.uid"


def test_a_namespace_without_rights_holds_up_no_other_and_is_watched_once_it_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = {"two"}

    async def answer(request: web.Request) -> web.Response:
        if request.match_info["namespace"] in closed:
            return web.json_response({"message": "cptjobs is forbidden"}, status=403)
        return web.json_response({"items": [], "metadata": {"resourceVersion": "1"}})

    async def test() -> None:
        application = web.Application()
        application.router.add_get("/{_:.*}/namespaces/{namespace}/cptjobs", answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server = f"http://127.0.0.1:{runner.addresses[0][1]}"
        _write_kubeconfig(tmp_path / "config", server)
        operator = Operator(parse("watchedNamespaces: [one, two]"), plan, "one")
        operator._look_after(await operator._wait_for_kind())
        assert operator.namespaces == ("one",)
        waits = asyncio.ensure_future(operator._until_others_are_allowed())
        await asyncio.sleep(0.1)
        assert not waits.done()
        closed.clear()
        await asyncio.wait_for(waits, 10)
        for api in (operator.api, operator._plain):
            await api.close()
        await runner.cleanup()

    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(run, "_ALLOWED_SECONDS", 0.01)
    asyncio.run(test())


class _Watched:
    """An operator that has listed nothing yet, and its watches as a test has them heard of."""

    def __init__(self) -> None:
        self.now = 0.0
        self.operator = Operator(parse(""), plan, "one")
        self.operator.freshness = Freshness(WATCHED, clock=lambda: self.now)

    @property
    def sick(self) -> str:
        return self.operator._sick()

    @property
    def unready(self) -> str:
        return self.operator._unready()

    def list_everything(self) -> None:
        self.operator.lister._done = 0.0
        assert self.operator.lister.synced

    async def hear(self, *heard: kinds.Kind) -> None:
        """Watches of these kinds begin, or begin anew."""
        for kind in heard:
            about = SimpleNamespace(
                url=URL(f"https://api.invalid/{kind.path()}?watch=true"),
                method="GET",
                response=SimpleNamespace(status=200),
            )
            for told in self.operator.freshness.trace().on_request_end:
                await told(cast(Any, None), SimpleNamespace(), cast(Any, about))


With = Callable[[Callable[[_Watched], Awaitable[None]]], None]


@pytest.fixture(name="with_operator")
def run_with_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> With:
    """`with_operator(test)` runs `await test(watched)` in an event loop of its own."""
    _write_kubeconfig(tmp_path / "config", "http://127.0.0.1:1")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))

    def run(test: Callable[[_Watched], Awaitable[None]]) -> None:
        async def body() -> None:
            watched = _Watched()
            await test(watched)
            for api in (watched.operator.api, watched.operator._plain):
                await api.close()

        asyncio.run(body())

    return run


def test_it_is_ready_once_everything_was_listed_and_is_watched(with_operator: With) -> None:
    async def test(watched: _Watched) -> None:
        assert watched.unready == "what there is was not listed yet"
        watched.list_everything()
        assert watched.unready == "not everything is watched yet"
        await watched.hear(kinds.JOB, kinds.POD)
        assert watched.unready == "not everything is watched yet"
        await watched.hear(kinds.NODE)
        assert watched.unready == ""

    with_operator(test)


def test_it_is_sick_while_any_one_watch_is_silent_for_too_long(with_operator: With) -> None:
    async def test(watched: _Watched) -> None:
        watched.list_everything()
        for silent in WATCHED:
            await watched.hear(*WATCHED)
            watched.now += handlers.DEAD_AFTER_SECONDS
            assert watched.sick == ""
            await watched.hear(*(kind for kind in WATCHED if kind is not silent))
            watched.now += 1.0
            seconds = handlers.DEAD_AFTER_SECONDS + 1.0
            assert watched.sick == f"a watch was not heard of for {seconds:.0f} s"
            await watched.hear(silent)
            assert watched.sick == ""

    with_operator(test)


def test_a_watch_that_never_begins_is_dead_too_but_nothing_is_before_the_first_lists(
    with_operator: With,
) -> None:
    """Without an API server, or the kind of jobs, another start would not help."""

    async def test(watched: _Watched) -> None:
        watched.now = 2 * handlers.DEAD_AFTER_SECONDS
        assert watched.sick == ""
        watched.list_everything()
        await watched.hear(kinds.JOB, kinds.POD)
        assert "a watch was not heard of" in watched.sick
        await watched.hear(kinds.NODE)
        assert watched.sick == ""

    with_operator(test)


def test_a_watch_goes_on_for_well_less_than_what_makes_it_dead() -> None:
    """It begins anew at its end, so that a silence of that length cannot be a quiet cluster's."""
    watched = handlers.settings().watching.server_timeout
    assert watched is not None
    assert watched + 120.0 <= handlers.DEAD_AFTER_SECONDS


def _write_kubeconfig(path: Path, server: str) -> None:
    document = {
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {}}],
    }
    path.write_text(yaml.safe_dump(document))
