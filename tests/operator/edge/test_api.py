"""Requests and their errors; tests/cluster asks the real API server."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import kopf
import pytest
from aiohttp import web

from cptjob_operator.edge import api_errors, kinds
from cptjob_operator.edge.api import Api, Bucket
from cptjob_operator.edge.login import Login

Test = Callable[[Callable[[Any], Awaitable[None]]], None]


def answers(
    status: int, body: Any, **headers: str
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return answer


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (403, "Forbidden", api_errors.Forbidden),
        (404, "NotFound", api_errors.NotFound),
        (409, "Conflict", api_errors.Conflict),
        (409, "AlreadyExists", api_errors.AlreadyExists),
        (410, "Expired", api_errors.Gone),
        (422, "Invalid", api_errors.Invalid),
        (429, "TooManyRequests", api_errors.Throttled),
        (500, "InternalError", api_errors.Unavailable),
        (503, "ServiceUnavailable", api_errors.Unavailable),
    ],
)
def test_each_refusal_is_an_error_of_its_own_with_the_api_servers_words(
    with_server: Test, status: int, reason: str, expected: type[api_errors.ApiError]
) -> None:
    async def test(server: Any) -> None:
        server.answer = answers(status, {"kind": "Status", "reason": reason, "message": "words"})
        api = server.api()
        with pytest.raises(expected, match="words") as caught:
            await api.post(kinds.POD, "team", {"metadata": {"name": "a"}})
        assert type(caught.value) is expected
        await api.close()

    with_server(test)


def test_a_refusal_by_a_quota_is_told_from_others(with_server: Test) -> None:
    async def test(server: Any) -> None:
        api = server.api()
        for message, quota in (("pods a is forbidden: exceeded quota: small", True), ("no", False)):
            server.answer = answers(403, {"message": message})
            with pytest.raises(api_errors.Forbidden) as caught:
                await api.post(kinds.POD, "team", {})
            assert caught.value.quota is quota
        await api.close()

    with_server(test)


def test_a_namespace_on_its_way_out_is_told_from_other_refusals(with_server: Test) -> None:
    async def test(server: Any) -> None:
        causes = [{"reason": "NamespaceTerminating"}]
        server.answer = answers(403, {"message": "no", "details": {"causes": causes}})
        api = server.api()
        with pytest.raises(api_errors.Forbidden) as caught:
            await api.post(kinds.POD, "team", {})
        assert caught.value.terminating
        await api.close()

    with_server(test)


def test_how_long_to_wait_is_read_from_the_answer(with_server: Test) -> None:
    async def test(server: Any) -> None:
        api = server.api()
        for said, seconds in (("3", 3.0), ("soon", 1.0), ("86400", 60.0)):
            server.answer = answers(429, {}, **{"Retry-After": said})
            with pytest.raises(api_errors.Throttled) as caught:
                await api.get(kinds.POD, "team", "a")
            assert caught.value.retry_after == seconds
        await api.close()

    with_server(test)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"text"'])
def test_an_answer_that_is_no_object_says_nothing(with_server: Test, body: bytes) -> None:
    async def test(server: Any) -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=body)

        server.answer = answer
        api = server.api()
        with pytest.raises(api_errors.Unavailable):
            await api.get(kinds.POD, "team", "a")
        await api.close()

    with_server(test)


def test_no_server_is_no_answer() -> None:
    async def test() -> None:
        login = Login(lambda: kopf.ConnectionInfo(server="http://127.0.0.1:1"))
        api = Api(login, manager="test")
        with pytest.raises(api_errors.Unavailable):
            await api.get(kinds.POD, "team", "a")
        await api.close()

    asyncio.run(test())


def test_a_write_that_waited_for_a_connection_is_not_sent_when_the_lease_has_gone(
    with_server: Test,
) -> None:
    """The process may have been frozen while it waited."""

    async def test(server: Any) -> None:
        leads, asked, let = [True], asyncio.Event(), asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            asked.set()
            await let.wait()
            return web.json_response({})

        server.answer = answer
        api = server.api(may_write=lambda: leads[0], connections=1)
        first = asyncio.ensure_future(api.get(kinds.POD, "team", "a"))
        await asked.wait()
        write = asyncio.ensure_future(api.delete(kinds.POD, "team", "a", "uid"))
        await asyncio.sleep(0.05)
        leads[0] = False
        let.set()
        await first
        with pytest.raises(api_errors.NotLeader):
            await write
        assert [method for method, _ in server.requests] == ["GET"]
        await api.close()

    with_server(test)


def test_nothing_is_written_without_the_lease(with_server: Test) -> None:
    async def test(server: Any) -> None:
        leads = True
        api = server.api(may_write=lambda: leads)
        server.answer = answers(200, {})
        await api.post(kinds.POD, "team", {})
        leads = False
        for write in (
            api.post(kinds.POD, "team", {}),
            api.apply(kinds.SERVICE, "team", {"metadata": {"name": "a"}}),
            api.delete(kinds.POD, "team", "a", "uid"),
            api.patch_status(kinds.JOB, "team", "a", {}, "1", "uid"),
        ):
            with pytest.raises(api_errors.NotLeader):
                await write
        await api.get(kinds.POD, "team", "a")
        assert [method for method, _ in server.requests] == ["POST", "GET"]
        await api.close()

    with_server(test)


def test_a_new_token_is_read_when_the_old_one_is_refused(with_server: Test) -> None:
    async def test(server: Any) -> None:
        tokens = ["old", "new"]
        seen: list[str] = []

        async def answer(request: web.Request) -> web.Response:
            seen.append(request.headers["Authorization"])
            return web.json_response({}, status=200 if seen[-1] == "Bearer new" else 401)

        def find() -> kopf.ConnectionInfo:
            return kopf.ConnectionInfo(
                server=f"http://127.0.0.1:{server.port}", token=tokens.pop(0) if tokens else "new"
            )

        server.answer = answer
        api = Api(Login(find), manager="test")
        await api.get(kinds.POD, "team", "a")
        assert seen == ["Bearer old", "Bearer new"]
        await api.close()

    with_server(test)


def test_a_redirect_is_not_followed(with_server: Test) -> None:
    async def test(server: Any) -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": "/elsewhere"})

        server.answer = answer
        api = server.api()
        with pytest.raises(api_errors.Unavailable):
            await api.get(kinds.POD, "team", "a")
        assert len(server.requests) == 1
        await api.close()

    with_server(test)


def test_a_long_list_comes_in_pages(with_server: Test) -> None:
    async def test(server: Any) -> None:
        async def answer(request: web.Request) -> web.Response:
            more = "" if "continue" in request.query else "next"
            about = {"resourceVersion": "7", "continue": more}
            items = [{"page": request.query.get("continue", "first")}]
            return web.json_response({"metadata": about, "items": items})

        server.answer = answer
        api = server.api()
        pages = [page async for page in api.pages(kinds.POD, labels="a=b")]
        assert [page.items for page in pages] == [[{"page": "first"}], [{"page": "next"}]]
        assert pages[0].version == 7
        await api.close()

    with_server(test)


def test_each_request_is_counted_by_verb_kind_and_code(with_server: Test) -> None:
    async def test(server: Any) -> None:
        counted: list[tuple[str, str, str]] = []
        api = server.api(watch=lambda verb, kind, code, seconds: counted.append((verb, kind, code)))
        with pytest.raises(api_errors.NotFound):
            await api.delete(kinds.POD, "team", "a", "uid")
        assert counted == [("delete", "Pod", "404")]
        await api.close()

    with_server(test)


def test_writes_beyond_the_burst_wait_for_their_turn() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        bucket = Bucket(rate=100.0, burst=5, clock=loop.time)
        begun = loop.time()
        for _ in range(10):
            await bucket.take()
        assert loop.time() - begun >= 0.045

    asyncio.run(test())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (kinds.POD.path(), "/api/v1/pods"),
        (kinds.POD.path("team", "a"), "/api/v1/namespaces/team/pods/a"),
        (
            kinds.JOB.path("team", "a", "status"),
            "/apis/training.cptjob.io/v1alpha1/namespaces/team/cptjobs/a/status",
        ),
        (kinds.NODE.path(None, "node-1"), "/api/v1/nodes/node-1"),
    ],
)
def test_paths_are_those_of_kubernetes(path: str, expected: str) -> None:
    assert path == expected
