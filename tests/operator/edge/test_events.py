"""Events: what is told, and what is not told any more."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from cptjob_operator.edge.events import Recorder
from cptjob_operator.identity import JobKey
from cptjob_operator.wanted import Event

Test = Callable[[Callable[[Any], Awaitable[None]]], None]
KEY = JobKey("team", "job")


async def _run_for_a_moment(recorder: Recorder, until: Callable[[], bool]) -> None:
    """As long as it leads."""
    task = asyncio.create_task(recorder.run())
    async with asyncio.timeout(10):
        while not until():
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_what_was_not_sent_when_the_lease_went_is_not_sent_when_it_comes_back(
    with_server: Test,
) -> None:
    notes: list[str] = []
    hold = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        notes.append((await request.json())["note"])
        if notes[-1] == "first":
            await hold.wait()
        return web.json_response({})

    async def test(server: Any) -> None:
        server.answer = answer
        api = server.api()
        recorder = Recorder(api, "test")
        for note in ("first", "late"):
            recorder.tell(KEY, "uid", Event("Normal", "Running", note))
        await _run_for_a_moment(recorder, lambda: notes == ["first"])
        hold.set()
        recorder.tell(KEY, "uid", Event("Normal", "Running", "new"))
        await _run_for_a_moment(recorder, lambda: len(notes) > 1)
        assert notes == ["first", "new"]
        await api.close()

    with_server(test)
