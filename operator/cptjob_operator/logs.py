"""Logs as one JSON object a line, with the job that they are about.

Nothing here ever logs an object as a whole: the environment of a job may hold what is nobody's
business.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from cptjob_operator.identity import JobKey

_about: ContextVar[dict[str, str | int] | None] = ContextVar("about", default=None)


@contextmanager
def about(key: JobKey, **more: str | int) -> Iterator[None]:
    """Lines within name this job, and `more` of it."""
    token = _about.set({"namespace": key.namespace, "job": key.name, **more})
    try:
        yield
    finally:
        _about.reset(token)


def add(**more: str | int) -> None:
    """Lines from here to the end of `about` say this too."""
    _about.set({**(_about.get() or {}), **more})


class JsonFormatter(logging.Formatter):
    """One line a record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **(_about.get() or {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str, stream: TextIO = sys.stderr) -> None:
    """Logs of this process go to `stream`. kopf says only what goes wrong: it logs each event."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)  # or Python writes them past the handler, in lines of its own
    for name in ("kopf", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
