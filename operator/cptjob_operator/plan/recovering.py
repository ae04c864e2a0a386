"""Rules for workers that failed, do not start, or must wait before they are tried again. Pure."""

from dataclasses import replace
from datetime import datetime, timedelta

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_operator.observed import Pod
from cptjob_operator.plan import accounting, outcomes, restarts, waiting
from cptjob_operator.plan.gang import Gang, next_attempt
from cptjob_operator.plan.look import Look
from cptjob_operator.wanted import Event, Wanted


def failures(look: Look) -> Wanted | Look | None:
    """Workers that failed, were taken away or vanished: the restart ladder."""
    gang = look.gang
    ended = gang.ended(gang.workers)
    found = [_failure(look, pod) for pod in ended]
    gone = [each for each in gang.missing if each in look.observed.vanished or _was_running(look)]
    found += [
        restarts.Failure(each.name(look.job.metadata.name), None, outcomes.vanished())
        for each in gone
    ]
    if not found:
        return None
    fatal = next((each for each in found if each.outcome.fatal), None)
    if fatal is not None and fatal.outcome.fatal is not None:
        return look.fail(fatal.outcome.fatal, fatal.outcome.message)
    cause = restarts.root(found)
    if cause.outcome.cause == "NotStarted":
        return _give_back(look, cause.pod, cause.outcome.message)
    restart = restarts.answer(
        look.status,
        found,
        _survivors(gang),
        look.spec.failure_policy,
        look.settings,
        look.uid,
        look.now,
    )
    if restart.fatal is not None:
        return look.with_status(restart.status).fail(*restart.fatal)
    if restart.rung == "gang":
        status = next_attempt(restart.status)
    else:
        status = replace(gang, status=restart.status).next_incarnation(
            *(pod.id for pod in ended), *gone
        )
    lost = accounting.lose(look.status, look.gpus_per_node, _useful_until(look), look.now)
    status = status.model_copy(update={"lost_gpu_seconds": status.lost_gpu_seconds + lost})
    reason = Reason.RESTARTING if cause.outcome.counted else Reason.DISRUPTED
    told = Event("Warning", reason, f"{cause.pod}: {cause.outcome.message}")
    return look.with_status(
        status,
        events=(*look.events, told),
        restarts=(*look.restarts, *restart.causes),
    )


def giving_back(look: Look) -> Wanted | None:
    """A gang that does not come up in time frees the nodes that it holds, and tries again later."""
    gang = look.gang
    due = start_due(look)
    if due is None or look.now < due:
        return None
    late = _late(gang)
    state = f"{len(late)} of {gang.size} are not ready"
    if not late:
        state = f"{len(gang.missing)} of {gang.size} could not be made"
    return _give_back(look, (*late, *gang.workers)[0].name, state)


def _give_back(look: Look, pod: str, why: str) -> Wanted:
    """All workers go. `why` is told where nothing that is seen explains it better."""
    gang = look.gang
    found = waiting.obstacle(_late(gang), look.observed.claims)
    if gang.missing:
        found = waiting.refusal(look.observed.refused) or found
    message = f"not all workers started in time: {found.message if found else why}"
    last = look.status.last_failure
    times = last.repeated + 1 if last and last.reason == "NotStarted" else 1
    retry = look.now + timedelta(
        seconds=restarts.backoff_seconds(times + 2, look.settings.timing.backoff, look.uid)
    )
    status = next_attempt(look.status).model_copy(
        update={
            "retry_time": retry,
            "last_failure": restarts.not_started(pod, message, times, look.now),
        }
    )
    given = look.with_status(status)
    told = [Event("Warning", Reason.STARTUP_DEADLINE_EXCEEDED, message)]
    if found:  # it may have come too late to be told before
        told.insert(0, Event("Warning", found.reason, found.message))
    return given.settle(
        Wanted(
            status=given.stand(Phase.RESTARTING, Reason.STARTUP_DEADLINE_EXCEEDED, message),
            events=tuple(told),
            again=retry,
            restarts=("NotStarted",),
        )
    )


def backing_off(look: Look) -> Wanted | None:
    """After repeated failures nothing is made until its time has come."""
    due = look.status.retry_time
    if due is None or look.now >= due or not look.gang.missing:
        return None
    last = look.status.last_failure
    message = f"{last.message}; trying again at {due:%H:%M:%S}Z" if last else ""
    wanted = Wanted(
        status=look.stand(Phase.RESTARTING, Reason.RESTARTING, message),
        objects=look.missing_children(),
        again=due,
    )
    return look.settle(wanted)


def _failure(look: Look, pod: Pod) -> restarts.Failure:
    end = outcomes.outcome(pod, look.profile.model_path)
    return restarts.Failure(pod.name, pod.node, end, pod.ended.finished if pod.ended else None)


def _survivors(gang: Gang) -> int:
    """Workers that can go on once the others are replaced.

    A launcher that ends by itself tells the others of its attempt, which end as well, and whoever
    came to that attempt later would end at once.
    """
    ended = gang.ended(gang.workers)
    if any(pod.ended is not None and pod.ended.termination is not None for pod in ended):
        return 0
    return sum(pod.active and pod not in ended for pod in gang.workers)


def _was_running(look: Look) -> bool:
    """All workers of this attempt were seen; one that is missing now is not one yet to be made."""
    condition = look.status.condition(Condition.RUNNING)
    before = look.job.status
    return (
        before is not None
        and before.attempt == look.status.attempt
        and look.status.phase is Phase.RUNNING
        and condition is not None
        and condition.status == "True"
        and look.status.pods is not None
        and look.status.pods.ready >= look.gang.size
    )


def _useful_until(look: Look) -> datetime | None:
    """What was trained after this is lost with the gang."""
    saved = look.status.last_checkpoint
    condition = look.status.condition(Condition.RUNNING)
    begun = condition.last_transition_time if condition and condition.status == "True" else None
    if saved is None or (begun is not None and saved.time < begun):
        return begun
    return saved.time


def _late(gang: Gang) -> list[Pod]:
    """Workers that are not up yet, though no queue holds them back; a coordinator they wait for.

    One that was up is not late: it is not ready, too, while its node is silent for a moment.
    """
    late = [pod for pod in gang.workers if pod.phase == "Pending" and not pod.gated]
    new = gang.coordinator
    if new is not None and new.phase == "Pending" and gang.active_workers:
        late.append(new)
    return late


def start_due(look: Look) -> datetime | None:
    """When the gang gives back what it holds; None when nothing is late.

    The clock starts with the newest pod: one that replaces another has its own time. So has one
    that cannot be made, as its node is not there or the API server refuses it.
    """
    gang = look.gang
    late = _late(gang)
    alone = [pod for pod in gang.workers if pod.active] if gang.missing else []
    made = [pod.created for pod in late or alone if pod.created]
    if not made:
        return None
    if not late and look.status.last_failure is not None:
        made.append(look.status.last_failure.time)  # since then one is missing
    found = waiting.obstacle(late, look.observed.claims)
    seconds = look.spec.startup_deadline_seconds
    if found is not None and found.reason in waiting.BROKEN:
        seconds = min(seconds, look.settings.timing.broken_start_seconds)
    return max(made) + timedelta(seconds=seconds)
