"""Decides what a job needs. Pure: the same job, observation, settings and time give the same plan.

`RULES` is the specification, in order. Each rule looks at the same value and answers with what is
wanted, which ends the pass; with another look, when it has decided on something that the rules
after it build on; or with None, when it has nothing to say.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.job import CPTJob
from cptjob_api.status import ConditionStatus, CPTJobStatus
from cptjob_operator.observed import Observed
from cptjob_operator.plan.endings import completion, deadline, finished, going, of_another
from cptjob_operator.plan.look import LOOK_AGAIN_SECONDS, Look
from cptjob_operator.plan.preparing import acceptance, claims, preparation
from cptjob_operator.plan.recovering import backing_off, failures, giving_back
from cptjob_operator.plan.resizing import beyond_limit, resizing
from cptjob_operator.plan.starting import placing, running, starting
from cptjob_operator.plan.suspending import suspension
from cptjob_operator.plan.together import moving
from cptjob_operator.plan.waiting import gist
from cptjob_operator.settings import Settings
from cptjob_operator.wanted import Event, Wanted

Rule = Callable[[Look], Wanted | Look | None]

RULES: tuple[Rule, ...] = (
    going,
    of_another,
    finished,
    acceptance,
    completion,
    deadline,
    suspension,
    beyond_limit,
    resizing,
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
        Reason.INVALID_SPEC,
        Reason.NOT_SUPPORTED,
        Reason.LIMIT_EXCEEDED,
        Reason.WAITING_FOR_SECRET,
        Reason.WAITING_FOR_CLAIM,
        Reason.CLAIM_NOT_SHARED,
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
# A difference in these alone is not worth a write.
_TIMES = ("accounted_time", "active_seconds", "node_seconds", "gpu_seconds")
# What is told, not decided: it may wait for more, as writes of the status are the dearest of all.
_TOLD = ("pods", "replicas", "nodes", "trainer_status", "last_checkpoint", "phase", "conditions")
# Somebody waits for a job to be in one of these.
_AWAITED = (Phase.SUSPENDED, Phase.COMPLETE, Phase.FAILED)


def plan(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
    """What `job` needs now. Never raises on a job that the API server can hold."""
    wanted = _decide(Look(job, observed, settings, now.replace(microsecond=0)))
    wanted = replace(wanted, events=(*wanted.events, *_obstacle(job.status, wanted.status)))
    if wanted.status is None or job.status is None:
        return wanted
    if _like(job.status, wanted.status, _TIMES) == wanted.status:
        return replace(wanted, status=None)  # time alone is never worth a write
    due = (job.status.accounted_time or now) + timedelta(seconds=LOOK_AGAIN_SECONDS)
    if now < due and _only_reworded(job.status, wanted.status):
        return replace(wanted, status=None, again=min(due, wanted.again or due))
    # Its content is restored in this pass, whatever becomes of the status, and told once.
    lost = any(each.reason == Reason.CONFIG_LOST for each in wanted.events)
    return replace(wanted, urgent=lost or _is_urgent(job.status, wanted.status))


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


def _is_urgent(before: CPTJobStatus, after: CPTJobStatus) -> bool:
    """Something was decided, which must be in the status before it is done; or somebody waits."""
    if after.phase in _AWAITED and before.phase is not after.phase:
        return True
    return _like(before, after, (*_TIMES, *_TOLD)) != after


def _obstacle(before: CPTJobStatus | None, after: CPTJobStatus | None) -> tuple[Event, ...]:
    """What keeps the job from going on, once each time that it reads otherwise."""
    if after is None or after.phase is Phase.FAILED:  # an end tells itself
        return ()
    new = after.condition(Condition.READY)
    if new is None or new.reason not in _OBSTACLES:
        return ()
    old = before.condition(Condition.READY) if before else None
    if old is not None and old.reason == new.reason and gist(old.message) == gist(new.message):
        return ()
    return (Event("Warning", new.reason, new.message),)


def _only_reworded(before: CPTJobStatus, after: CPTJobStatus) -> bool:
    """The conditions say the same in other words, and nothing else is new."""
    if _like(before, after, (*_TIMES, "conditions")) != after:
        return False
    return [_sense(each) for each in before.conditions] == [
        _sense(each) for each in after.conditions
    ]


def _sense(condition: ConditionStatus) -> tuple[ConditionStatus, frozenset[str]]:
    return condition.model_copy(update={"message": ""}), gist(condition.message)


def _like(before: CPTJobStatus, after: CPTJobStatus, names: Iterable[str]) -> CPTJobStatus:
    """The status before, but for these fields."""
    return before.model_copy(update={name: getattr(after, name) for name in names})
