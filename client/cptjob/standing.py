"""How a job of a cluster stands, in words: a table of many, a page of one, a report for the bar."""

import contextlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from cptjob_api.conditions import Condition
from cptjob_api.job import TENSORBOARD_PORT, CPTJob, tensorboard_name
from cptjob_api.status import CPTJobStatus
from cptjob_trainer.training.narrator import describe

#: These are never taken back.
ENDED = (Condition.COMPLETE, Condition.FAILED)
_COLUMNS = ("NAME", "STATE", "NODES", "STEP", "PROGRESS", "CHECKPOINT", "RESTARTS", "AGE")


def is_true(job: CPTJob, kind: Condition) -> bool:
    """Whether a condition of the job is True, of the spec as it is now."""
    if job.status is None:
        return False
    found = job.status.condition(kind)
    if found is None or found.status != "True":
        return False
    # Complete and Failed are for ever; the others may speak of an older spec.
    return kind in ENDED or job.status.observed_generation == job.metadata.generation


def table(jobs: Iterable[CPTJob], now: datetime | None = None) -> str:
    """A line a job, as `kubectl get` has them."""
    now = now or datetime.now(UTC)
    rows = [_COLUMNS, *(_row(job, now) for job in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "   ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(job: CPTJob, now: datetime) -> tuple[str, ...]:
    status = job.status or CPTJobStatus()
    said, saved = status.trainer_status, status.last_checkpoint
    made = job.metadata.creation_timestamp
    step = said.current_step if said else None
    percent = said.progress_percentage if said else None
    return (
        job.metadata.name,
        status.phase or "",
        str(job.spec.trainer.num_nodes),
        "" if step is None else str(step),
        "" if percent is None else f"{percent} %",
        str(saved.step) if saved else "",
        str(status.restarts),
        _age((now - made).total_seconds()) if made else "",
    )


def _age(seconds: float) -> str:
    """As kubectl has it: 119s, 3m, 5h, 2d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def page(job: CPTJob) -> str:
    """All that a person wants to know of one job."""
    status = job.status or CPTJobStatus()
    lines = [f"{job.metadata.name}: {status.phase or 'not seen by an operator yet'}"]
    if why(job):
        lines += [f"  {why(job)}", ""]
    lines += [f"  {name + ':':<14}{text}" for name, text in _facts(job, status) if text]
    return "\n".join(lines).rstrip()


def why(job: CPTJob) -> str:
    """What the operator says of the phase: the message of the condition that stands for it."""
    if job.status is None:
        return ""
    for kind in (Condition.FAILED, Condition.COMPLETE, Condition.RECONCILING, Condition.READY):
        found = job.status.condition(kind)
        if found is not None and (found.status == "True" or kind is Condition.READY):
            return found.message
    return ""


def _facts(job: CPTJob, status: CPTJobStatus) -> list[tuple[str, str]]:
    failure, result, saved = status.last_failure, status.result, status.last_checkpoint
    report = progress(job)
    report.pop("message", None)
    report.pop("lastCheckpoint", None)
    return [
        ("Progress", describe(report)),
        ("Checkpoint", f"step {saved.step}, {saved.uri}" if saved else ""),
        ("Nodes", ", ".join(node.name for node in status.nodes)),
        ("Restarts", str(status.restarts) if status.restarts else ""),
        ("Last failure", f"{failure.pod}: {failure.message}" if failure else ""),
        ("Output", (result.output_uri or "") if result else ""),
        ("Model", (result.model_uri or "") if result else ""),
        ("TensorBoard", _tensorboard(job, status)),
    ]


def _tensorboard(job: CPTJob, status: CPTJobStatus) -> str:
    """How to open it, from when the operator makes it."""
    prepared = status.condition(Condition.PREPARED)
    is_prepared = prepared is not None and prepared.status == "True"
    if not job.spec.tracking.tensor_board or not (is_prepared or status.phase == "Complete"):
        return ""
    service = f"svc/{tensorboard_name(job.metadata.name)}"
    port = TENSORBOARD_PORT
    return (
        f"http://localhost:{port} after kubectl port-forward -n {job.metadata.namespace} "
        f"{service} {port}"
    )


def progress(job: CPTJob) -> dict[str, Any]:
    """The job's status in the form of the coordinator's /progress, as LiveDisplay shows it."""
    status = job.status or CPTJobStatus()
    said, saved = status.trainer_status, status.last_checkpoint
    phase = status.phase or "Pending"
    found: dict[str, Any] = {"phase": phase}
    if phase != "Running":
        found["message"] = why(job)
    if saved is not None:
        found["lastCheckpoint"] = {"step": saved.step}
    if said is not None:
        found |= {
            "currentStep": said.current_step or 0,
            "totalSteps": said.total_steps,
            "progressPercentage": said.progress_percentage,
            "metrics": _numbers(said.metrics),
        }
        if phase == "Running":
            found["tokensPerSecond"] = said.tokens_per_second
            found["estimatedRemainingSeconds"] = said.estimated_remaining_seconds
    return found


def _numbers(metrics: Iterable[Any]) -> dict[str, float]:
    found = {}
    for metric in metrics:
        with contextlib.suppress(ValueError):
            found[metric.name] = float(metric.value)
    return found
