"""What can go wrong between the operator and the API server.

ApiError
├── Conflict        409: the object is another version, or another object, than the one meant
├── AlreadyExists   409: an object of that name is there
├── NotFound        404: no such object, kind or namespace
├── Gone            410: the version that was asked for is no longer kept
├── Forbidden       403: no right, no quota, refused by an admission plugin
├── Invalid         400, 413 and 422: the API server does not take it as it is
├── Throttled       429: too much at once; `retry_after` seconds
├── Unauthorized    401: the credentials do not hold
├── Unavailable     5xx, no connection, no answer in time: nobody knows whether it was done
└── NotLeader       never sent: another operator leads
"""

import json
from collections.abc import Mapping
from typing import Any

_MESSAGE_CHARACTERS = 1000


class ApiError(Exception):
    """A request that did not do what it was for. The message is the API server's own."""

    #: Label of the metric; the HTTP status where there is one.
    code: str

    def __init__(self, message: str, code: int | str = "") -> None:
        super().__init__(message)
        self.code = str(code)


class Conflict(ApiError):
    """The object is another version, or another object, than the one meant."""


class AlreadyExists(ApiError):
    """An object of that name is there."""


class NotFound(ApiError):
    """No such object, kind or namespace."""


class Gone(ApiError):
    """The version that was asked for is no longer kept."""


class Forbidden(ApiError):
    """No right, no quota, or refused by an admission plugin."""

    #: The namespace is on its way out, so there is nothing to tell anybody.
    terminating = False

    @property
    def quota(self) -> bool:
        """A quota of the namespace is used up."""
        return "exceeded quota" in str(self) or "failed quota" in str(self)


class Invalid(ApiError):
    """The API server does not take the object as it is."""


class Throttled(ApiError):
    """Too much at once."""

    retry_after = 1.0  # seconds


class Unauthorized(ApiError):
    """The credentials do not hold."""


class Unavailable(ApiError):
    """No answer, or none that says what was done."""


class NotLeader(ApiError):
    """Another operator leads; the request was not sent."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    413: Invalid,
    422: Invalid,
    429: Throttled,
}


def refused(status: int, body: bytes, headers: Mapping[str, str]) -> ApiError:
    """The error that an answer stands for; `body` is a Status object, or what a proxy said."""
    said = _status(body)
    message = str(said.get("message") or body[:_MESSAGE_CHARACTERS].decode(errors="replace"))
    kind = _BY_STATUS.get(status, Unavailable)
    if status == 409 and said.get("reason") == "AlreadyExists":
        kind = AlreadyExists
    error = kind(message[:_MESSAGE_CHARACTERS] or f"HTTP {status}", status)
    if isinstance(error, Forbidden):
        error.terminating = "NamespaceTerminating" in _causes(said)
    if isinstance(error, Throttled):
        error.retry_after = _seconds(headers.get("Retry-After"))
    return error


def _status(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _causes(said: dict[str, Any]) -> set[str]:
    details = said.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    return {str(each.get("reason")) for each in causes or () if isinstance(each, dict)}


def _seconds(text: str | None) -> float:
    try:
        return min(max(float(text or ""), 0.1), 60.0)
    except ValueError:
        return Throttled.retry_after
