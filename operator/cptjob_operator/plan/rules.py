"""Decides what a job needs. Pure: the same job, observation, settings and time give the same plan.

`RULES` is the specification, in order. Each rule looks at the same value and answers with what is
wanted, which ends the pass; with another look, when it has decided on something that the rules
after it build on; or with None, when it has nothing to say.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.job import CPTJob
from cptjob_api.status import CPTJobStatus
from cptjob_operator.observed import Observed
from cptjob_operator.plan.endings import completion, deadline, finished, going, of_another
from cptjob_operator.plan.look import Look
from cptjob_operator.plan.preparing import acceptance, claims, preparation
from cptjob_operator.plan.recovering import backing_off, failures, giving_back
from cptjob_operator.plan.starting import placing, running, starting
from cptjob_operator.plan.suspending import suspension
from cptjob_operator.plan.together import moving
from cptjob_operator.settings import Settings
from cptjob_operator.wanted import Event, Wanted

Rule = Callable[[Look], Wanted | Look | None]

RULES: tuple[Rule, ...] = (
    going,
    of_another,
    finished,
    acceptance,
    deadline,
    completion,
    suspension,
    failures,
    claims,
    moving,
    preparation,
    giving_back,
    backing_off,
    placing,
    starting,
    running,
)

# What somebody has to mend or to provide before the job goes on.
_OBSTACLES = frozenset(
    {
        Reason.WAITING_FOR_SECRET,
        Reason.WAITING_FOR_CLAIM,
        Reason.WAITING_FOR_NODE,
        Reason.WAITING_FOR_POOL,
        Reason.WAITING_FOR_QUOTA,
        Reason.REFUSED,
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CONTAINER_CONFIG_ERROR,
        Reason.MOUNT_FAILED,
    }
)
# A difference in these alone is not worth a write, or not at once.
_TIMES = ("accounted_time", "active_seconds", "node_seconds", "gpu_seconds")
_COUNTS = ("pods", "replicas", "nodes", "trainer_status")


def plan(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
    """What `job` needs now. Never raises on a job that the API server can hold."""
    wanted = _decide(Look(job, observed, settings, now.replace(microsecond=0)))
    wanted = replace(wanted, events=(*wanted.events, *_obstacle(job.status, wanted.status)))
    if wanted.status is None or job.status is None:
        return wanted
    if _like(job.status, wanted.status, _TIMES) == wanted.status:
        return replace(wanted, status=None)  # time alone is never worth a write
    may_wait: tuple[str, ...] = (*_TIMES, *_COUNTS)
    if _begins_workers(job.status, wanted.status):
        may_wait += ("phase", "conditions")
    urgent = _like(job.status, wanted.status, may_wait) != wanted.status
    return replace(wanted, urgent=urgent)


def _decide(look: Look) -> Wanted:
    for rule in RULES:
        answer = rule(look)
        if isinstance(answer, Wanted):
            return replace(
                answer,
                events=(*look.events, *answer.events),
                restarts=(*look.restarts, *answer.restarts),
            )
        look = answer or look
    raise AssertionError("the last rule decides always")


def _begins_workers(before: CPTJobStatus, after: CPTJobStatus) -> bool:
    """The first workers are made, and nothing else was decided.

    Their names follow from what is in the status already, so that they need not wait for a write;
    a moment later one write holds this and their counts. Writes of the status are the dearest.
    """
    ready = after.condition(Condition.READY)
    return (
        (before.phase, after.phase) == (Phase.PREPARING, Phase.STARTING)
        and ready is not None
        and ready.reason == Reason.STARTING
    )


def _obstacle(before: CPTJobStatus | None, after: CPTJobStatus | None) -> tuple[Event, ...]:
    """What keeps the job from going on, once each time that it reads otherwise."""
    new = after.condition(Condition.READY) if after else None
    if new is None or new.reason not in _OBSTACLES:
        return ()
    old = before.condition(Condition.READY) if before else None
    if old is not None and (old.reason, old.message) == (new.reason, new.message):
        return ()
    return (Event("Warning", new.reason, new.message),)


def _like(before: CPTJobStatus, after: CPTJobStatus, names: Iterable[str]) -> CPTJobStatus:
    """The status before, but for these fields."""
    return before.model_copy(update={name: getattr(after, name) for name in names})
