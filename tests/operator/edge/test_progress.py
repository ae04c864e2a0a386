"""What coordinators say is read with care."""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cptjob_operator.edge.progress import Reports, fetch

Test = Callable[[Callable[[Any], Awaitable[None]]], None]


async def asked(server: Any, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    server.answer = answer
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        return await fetch(session, "127.0.0.1", server.port)


def saying(
    body: bytes, status: int = 200, **headers: str
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, status=status, headers=headers)

    return answer


def test_a_json_object_is_taken(with_server: Test) -> None:
    async def test(server: Any) -> None:
        assert await asked(server, saying(b'{"currentStep": 3}')) == {"currentStep": 3}
        assert server.requests == [("GET", "/progress")]

    with_server(test)


def test_a_coordinator_is_asked_out_of_turn_and_without_an_answer_its_last_word_counts(
    with_server: Test,
) -> None:
    pod: Any = SimpleNamespace(name="c", address="127.0.0.1", id=SimpleNamespace(uid="job"))

    async def test(server: Any) -> None:
        reports = Reports(server.port)
        server.answer = saying(b'{"currentStep": 47}')
        await reports.ask(pod)
        for answer in (saying(b"", 503), saying(b"nonsense")):
            server.answer = answer
            await reports.ask(pod)
        known = reports.get("job")
        assert known is not None
        assert known.progress == {"currentStep": 47}
        assert len(server.requests) == 3

    with_server(test)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[1]",
        b"\xff\xfe",
        b"null",
        b"[" * 50_000,
        b'{"a": "' + b"x" * 70_000 + b'"}',
        rb'{"message": "\ud800"}',
    ],
    ids=["empty", "html", "list", "binary", "null", "deep", "large", "half a character"],
)
def test_nonsense_is_no_report(with_server: Test, body: bytes) -> None:
    async def test(server: Any) -> None:
        with pytest.raises(ValueError, match=r"line \d|not a JSON|more than"):
            await asked(server, saying(body))

    with_server(test)


def test_a_redirect_is_not_followed(with_server: Test) -> None:
    async def test(server: Any) -> None:
        with pytest.raises(ValueError, match="302"):
            await asked(server, saying(b"{}", 302, Location="/elsewhere"))
        assert server.requests == [("GET", "/progress")]

    with_server(test)


def test_an_answer_without_an_end_is_cut_off(with_server: Test) -> None:
    async def test(server: Any) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(b" " * 8192)

        with pytest.raises(ValueError, match="more than"):
            await asked(server, answer)

    with_server(test)


def test_what_is_no_address_is_not_asked(with_server: Test) -> None:
    async def test(server: Any) -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(ValueError, match="address"):
                await fetch(session, "example.com/x?", server.port)
        assert server.requests == []

    with_server(test)
