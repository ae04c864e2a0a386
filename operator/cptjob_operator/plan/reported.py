"""The coordinator's report as status. What it holds is not trusted: nonsense is left out. Pure."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from cptjob_api.status import (
    CPTJobStatus,
    LastCheckpoint,
    Metric,
    NodeRanks,
    Reported,
    ResolvedStatus,
    TrainerStatus,
)
from cptjob_operator.observed import Report
from cptjob_operator.profile import VOLUMES

_MAX_METRICS = 64
#: What only the model and the prepared data decide.
_RESOLVED = (
    "maxLength",
    "batchSizePerDevice",
    "globalBatchSize",
    "warmupSteps",
    "totalSteps",
    "digest",
)


def read_report(status: CPTJobStatus, report: Report | None) -> CPTJobStatus:
    """The status with what the report says; a field that makes no sense keeps what it was."""
    if report is None:
        return status
    said = report.progress
    update: dict[str, Any] = {"trainer_status": _trainer(status.trainer_status, said)}
    saved = _checkpoint(said.get("lastCheckpoint"))
    if saved is not None and _is_newer(saved, status.last_checkpoint):
        update["last_checkpoint"] = saved
    ranks = _ranks(said.get("nodes"))
    if ranks:
        update["nodes"] = ranks
    if status.resolved is not None:
        update["resolved"] = _resolved(status.resolved, said)
    return status.model_copy(update=update)


def _trainer(before: TrainerStatus | None, said: Mapping[str, Any]) -> TrainerStatus:
    fields = {
        "currentStep": _whole(said.get("currentStep")),
        "totalSteps": _whole(said.get("totalSteps")),
        "epoch": _finite(said.get("epoch")),
        "progressPercentage": _percent(said.get("progressPercentage")),
        "estimatedRemainingSeconds": _whole(said.get("estimatedRemainingSeconds")),
        "tokensPerSecond": _finite(said.get("tokensPerSecond")),
        "metrics": _metrics(said.get("metrics")),
        "lastUpdatedTime": _time(said.get("lastUpdatedTime")),
    }
    old = before or TrainerStatus()
    made = {name: value for name, value in fields.items() if value is not None}
    return old.model_copy(update={_attribute(name): value for name, value in made.items()})


def _attribute(alias: str) -> str:
    return "".join(f"_{each.lower()}" if each.isupper() else each for each in alias)


def _resolved(before: ResolvedStatus, said: Mapping[str, Any]) -> ResolvedStatus:
    """What was decided stays as it is; only what was open is filled in."""
    found = said.get("resolved")
    found = found if isinstance(found, dict) else {}
    update: dict[str, Any] = {}
    for name in _RESOLVED:
        attribute = _attribute(name)
        value: Any = found.get(name)
        value = value[:64] if name == "digest" and isinstance(value, str) else _whole(value)
        if value is not None and getattr(before, attribute) is None:
            update[attribute] = value
    return before.model_copy(update=update) if update else before


def _checkpoint(value: Any) -> LastCheckpoint | None:
    if not isinstance(value, dict):
        return None
    step, time, uri = _whole(value.get("step")), _time(value.get("time")), value.get("uri")
    if step is None or time is None or not isinstance(uri, str):
        return None
    return LastCheckpoint(step=step, time=time, uri=_outside(uri)[:1024])


def _outside(uri: str) -> str:
    """What a pod calls by the path of a mount, as the spec names it: pvc://CLAIM/path."""
    inside = f"file://{VOLUMES}/"
    return f"pvc://{uri.removeprefix(inside)}" if uri.startswith(inside) else uri


def _is_newer(saved: LastCheckpoint, before: LastCheckpoint | None) -> bool:
    return before is None or saved.time > before.time


def _ranks(value: Any) -> tuple[NodeRanks, ...]:
    if not isinstance(value, list):
        return ()
    try:
        return tuple(NodeRanks(**_known(NodeRanks, each)) for each in value[:500])
    except (ValidationError, TypeError):
        return ()


def _known(model: type[Reported], value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("not an object")
    ranks = value.get("ranks")
    ranks = ranks if isinstance(ranks, list) else ()
    return {
        "name": value.get("name"),
        "ranks": tuple(each for each in ranks if _whole(each) == each),
    }


def _metrics(value: Any) -> tuple[Metric, ...] | None:
    if not isinstance(value, dict):
        return None
    figures = {
        name[:128]: number
        for name, each in value.items()
        if isinstance(name, str) and name and (number := _finite(each)) is not None
    }
    return tuple(
        Metric(name=name, value=f"{number:.6g}")
        for name, number in list(figures.items())[:_MAX_METRICS]
    )


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _finite(value)
    return int(number) if number is not None and 0 <= number < 2**53 else None


def _percent(value: Any) -> int | None:
    number = _whole(value)
    return None if number is None else min(number, 100)


def _time(value: Any) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).replace(microsecond=0)
