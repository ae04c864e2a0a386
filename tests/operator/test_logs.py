"""Logs for machines: one JSON object a line, whatever is said."""

import asyncio
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from cptjob_operator import logs
from cptjob_operator.identity import JobKey

log = logging.getLogger("cptjob_operator.test")


@pytest.fixture(name="stream")
def make_stream() -> Iterator[io.StringIO]:
    """What an operator would write, with the logging of the tests put back in the end."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    logs.configure("INFO", stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().split("\n") if line]


def test_a_text_of_several_lines_a_traceback_and_a_warning_are_one_object_each(
    stream: io.StringIO,
) -> None:
    log.info('two\nlines, "quoted" and %s', "ünïcode\u2028")
    try:
        raise ValueError("no\nway")
    except ValueError:
        log.exception("a fault")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("Python's own\nwords", RuntimeWarning, stacklevel=1)
    said, fault, warned = _lines(stream)
    assert said["message"] == 'two\nlines, "quoted" and ünïcode\u2028'
    assert (said["level"], said["logger"]) == ("INFO", "cptjob_operator.test")
    assert "ValueError: no\nway" in fault["traceback"]
    assert "Python's own\nwords" in warned["message"]


def test_lines_of_a_pass_name_its_job_and_nobody_elses(stream: io.StringIO) -> None:
    async def look(name: str, generation: int) -> None:
        with logs.about(JobKey("team", name)):
            log.info("begins")
            logs.add(generation=generation, attempt=2)
            await asyncio.sleep(0)  # other passes go on meanwhile
            await asyncio.gather(_part(), _part())
        log.info("after")

    async def _part() -> None:
        log.info("part")

    async def both() -> None:
        await asyncio.gather(look("one", 1), look("two", 7))

    asyncio.run(both())
    names = ("message", "namespace", "job", "generation", "attempt")
    found = sorted([tuple(line.get(name) for name in names) for line in _lines(stream)], key=str)
    assert found == [
        *[("after", None, None, None, None)] * 2,
        ("begins", "team", "one", None, None),
        ("begins", "team", "two", None, None),
        *[("part", "team", "one", 1, 2)] * 2,
        *[("part", "team", "two", 7, 2)] * 2,
    ]
