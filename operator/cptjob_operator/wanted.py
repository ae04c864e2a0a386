"""What a pass wants done: the value that `plan` makes and `Cluster` carries out.

The order is fixed. The status goes first: it holds what makes a replacement a new one (attempt,
incarnation, what was resolved), and is written under the resourceVersion that was looked at, so
that of two operators one gets no further. Then events, deletions, objects, and what is extra.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from cptjob_api.status import CPTJobStatus

EventType = Literal["Normal", "Warning"]


@dataclass(frozen=True, slots=True)
class Deletion:
    """An object to delete if it is still the one that was seen.

    grace_seconds: None leaves the object's own; 0 removes a pod whose node is gone.
    """

    kind: Literal["Pod", "CPTJob"]
    name: str
    uid: str
    grace_seconds: int | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """An Event on the job."""

    type: EventType
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """Outcome of one pass.

    status: the whole status as it should read; None leaves it as it is.
    urgent: False when the status only tells more and nothing was decided: the write may wait.
    objects: manifests that are missing or differ; written by server-side apply, pods by POST.
    extras: the same for objects that the job's pods can do without. They come last, and one that is
    refused holds nothing up.
    again: when to look again though nothing happened; None is never.
    """

    status: CPTJobStatus | None = None
    urgent: bool = True
    deletions: tuple[Deletion, ...] = ()
    objects: tuple[dict[str, Any], ...] = ()
    extras: tuple[dict[str, Any], ...] = ()
    events: tuple[Event, ...] = ()
    again: datetime | None = None
    #: Figures for the operator's own metrics: restarts by cause, in this pass.
    restarts: tuple[str, ...] = field(default=())
