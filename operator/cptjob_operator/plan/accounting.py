"""Time and devices that a job has held. Pure.

The figures are integrals of step functions: from one status write to the next, the number of pods
that stands in the status counts, so nothing has to be written for time to be counted. A write that
only tells of pods may wait some seconds for more, and the step is counted from the write.
"""

from datetime import datetime, timedelta

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.status import CPTJobStatus, PodCounts

#: Phases in which a job holds pods, be it the coordinator alone.
_HOLDING = (Phase.PREPARING, Phase.STARTING, Phase.RUNNING, Phase.RESTARTING)


def account(status: CPTJobStatus, gpus_per_node: int, now: datetime) -> CPTJobStatus:
    """The status with all figures brought up to `now`, at the counts that it holds."""
    if status.accounted_time is None:
        return status.model_copy(update={"accounted_time": now})
    seconds = int((now - status.accounted_time).total_seconds())
    if seconds <= 0:
        return status
    held = status.pods or PodCounts()
    return status.model_copy(
        update={
            # Whole seconds only; the rest is counted next time.
            "accounted_time": status.accounted_time + timedelta(seconds=seconds),
            "active_seconds": status.active_seconds + (seconds if holds(status) else 0),
            "node_seconds": status.node_seconds + seconds * held.scheduled,
            "gpu_seconds": status.gpu_seconds + seconds * held.scheduled * gpus_per_node,
        }
    )


def holds(status: CPTJobStatus) -> bool:
    """Whether the job's own time runs: it holds pods, and no queue or limit holds these back."""
    if status.phase is Phase.QUEUED:
        return False
    if status.pods is not None and status.pods.active > 0:
        return True
    ready = status.condition(Condition.READY)
    held = ready is not None and ready.reason == Reason.LIMIT_EXCEEDED
    return status.phase in _HOLDING and not held


def lose(status: CPTJobStatus, gpus_per_node: int, since: datetime | None, now: datetime) -> int:
    """GPU-seconds spent since `since`, whose work is lost with a failure now."""
    if since is None or status.pods is None:
        return 0
    seconds = max(0, int((now - since).total_seconds()))
    return seconds * status.pods.scheduled * gpus_per_node
