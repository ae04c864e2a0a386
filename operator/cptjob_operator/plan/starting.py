"""Rules for workers on their way, and for those that train. Pure."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.status import CPTJobStatus
from cptjob_operator.identity import PodId
from cptjob_operator.objects import placement, pods
from cptjob_operator.observed import Pod
from cptjob_operator.plan import together, waiting
from cptjob_operator.plan.look import LOOK_AGAIN_SECONDS, Look
from cptjob_operator.plan.recovering import start_due
from cptjob_operator.wanted import Event, Wanted

#: Of the digest of an image, as far as the status takes it.
_MOST_CHARACTERS = 1024
#: Of the GPUs that others give back no event tells.
_COUNT_AGAIN_SECONDS = 30.0


def placing(look: Look) -> Wanted | None:
    """Nodes named by hand must be there, and fit, before anything is sent to them."""
    if not look.gang.missing or look.spec.scheduling.mode != "Manual":
        return None
    problems = placement.check(
        look.profile, look.gang.size, look.observed.nodes, look.observed.used_gpus
    )
    if not problems:
        return None
    message = "; ".join(each.message for each in problems)
    return look.wait(_before_running(look), problems[0].reason, message, LOOK_AGAIN_SECONDS)


def starting(look: Look) -> Wanted | None:
    """Make the workers that are missing, and say what the others wait for."""
    gang = look.gang
    # One whose container has ended is no longer ready, and a moment later it is no longer active.
    late = [pod for pod in gang.workers if not pod.ready and pod.active and pod.ended is None]
    if not gang.missing and not late:
        return None
    phase = _before_running(look)
    wanted = Wanted(
        status=_starting_status(look, phase, late),
        objects=(*look.missing_children(), *_make_workers(look, gang.missing)),
        again=_look_again(look),
    )
    return look.settle(wanted)


def running(look: Look) -> Wanted | None:
    """Every worker trains."""
    status = look.with_status(_with_image(look)).stand(
        Phase.RUNNING,
        Reason.RUNNING,
        Reason.RUNNING.sentence,
        retry_time=None,
    )
    events: tuple[Event, ...] = ()
    if look.status.phase is not Phase.RUNNING:
        events = (Event("Normal", Reason.RUNNING, f"{look.gang.size} workers train"),)
    return look.settle(
        Wanted(
            status=status,
            objects=look.missing_children(),
            events=events,
            again=start_due(look),
        )
    )


def _with_image(look: Look) -> CPTJobStatus:
    """The status with the digest of the image that was pulled first."""
    status, resolved = look.status, look.status.resolved
    pulled = (pod.image_id for pod in (look.gang.coordinator, *look.gang.workers) if pod)
    found = next((each[:_MOST_CHARACTERS] for each in pulled if each), None)
    if resolved is None or resolved.image_id is not None or found is None:
        return status
    known = resolved.model_copy(update={"image_id": found})
    return status.model_copy(update={"resolved": known})


def _make_workers(look: Look, missing: Iterable[PodId]) -> tuple[dict[str, Any], ...]:
    soft, hard = look.avoided
    near = together.near(look)
    return tuple(pods.worker(look.job, look.profile, each, soft, hard, near) for each in missing)


def _before_running(look: Look) -> Phase:
    """Starting for the first time, or again."""
    return Phase.RESTARTING if look.ran or look.status.last_failure else Phase.STARTING


def _starting_status(look: Look, phase: Phase, late: list[Pod]) -> CPTJobStatus:
    refused = waiting.refusal(look.observed.refused)
    found = waiting.obstacle(late, look.observed.claims)
    if refused is not None and look.gang.missing:
        reason, message = refused.reason, refused.message
    elif found is not None:
        reason, message = found.reason, found.message
    else:
        reason, message = Reason.STARTING, Reason.STARTING.sentence
    if reason is Reason.QUEUED:
        phase = Phase.QUEUED
    elif reason is Reason.UNSCHEDULABLE:
        message = _explain(look, message)
    bound = len(look.gang.workers) == look.gang.size and all(
        pod.node is not None for pod in look.gang.workers
    )
    scheduled = (
        (Condition.SCHEDULED, True, Reason.SCHEDULED, Reason.SCHEDULED.sentence)
        if bound
        else (Condition.SCHEDULED, False, reason, message)
    )
    return look.stand(phase, reason, message, scheduled)


def _explain(look: Look, message: str) -> str:
    """What the scheduler says, what the pool has, and which of its nodes are not wanted."""
    hard = look.avoided[1]
    nodes = look.observed.nodes
    problems = placement.unoffered(look.profile, nodes) + placement.check(
        look.profile, look.gang.size, nodes, look.observed.used_gpus, excluded=hard
    )
    said = [message, *(each.message for each in problems)]
    if hard and not problems:
        said.append(f"{', '.join(hard)}: avoided because pods failed there")
    return "; ".join(said)


def _look_again(look: Look) -> datetime | None:
    """When to look at workers that are not up yet."""
    due = start_due(look)
    if look.observed.refused:
        seconds = LOOK_AGAIN_SECONDS
    elif look.observed.used_gpus is not None and any(
        pod.unschedulable for pod in look.gang.workers
    ):
        seconds = _COUNT_AGAIN_SECONDS
    else:
        return due
    soon = look.now + timedelta(seconds=seconds)
    return min(soon, due) if due else soon
