"""Decides what a job needs. Pure: the same job, observation, settings and time give the same plan.

`RULES` is the specification, in order: each rule looks at the same value, and the first that has
something to say decides the pass. A pass that has written an attempt, an incarnation or what was
resolved may at once make the objects that follow from it: the status is written first.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.job import CPTJob
from cptjob_api.spec import CPTJobSpec
from cptjob_api.status import (
    CPTJobStatus,
    NodeRanks,
    PodCounts,
    Result,
)
from cptjob_operator import (
    accept,
    accounting,
    children,
    outcomes,
    placement,
    pods,
    restarts,
    standing,
    waiting,
)
from cptjob_operator.gang import Gang, next_attempt
from cptjob_operator.identity import MANAGER, PodId, Role, worker_selector
from cptjob_operator.observed import Observed, Pod, Report
from cptjob_operator.profile import Profile
from cptjob_operator.reported import read_report
from cptjob_operator.settings import Settings
from cptjob_operator.wanted import Deletion, Event, Wanted

#: Finished pods that are kept for their logs.
KEPT_FAILED_PODS = 4
#: An image, a secret or a volume that is broken is told and given this long, whatever the spec says.
BROKEN_SECONDS = 120
#: How often to look again at what no event tells.
LOOK_AGAIN_SECONDS = 15.0
_BAD_ENDS = (Phase.COMPLETE, Phase.FAILED)


@dataclass(frozen=True)
class Look:
    """Everything a rule may look at, and the ways to say what follows."""

    job: CPTJob
    observed: Observed
    settings: Settings
    now: datetime

    # --- what is there ------------------------------------------------------------------------

    @cached_property
    def status(self) -> CPTJobStatus:
        """The status with its accounts and the trainer's report brought up to now."""
        status = self.job.status or CPTJobStatus()
        status = accounting.account(status, self.gpus_per_node, self.now)
        return read_report(status, self.observed.report)

    @property
    def spec(self) -> CPTJobSpec:
        return self.job.spec

    @property
    def uid(self) -> str:
        return self.job.metadata.uid or ""

    @property
    def generation(self) -> int:
        return self.job.metadata.generation or 0

    @property
    def profile(self) -> Profile:
        assert self.observed.profile is not None, "asked for before acceptance"
        return self.observed.profile

    @property
    def gpus_per_node(self) -> int:
        return self.observed.profile.gpus_per_node if self.observed.profile else 0

    @cached_property
    def gang(self) -> Gang:
        return Gang(
            self.uid,
            self.spec.trainer.num_nodes,
            self.status,
            self.observed.pods,
            self.observed.vanished,
        )

    # --- what follows -------------------------------------------------------------------------

    def with_status(self, status: CPTJobStatus) -> "Look":
        """The same look after `status` was decided on."""
        look = replace(self)
        look.__dict__["status"] = status
        return look

    def stand(
        self,
        phase: Phase,
        reason: Reason,
        message: str = "",
        *extra: tuple[Condition, bool, Reason, str],
        **changes: Any,
    ) -> CPTJobStatus:
        """The status of a job in `phase`, with its counts, its conditions and `changes`."""
        gang, before = self.gang, self.status
        nodes = {pod.node for pod in gang.active_workers if pod.node}
        counts = PodCounts(
            active=len(gang.active_workers),
            scheduled=sum(pod.node is not None for pod in gang.active_workers),
            ready=sum(pod.ready for pod in gang.workers if pod.active),
            succeeded=sum(pod.phase == "Succeeded" for pod in gang.workers),
            failed=sum(pod.phase == "Failed" and pod.role is Role.WORKER for pod in gang.pods),
        )
        ranks = {each.name: each.ranks for each in before.nodes}
        return before.model_copy(
            update={
                "observed_generation": self.generation,
                "phase": phase,
                "start_time": before.start_time or self.now,
                "pods": counts,
                "replicas": counts.active,
                "selector": worker_selector(self.job.metadata.name, self.uid),
                "nodes": tuple(
                    NodeRanks(name=name, ranks=ranks.get(name, ())) for name in sorted(nodes)
                ),
                "accounted_time": before.accounted_time or self.now,
                **changes,
                "conditions": standing.conditions(
                    before.conditions,
                    phase,
                    reason,
                    message,
                    self.generation,
                    self.now,
                    (*self._checkpoint(), *extra),
                ),
            }
        )

    def _checkpoint(self) -> Iterable[tuple[Condition, bool, Reason, str]]:
        saved = self.status.last_checkpoint
        if saved is None:
            return
        yield Condition.CHECKPOINT_READY, True, Reason.CHECKPOINT_SAVED, f"step {saved.step}"

    def wait(
        self, phase: Phase, reason: Reason, message: str, seconds: float | None = None
    ) -> Wanted:
        """Nothing to do but to say why."""
        again = None if seconds is None else self.now + timedelta(seconds=seconds)
        return self.settle(Wanted(status=self.stand(phase, reason, message), again=again))

    def fail(self, reason: Reason, message: str) -> Wanted:
        """The end without a model."""
        status = self.stand(
            Phase.FAILED, reason, message, completion_time=self.now, retry_time=None
        )
        return Wanted(
            status=status,
            deletions=_delete(self.gang.active, "the job has failed"),
            events=(Event("Warning", reason, message),),
            again=self.now,
        )

    def settle(self, wanted: Wanted) -> Wanted:
        """What every pass of a living job does beside: removes what is not wanted any more."""
        surplus = _delete(self.gang.surplus, "replaced") + self._stuck()
        return replace(wanted, deletions=(*wanted.deletions, *surplus, *_old(self.gang)))

    def _stuck(self) -> tuple[Deletion, ...]:
        """Pods that are to go and whose node is gone, so that nobody can say that they went."""
        return tuple(
            Deletion("Pod", pod.name, pod.uid, grace_seconds=0, why="its node is gone")
            for pod in self.gang.pods
            if pod.deleting is not None and pod.node and self._is_gone(pod.node)
        )

    def _is_gone(self, name: str) -> bool:
        node = self.observed.nodes.get(name)
        return bool(self.observed.nodes) and (node is None or node.fenced)

    def missing_children(self) -> tuple[dict[str, Any], ...]:
        """ConfigMap, Service and NetworkPolicy, as far as they are missing or differ."""
        there = {each.kind: each for each in self.observed.children}
        found: list[dict[str, Any]] = []
        for wanted in children.children(self.job, self.profile, self.observed.config):
            child = there.get(wanted["kind"])
            if child is None:
                found.append(wanted)
            elif wanted["kind"] != "ConfigMap" and child.hash != children.hash_of(wanted):
                found.append(wanted)  # the ConfigMap is never changed, nor can it be
        return tuple(found)


# --- the rules --------------------------------------------------------------------------------


def going(look: Look) -> Wanted | None:
    """A job that is being deleted: everything of it goes by its owner references."""
    return Wanted() if look.job.metadata.deletion_timestamp is not None else None


def of_another(look: Look) -> Wanted | None:
    """A job that another controller looks after."""
    manager = look.spec.managed_by
    return Wanted() if manager is not None and manager != MANAGER else None


def finished(look: Look) -> Wanted | None:
    """Complete or failed: nothing runs on, and the object goes when its time is over."""
    status = look.job.status
    if status is None or status.phase not in _BAD_ENDS:
        return None
    deletions = _delete(look.gang.active, "the job has ended") + look._stuck() + _old(look.gang)
    written = None
    if status.observed_generation != look.generation or _counts_differ(look):
        was = status.condition(
            Condition.COMPLETE if status.phase is Phase.COMPLETE else Condition.FAILED
        )
        reason = Reason(was.reason) if was else Reason.COMPLETE
        written = look.stand(status.phase, reason, was.message if was else "")
    ttl = look.spec.ttl_seconds_after_finished
    if ttl is None or status.completion_time is None:
        return Wanted(status=written, deletions=deletions)
    due = status.completion_time + timedelta(seconds=ttl)
    if look.now < due:
        return Wanted(status=written, deletions=deletions, again=due)
    gone = Deletion("CPTJob", look.job.metadata.name, look.uid, why="ttlSecondsAfterFinished")
    return Wanted(deletions=(*deletions, gone))


def acceptance(look: Look) -> Wanted | None:
    """A new job: decide everything that it leaves out, once, or say why it cannot be done."""
    status = look.job.status
    if status is not None and status.resolved is not None and look.observed.profile is not None:
        return None
    answer = accept.accept(look.job, look.settings)
    if isinstance(answer, accept.Refused):
        return look.fail(answer.reason, answer.message)
    resolved = answer.resolved.status()
    told = [Event("Normal", Reason.ACCEPTED, Reason.ACCEPTED.sentence)]
    if status is not None and status.resolved is not None:
        # Only the ConfigMap was lost: what was decided stands.
        resolved, told = status.resolved, []
    accepted = replace(
        look,
        observed=replace(look.observed, profile=answer.profile, config=answer.config),
    ).with_status(look.status.model_copy(update={"resolved": resolved}))
    following = _decide(accepted, RULES[RULES.index(acceptance) + 1 :])
    # A job that waits, too, keeps what was decided now.
    asked = {_key(each) for each in following.objects}
    kept = [each for each in accepted.missing_children() if _key(each) not in asked]
    return replace(
        following,
        objects=(*kept, *following.objects),
        events=(*told, *following.events),
    )


def deadline(look: Look) -> Wanted | None:
    """The job has held pods for longer than it may."""
    limit, spent = look.spec.active_deadline_seconds, look.status.active_seconds
    if limit is None or spent < limit:
        return None
    return look.fail(
        Reason.DEADLINE_EXCEEDED,
        f"held pods for {spent} s, more than activeDeadlineSeconds ({limit}) allows",
    )


def suspension(look: Look) -> Wanted | None:
    """Workers save and leave, then the coordinator; a resumed job is a new attempt."""
    if not look.spec.suspend:
        return None
    gang = look.gang
    if gang.active:
        # The coordinator hosts the store in which the workers agree on the step to save.
        leaving = gang.active_workers or gang.active
        phase = look.status.phase or Phase.PENDING
        return Wanted(
            status=look.stand(
                phase,
                Reason.SUSPENDING,
                Reason.SUSPENDING.sentence,
                (Condition.SUSPENDED, False, Reason.SUSPENDING, Reason.SUSPENDING.sentence),
            ),
            deletions=_delete([pod for pod in leaving if pod.deleting is None], "suspended")
            + look._stuck(),
        )
    if look.status.phase is Phase.SUSPENDED:
        return Wanted(
            status=look.stand(Phase.SUSPENDED, Reason.SUSPENDED, _suspended(look))
        )
    status = look.status
    if gang.pods or status.phase not in (None, Phase.PENDING):
        status = gang.next_incarnation(gang.coordinator_id)
        status = next_attempt(status)
    suspended = look.with_status(status.model_copy(update={"retry_time": None}))
    return Wanted(
        status=suspended.stand(Phase.SUSPENDED, Reason.SUSPENDED, _suspended(look)),
        events=(Event("Normal", Reason.SUSPENDED, _suspended(look)),),
    )


def completion(look: Look) -> Wanted | None:
    """The model is written: the coordinator says so, or every worker has ended well."""
    gang = look.gang
    ended = gang.coordinator is not None and gang.coordinator.phase == "Succeeded"
    every = len(gang.workers) == gang.size and all(
        pod.phase == "Succeeded" for pod in gang.workers
    )
    if not (ended or every):
        return None
    said = gang.coordinator.ended if gang.coordinator else None
    already = bool(said and said.termination and said.termination.reason == "AlreadyComplete")
    reason = Reason.ALREADY_COMPLETE if already else Reason.COMPLETE
    status = look.with_status(_with_result(look, said.termination.message if said and said.termination else ""))
    return Wanted(
        status=status.stand(
            Phase.COMPLETE,
            reason,
            reason.sentence,
            completion_time=look.now,
            retry_time=None,
        ),
        deletions=_delete(gang.active, "the job is complete"),
        events=(Event("Normal", reason, reason.sentence),),
        again=look.now,
    )


def preparation(look: Look) -> Wanted | None:
    """Until the coordinator is ready: model and data are being checked and made into tokens."""
    gang = look.gang
    pod = gang.coordinator
    if pod is not None and pod.phase == "Failed":
        return _coordinator_failed(look, pod)
    lost = pod is None and gang.coordinator_id in look.observed.vanished
    if lost or (pod is not None and pod.deleting is not None and not look.spec.suspend):
        return _replace_coordinator(look, pod)
    if pod is None:
        return _make_coordinator(look)
    if pod.ready:
        return None
    if look.status.condition(Condition.RUNNING) and gang.active_workers:
        return None  # workers that train wait for a new coordinator in their rendezvous
    found = waiting.obstacle([pod])
    if found is not None:
        return look.wait(Phase.PENDING, found.reason, found.message, LOOK_AGAIN_SECONDS)
    message = _preparing_message(look)
    return look.settle(
        Wanted(
            status=look.stand(Phase.PREPARING, Reason.PREPARING, message),
            objects=look.missing_children(),
        )
    )


def failures(look: Look) -> Wanted | None:
    """Workers that failed, were taken away or vanished: the restart ladder."""
    gang = look.gang
    found = [
        restarts.Failure(pod.name, pod.node, outcomes.outcome(pod, look.profile.model_path))
        for pod in gang.ended(gang.workers)
    ]
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
    ended = {pod.id for pod in gang.ended(gang.workers)}
    survivors = [pod for pod in gang.workers if pod.active and pod.id not in ended]
    restart = restarts.answer(
        look.status, found, len(survivors), look.spec.failure_policy, look.uid, look.now
    )
    if restart.fatal is not None:
        return look.with_status(restart.status).fail(*restart.fatal)
    if restart.rung == "gang":
        status = next_attempt(restart.status)
    else:
        status = replace(gang, status=restart.status).next_incarnation(*ended, *gone)
    lost = accounting.lose(look.status, look.gpus_per_node, _useful_until(look), look.now)
    status = status.model_copy(update={"lost_gpu_seconds": status.lost_gpu_seconds + lost})
    cause = restarts.root(found)
    reason = Reason.RESTARTING if cause.outcome.counted else Reason.DISRUPTED
    told = Event("Warning", reason, f"{cause.pod}: {cause.outcome.message}")
    following = _decide(look.with_status(status), RULES[RULES.index(failures) + 1 :])
    return replace(
        following,
        events=(told, *following.events),
        restarts=(cause.outcome.cause, *following.restarts),
    )


def giving_back(look: Look) -> Wanted | None:
    """A gang that does not come up in time frees the nodes that it holds, and tries again later."""
    gang = look.gang
    late = [pod for pod in gang.workers if pod.active and not pod.ready and not pod.gated]
    if not late:
        return None
    found = waiting.obstacle(late)
    broken = found is not None and found.reason in (*waiting.BROKEN, Reason.WAITING_FOR_SECRET)
    allowed = look.spec.startup_deadline_seconds
    allowed = min(allowed, BROKEN_SECONDS) if broken else allowed
    begun = max((pod.created for pod in late if pod.created), default=None)
    if begun is None or look.now < begun + timedelta(seconds=allowed):
        return None
    last = look.status.last_failure
    times = last.repeated + 1 if last and last.reason == "NotStarted" else 1
    why = found.message if found else f"{len(late)} of {gang.size} workers did not start"
    message = f"not all workers started within {allowed} s: {why}"
    retry = look.now + timedelta(seconds=restarts.backoff_seconds(times + 2, look.uid))
    status = next_attempt(look.status).model_copy(
        update={
            "restarts": look.status.restarts + 1,
            "retry_time": retry,
            "last_failure": restarts.not_started(
                late[0].name, late[0].node, message, times, look.now
            ),
        }
    )
    given = look.with_status(status)
    return given.settle(
        Wanted(
            status=given.stand(Phase.RESTARTING, Reason.STARTUP_DEADLINE_EXCEEDED, message),
            events=(Event("Warning", Reason.STARTUP_DEADLINE_EXCEEDED, message),),
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
    late = [pod for pod in gang.workers if not pod.ready and pod.active]
    if not gang.missing and not late:
        return None
    phase = _before_running(look)
    wanted = Wanted(
        status=_starting_status(look, phase, late),
        objects=(*look.missing_children(), *_make_workers(look, gang.missing)),
        again=_start_deadline(look, late),
    )
    return look.settle(wanted)


def running(look: Look) -> Wanted | None:
    """Every worker trains."""
    status = look.stand(
        Phase.RUNNING,
        Reason.RUNNING,
        Reason.RUNNING.sentence,
        retry_time=None,
    )
    events: tuple[Event, ...] = ()
    if look.status.phase is not Phase.RUNNING:
        events = (Event("Normal", Reason.RUNNING, f"{look.gang.size} workers train"),)
    limit = look.spec.active_deadline_seconds
    again = None
    if limit is not None:
        again = look.now + timedelta(seconds=max(1, limit - look.status.active_seconds))
    wanted = Wanted(status=status, objects=look.missing_children(), events=events, again=again)
    return look.settle(wanted)


Rule = Callable[[Look], Wanted | None]

RULES: tuple[Rule, ...] = (
    going,
    of_another,
    finished,
    acceptance,
    deadline,
    completion,
    suspension,
    preparation,
    failures,
    giving_back,
    backing_off,
    placing,
    starting,
    running,
)


def plan(job: CPTJob, observed: Observed, settings: Settings, now: datetime) -> Wanted:
    """What `job` needs now. Never raises on a job that the API server can hold."""
    look = Look(job, observed, settings, now.replace(microsecond=0))
    wanted = _decide(look, RULES)
    if wanted.status is None or job.status is None:
        return wanted
    if _like(job.status, wanted.status, _TIMES) == wanted.status:
        return replace(wanted, status=None)  # time alone is never worth a write
    urgent = _like(job.status, wanted.status, (*_TIMES, *_COUNTS)) != wanted.status
    return replace(wanted, urgent=urgent)


_TIMES = ("accounted_time", "active_seconds", "node_seconds", "gpu_seconds")
_COUNTS = ("pods", "replicas", "nodes", "trainer_status")


def _like(before: CPTJobStatus, after: CPTJobStatus, names: Iterable[str]) -> CPTJobStatus:
    """The status before, but for these fields."""
    return before.model_copy(update={name: getattr(after, name) for name in names})


def _decide(look: Look, rules: Iterable[Rule]) -> Wanted:
    for rule in rules:
        wanted = rule(look)
        if wanted is not None:
            return wanted
    raise AssertionError("the last rule decides always")


# --- the coordinator --------------------------------------------------------------------------


def _make_coordinator(look: Look) -> Wanted:
    refused = look.observed.refused.get("Pod")
    if refused is not None:
        return look.wait(Phase.PENDING, Reason.WAITING_FOR_QUOTA, refused, LOOK_AGAIN_SECONDS)
    training = look.status.condition(Condition.RUNNING) is not None
    phase = Phase.RESTARTING if training else Phase.PREPARING
    reason = Reason.RESTARTING if training else Reason.PREPARING
    pod = pods.coordinator(look.job, look.profile, look.gang.coordinator_id)
    return look.settle(
        Wanted(
            status=look.stand(phase, reason, reason.sentence),
            objects=(*look.missing_children(), pod),
        )
    )


def _coordinator_failed(look: Look, pod: Pod) -> Wanted:
    end = outcomes.outcome(pod, look.profile.model_path)
    if end.fatal is not None:
        return look.fail(end.fatal, end.message)
    return _replace_coordinator(look, pod)


def _replace_coordinator(look: Look, pod: Pod | None) -> Wanted:
    """Its successor finds the prepared data; workers that train join its store in place."""
    gang = look.gang
    name = gang.coordinator_id.name(look.job.metadata.name)
    end = outcomes.outcome(pod, look.profile.model_path) if pod else outcomes.vanished()
    failure = restarts.Failure(name, pod.node if pod else None, end)
    restart = restarts.answer(
        look.status, [failure], 1, look.spec.failure_policy, look.uid, look.now
    )
    if restart.fatal is not None:
        return look.with_status(restart.status).fail(*restart.fatal)
    status = replace(gang, status=restart.status).next_incarnation(gang.coordinator_id)
    due = status.retry_time
    told = Event("Warning", Reason.RESTARTING, f"coordinator {name}: {end.message}")
    replaced = look.with_status(status)
    if due is not None and look.now < due:
        waited = replaced.stand(Phase.RESTARTING, Reason.RESTARTING, end.message)
        return replaced.settle(Wanted(status=waited, events=(told,), again=due))
    following = _make_coordinator(replaced)
    return replace(following, events=(told, *following.events), restarts=(end.cause,))


def _preparing_message(look: Look) -> str:
    report = look.observed.report
    said = report.progress.get("message") if report else None
    return said[:200] if isinstance(said, str) and said else Reason.PREPARING.sentence


# --- workers ----------------------------------------------------------------------------------


def _make_workers(look: Look, missing: Iterable[PodId]) -> tuple[dict[str, Any], ...]:
    if "Pod" in look.observed.refused:
        missing = ()
    excluded = [each for each in look.status.excluded_nodes if not _over(each.until, look.now)]
    soft = tuple(each.name for each in excluded if each.failures < 2)
    hard = tuple(each.name for each in excluded if each.failures >= 2)
    return tuple(pods.worker(look.job, look.profile, each, soft, hard) for each in missing)


def _over(until: datetime | None, now: datetime) -> bool:
    return until is not None and until <= now


def _before_running(look: Look) -> Phase:
    """Starting for the first time, or again."""
    again = look.status.last_failure is not None or _ran(look)
    return Phase.RESTARTING if again else Phase.STARTING


def _ran(look: Look) -> bool:
    return look.status.condition(Condition.RUNNING) is not None and (
        look.status.attempt > 0 or look.status.phase in (Phase.RUNNING, Phase.RESTARTING)
    )


def _starting_status(look: Look, phase: Phase, late: list[Pod]) -> CPTJobStatus:
    refused = look.observed.refused.get("Pod")
    found = waiting.obstacle(late)
    if refused is not None and look.gang.missing:
        reason, message = Reason.WAITING_FOR_QUOTA, refused
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
    """What the scheduler says, and what the pool has."""
    problems = placement.check(
        look.profile, look.gang.size, look.observed.nodes, look.observed.used_gpus
    )
    return "; ".join([message, *(each.message for each in problems)])


def _start_deadline(look: Look, late: list[Pod]) -> datetime | None:
    """When to look again at workers that are not up yet."""
    if "Pod" in look.observed.refused:
        return look.now + timedelta(seconds=LOOK_AGAIN_SECONDS)
    made = [pod.created for pod in late if pod.created is not None]
    if not made:
        return None
    found = waiting.obstacle(late)
    allowed = look.spec.startup_deadline_seconds
    if found is not None and found.reason in (*waiting.BROKEN, Reason.WAITING_FOR_SECRET):
        allowed = min(allowed, BROKEN_SECONDS)
    return max(max(made) + timedelta(seconds=allowed), look.now + timedelta(seconds=1))


def _was_running(look: Look) -> bool:
    """All workers of this attempt were seen; one that is missing now is not one yet to be made."""
    condition = look.status.condition(Condition.RUNNING)
    return (
        look.status.phase is Phase.RUNNING
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


# --- ends -------------------------------------------------------------------------------------


def _with_result(look: Look, said: str) -> CPTJobStatus:
    """The status with what came out; `said` is the coordinator's last report, as JSON."""
    status = look.status
    try:
        last = json.loads(said)
    except ValueError:
        last = {}
    if isinstance(last, dict) and last:
        status = read_report(status, Report(last, look.now))
    place = (status.resolved.output_uri if status.resolved else None) or ""
    trainer = status.trainer_status
    result = Result(
        parent_model=look.spec.model.storage_uri,
        job_name=look.job.metadata.name,
        training_seconds=status.active_seconds,
        output_uri=place or None,
        model_uri=f"{place}/model" if place else None,
        manifest_uri=f"{place}/manifest.json" if place else None,
        metrics=trainer.metrics if trainer else (),
    )
    return status.model_copy(update={"result": result})


def _suspended(look: Look) -> str:
    saved = look.status.last_checkpoint
    if saved is None:
        return f"{Reason.SUSPENDED.sentence} No checkpoint was saved."
    return f"Suspended after step {saved.step} was saved; it goes on from there."


def _counts_differ(look: Look) -> bool:
    before = look.job.status.pods if look.job.status else None
    return before is not None and before.active != len(look.gang.active_workers)


def _delete(pods_: Iterable[Pod], why: str) -> tuple[Deletion, ...]:
    return tuple(
        Deletion("Pod", pod.name, pod.uid, why=why) for pod in pods_ if pod.deleting is None
    )


def _old(gang: Gang) -> tuple[Deletion, ...]:
    """Failed pods beyond those that are kept for their logs."""
    failed = [pod for pod in gang.pods if pod.finished and pod.deleting is None]
    replaced = [pod for pod in failed if pod.id not in {each.id for each in gang.workers}]
    replaced = [pod for pod in replaced if pod.id != gang.coordinator_id]
    replaced.sort(key=lambda pod: pod.version, reverse=True)
    return tuple(
        Deletion("Pod", pod.name, pod.uid, why="its log made room for newer ones")
        for pod in replaced[KEPT_FAILED_PODS:]
    )


def _key(manifest: dict[str, Any]) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]
