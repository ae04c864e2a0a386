"""The restart ladder: what is made anew after a failure, when, and when to give up. Pure.

The first rung, processes in place, belongs to the launcher inside the pod. Here are the others:

    one pod      the dead ones are replaced, the others wait for them in their rendezvous: only
                 for what died without a word, as a launcher that can ends those of the others
    all pods     a new attempt, from the last checkpoint, with back-off
    give up      the budget is used up, or the job dies again and again at one step

Failures that follow one another within seconds are one failure: the peers of a dead rank die of it.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cptjob_api.conditions import Reason
from cptjob_api.spec import FailurePolicy
from cptjob_api.status import CPTJobStatus, ExcludedNode, LastFailure
from cptjob_operator.plan.outcomes import Cause, Outcome
from cptjob_operator.settings import Backoff, Settings

Rung = Literal["pod", "gang"]

#: What comes so soon after a failure is part of it.
CASCADE = timedelta(seconds=15)
#: Failures in a row at one step, after which another restart would only cost GPU time.
MAX_AT_ONE_STEP = 4
_SHORT = 1000
_NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Failure:
    """A pod that failed, and what that means."""

    pod: str
    node: str | None
    outcome: Outcome
    finished: datetime | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    """Answer to failures: the rung, the status with them counted, and when pods may be made.

    causes: of a restart that is one by itself, and no part of the one before.
    """

    rung: Rung
    status: CPTJobStatus
    causes: tuple[Cause, ...]
    fatal: tuple[Reason, str] | None = None


def root(failures: list[Failure]) -> Failure:
    """The failure that explains the others: a counted one before one that was done to the job, and
    of several the first.
    """
    return min(
        failures,
        key=lambda each: (
            not each.outcome.counted,
            each.outcome.cause == "Stopped",
            each.finished or _NEVER,
        ),
    )


def answer(
    status: CPTJobStatus,
    failures: list[Failure],
    survivors: int,
    policy: FailurePolicy,
    settings: Settings,
    uid: str,
    now: datetime,
) -> Restart:
    """What follows from `failures`, with `survivors` workers still up."""
    status = refill(status, policy)
    cause = root(failures)
    last = status.last_failure
    cascade = last is not None and now - last.time < CASCADE
    counted = cause.outcome.counted and not cascade
    repeated = _repeated(status, counted, cascade)
    rung: Rung = "pod" if survivors and repeated <= 1 else "gang"
    step = status.trainer_status.current_step if status.trainer_status else None
    at_step = last.at_step + 1 if last and repeated > 1 and last.step == step else 1
    delay = 0.0 if repeated <= 1 else backoff_seconds(repeated - 1, settings.timing.backoff, uid)
    counted_status = status.model_copy(
        update={
            "restarts": status.restarts + (0 if cascade else 1),
            "restarts_count_towards_max": status.restarts_count_towards_max + counted,
            "retry_time": now + timedelta(seconds=delay) if delay else status.retry_time,
            "last_failure": last
            if cascade
            else LastFailure(
                time=now,
                pod=cause.pod,
                node=cause.node,
                exit_code=cause.outcome.exit_code,
                reason=cause.outcome.cause,
                message=cause.outcome.message[:_SHORT],
                step=step,
                repeated=repeated,
                at_step=at_step,
            ),
            "excluded_nodes": _exclude(status.excluded_nodes, cause, policy, now)
            if not cascade
            else status.excluded_nodes,
        }
    )
    causes = () if cascade else (cause.outcome.cause,)
    return Restart(rung, counted_status, causes, _give_up(counted_status, policy, settings, cause))


def not_started(pod: str, message: str, times: int, now: datetime) -> LastFailure:
    """A gang that did not come up in time; `times` in a row. It counts against nothing."""
    return LastFailure(
        time=now, pod=pod, reason="NotStarted", message=message[:_SHORT], repeated=times
    )


def refill(status: CPTJobStatus, policy: FailurePolicy) -> CPTJobStatus:
    """A newer checkpoint than at the last failure gives the restarts back."""
    failed, saved = status.last_failure, status.last_checkpoint
    if not (policy.reset_on_progress and failed and saved):
        return status
    if saved.time <= failed.time:
        return status
    return status.model_copy(
        update={
            "restarts_count_towards_max": 0,
            "last_failure": failed.model_copy(update={"repeated": 0}),
        }
    )


def backoff_seconds(times: int, backoff: Backoff, uid: str) -> float:
    """Seconds to wait before try `times` + 1: doubling from the base to the cap, spread by a fifth.

    The spread is a hash, so that the same question gets the same answer.
    """
    plain = min(backoff.cap_seconds, backoff.base_seconds * 2.0 ** min(times - 1, 30))
    drawn = hashlib.sha256(f"{uid}/{times}".encode()).digest()[0] / 255.0
    return plain * (0.8 + 0.4 * drawn)


def _repeated(status: CPTJobStatus, counted: bool, cascade: bool) -> int:
    before = status.last_failure.repeated if status.last_failure else 0
    if cascade or not counted:
        return before if cascade else 0
    return before + 1


def _give_up(
    status: CPTJobStatus, policy: FailurePolicy, settings: Settings, cause: Failure
) -> tuple[Reason, str] | None:
    said = f"{cause.pod}: {cause.outcome.message}"
    if status.restarts_count_towards_max > policy.max_restarts:
        return Reason.RESTARTS_EXHAUSTED, (
            f"failed {status.restarts_count_towards_max} times, more than failurePolicy.maxRestarts "
            f"({policy.max_restarts}) allows; the last: {said}"
        )
    if status.restarts > settings.limits.max_uncounted_restarts + policy.max_restarts:
        return Reason.RESTARTS_EXHAUSTED, (
            f"restarted {status.restarts} times, disruptions included; the last: {said}"
        )
    last = status.last_failure
    if last is not None and last.step is not None and last.at_step > MAX_AT_ONE_STEP:
        return (
            Reason.FAILS_AT_STEP,
            f"failed {last.at_step} times in a row at step {last.step}: {said}",
        )
    return None


def _exclude(
    excluded: tuple[ExcludedNode, ...], cause: Failure, policy: FailurePolicy, now: datetime
) -> tuple[ExcludedNode, ...]:
    """The nodes to avoid, with that of `cause` if it is to blame; its peers died of it elsewhere."""
    table = {each.name: each for each in excluded if each.until is None or each.until > now}
    known = table.get(cause.node or "")
    room = known is not None or len(table) < policy.max_excluded_nodes
    if cause.node is not None and cause.outcome.blames_node and room:
        table[cause.node] = ExcludedNode(
            name=cause.node,
            reason=cause.outcome.message[:_SHORT],
            failures=known.failures + 1 if known else 1,
            until=now + timedelta(seconds=policy.excluded_node_ttl_seconds),
        )
    return tuple(table[name] for name in sorted(table))
