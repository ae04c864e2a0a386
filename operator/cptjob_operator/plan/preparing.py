"""Rules until there is something to train on: acceptance and the coordinator. Pure."""

from dataclasses import replace
from datetime import timedelta

from cptjob_api import resources
from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.status import ResolvedStatus
from cptjob_operator.objects import pods
from cptjob_operator.observed import Claim, Pod
from cptjob_operator.plan import accept, outcomes, restarts, together, waiting
from cptjob_operator.plan.look import LOOK_AGAIN_SECONDS, Look
from cptjob_operator.wanted import Event, Wanted


def acceptance(look: Look) -> Wanted | Look | None:
    """A new job: decide everything that it leaves out, once, or say why it cannot be done.

    A job that is refused waits: its spec may still be changed, and so may the platform's settings.
    """
    status = look.job.status
    before = status.resolved if status else None
    if before is not None:
        return None if look.observed.profile is not None else _restored(look, before)
    answer = accept.accept(look.job, look.settings)
    if isinstance(answer, accept.Refused):
        return _refused(look, answer)
    told = [Event("Normal", Reason.ACCEPTED, Reason.ACCEPTED.sentence)]
    idle = resources.idle_gpus(look.job, answer.profile.gpus_per_node)
    if idle:
        told.append(Event("Warning", Reason.ACCEPTED, idle))
    return look.with_status(
        look.status.model_copy(update={"resolved": answer.resolved.status()}),
        observed=replace(look.observed, profile=answer.profile, config=answer.config),
        events=(*look.events, *told),
    )


def _refused(look: Look, answer: accept.Refused) -> Wanted:
    message = f"{answer.message}; edit the job, or the platform its settings, and it goes on"
    status = look.stand(
        Phase.PENDING,
        answer.reason,
        message,
        (Condition.STALLED, True, answer.reason, message),
        (Condition.RECONCILING, False, answer.reason, message),
        start_time=None,
    )
    return Wanted(status=status)


def _restored(look: Look, before: ResolvedStatus) -> Wanted | Look:
    """Only the ConfigMap was lost: its content is made again from what was decided."""
    allowed = max((pod.num_nodes or 0 for pod in look.gang.pods), default=0)
    answer = accept.accept_again(look.job, before, allowed or None, look.settings)
    if isinstance(answer, accept.Refused):  # no fault of a job that was accepted
        phase = Phase.RESTARTING if look.ran else Phase.PENDING
        return Wanted(
            status=look.stand(phase, answer.reason, answer.message),
            again=look.now + timedelta(seconds=LOOK_AGAIN_SECONDS),
        )
    told = Event("Warning", Reason.CONFIG_LOST, Reason.CONFIG_LOST.sentence)
    # One that is refused is told as refused, each time that it reads otherwise.
    events = () if "ConfigMap" in look.observed.refused else (told,)
    return look.with_status(
        look.status,
        observed=replace(look.observed, profile=answer.profile, config=answer.config),
        events=(*look.events, *events),
    )


def claims(look: Look) -> Wanted | None:
    """With several workers, each volume claim must be there and take several nodes."""
    known = look.observed.claims
    if look.gang.size == 1:
        return _claims_of_one(look)
    if known is None or (look.ran and look.gang.active_workers):
        return None
    names = [each.claim for each in look.profile.mounts]
    for name in names:
        claim = known.get(name)
        if claim is not None and not together.is_shared(look.profile, claim):
            return _not_shared(look, claim)
    if look.ran:
        return None
    missing = [name for name in names if name not in known]
    if not missing:
        return None
    one = len(missing) == 1
    message = (
        f"volume {'claim' if one else 'claims'} {', '.join(missing)} "
        f"{'does' if one else 'do'} not exist in namespace {look.job.metadata.namespace}; "
        f"make {'it' if one else 'them'} and the job goes on"
    )
    return look.wait(Phase.PENDING, Reason.WAITING_FOR_CLAIM, message, LOOK_AGAIN_SECONDS)


def _not_shared(look: Look, claim: Claim) -> Wanted:
    message = (
        f"volume claim {claim.name} ({', '.join(claim.access_modes)}) cannot serve "
        f"{look.gang.size} nodes; take one that is ReadWriteMany, or set spec.trainer.numNodes to 1"
    )
    if look.ran:  # with fewer nodes: that is to be mended
        return look.wait(Phase.RESTARTING, Reason.CLAIM_NOT_SHARED, message, LOOK_AGAIN_SECONDS)
    return look.fail(Reason.CLAIM_NOT_SHARED, message)


def _claims_of_one(look: Look) -> Wanted | None:
    """A single worker may share a node with its coordinator, so theirs need only take two pods.

    A claim that is missing is for the scheduler to tell.
    """
    known = look.observed.claims
    if known is None and not look.gang.coordinator and not look.observed.refused:
        # They are read in the next pass, now that it is known which they are.
        phase, reason = _on_the_way(look)
        accepted = look.job.status is not None and look.job.status.resolved is not None
        seconds = LOOK_AGAIN_SECONDS if accepted else 0.0
        return look.wait(phase, reason, reason.sentence, seconds)
    for claim in (known or {}).values():
        if claim.access_modes == ("ReadWriteOncePod",):
            return look.fail(
                Reason.CLAIM_NOT_SHARED,
                f"volume claim {claim.name} (ReadWriteOncePod) serves one pod, and a job has a "
                "coordinator and workers; take one that is ReadWriteOnce or ReadWriteMany",
            )
    return _held_by_tensorboard(look)


def _held_by_tensorboard(look: Look) -> Wanted | None:
    """It outlives the pods that train: on their only node, it would keep the next ones there."""
    profile = look.profile
    claim = (look.observed.claims or {}).get(profile.output_claim or "")
    if profile.log_dir is None or claim is None or look.ran:
        return None
    if together.is_shared(profile, claim):
        return None
    return look.fail(
        Reason.CLAIM_NOT_SHARED,
        f"volume claim {claim.name} ({', '.join(claim.access_modes)}) cannot serve TensorBoard on "
        "another node than the worker's; take one that is ReadWriteMany, or leave "
        "spec.tracking.tensorBoard out",
    )


def preparation(look: Look) -> Wanted | None:
    """Until the coordinator is ready: model and data are being checked and made into tokens."""
    gang = look.gang
    pod = gang.coordinator
    if pod is not None and _left_with_workers(pod):
        # Those who failed have been counted.
        return _make_coordinator(look.with_status(gang.next_incarnation(pod.id)))
    if pod is not None and pod.finished:
        return _coordinator_ended(look, pod)
    lost = pod is None and gang.coordinator_id in look.observed.vanished
    if lost or (pod is not None and pod.deleting is not None):
        return _replace_coordinator(look, pod)
    if pod is None:
        return _make_coordinator(look)
    if pod.ready:
        return _too_many_checkpoints(look)
    if gang.active_workers:
        return None  # workers wait for a new coordinator in their rendezvous
    phase, reason = _on_the_way(look)
    found = waiting.obstacle([pod], look.observed.claims)
    if found is not None:
        phase = phase if look.ran else Phase.PENDING
        return look.wait(phase, found.reason, found.message, LOOK_AGAIN_SECONDS)
    status = look.stand(phase, reason, _preparing_message(look))
    return look.settle(Wanted(status=status, objects=look.missing_children()))


def _too_many_checkpoints(look: Look) -> Wanted | None:
    """Known only now, with the number of steps; a number that the spec gives was accepted."""
    if look.spec.checkpoint.keep_last is not None:
        return None
    steps = look.status.resolved.total_steps if look.status.resolved else None
    message = accept.too_many_checkpoints(look.spec.checkpoint, steps, look.settings)
    if message is None or look.ran:
        return None
    return look.fail(Reason.LIMIT_EXCEEDED, message)


def _on_the_way(look: Look) -> tuple[Phase, Reason]:
    """Preparing for the first time, or a new coordinator for a job that ran before."""
    if look.ran:
        return Phase.RESTARTING, Reason.RESTARTING
    return Phase.PREPARING, Reason.PREPARING


def _make_coordinator(look: Look) -> Wanted:
    due = look.status.retry_time
    if due is not None and look.now < due:
        last = look.status.last_failure
        message = f"{last.message}; trying again at {due:%H:%M:%S}Z" if last else ""
        status = look.stand(Phase.RESTARTING, Reason.RESTARTING, message)
        return look.settle(Wanted(status=status, objects=look.missing_children(), again=due))
    phase, reason = _on_the_way(look)
    message = reason.sentence
    refused = waiting.refusal(look.observed.refused)
    if refused is not None:
        phase = phase if look.ran else Phase.PENDING
        reason, message = refused.reason, refused.message
    pod = pods.coordinator(
        *(look.job, look.profile, look.gang.coordinator_id),
        excluded_hard=look.avoided[1],
        beside=together.needed(look),
        node=together.node_of_worker(look),
    )
    return look.settle(
        Wanted(
            status=look.stand(phase, reason, message),
            objects=(*look.missing_children(), pod),
            again=look.now + timedelta(seconds=LOOK_AGAIN_SECONDS) if refused else None,
        )
    )


def _left_with_workers(pod: Pod) -> bool:
    """It was told that the processes have ended, and said so."""
    said = pod.ended.termination if pod.ended else None
    return pod.phase == "Succeeded" and said is not None and said.reason == "Ended"


def _coordinator_ended(look: Look, pod: Pod) -> Wanted:
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
        look.status, [failure], 1, look.spec.failure_policy, look.settings, look.uid, look.now
    )
    if restart.fatal is not None:
        return look.with_status(restart.status).fail(*restart.fatal)
    status = replace(gang, status=restart.status).next_incarnation(gang.coordinator_id)
    told = Event("Warning", Reason.RESTARTING, f"coordinator {name}: {end.message}")
    replaced = look.with_status(
        status, events=(*look.events, told), restarts=(*look.restarts, *restart.causes)
    )
    return _make_coordinator(replaced)


def _preparing_message(look: Look) -> str:
    report = look.observed.report
    said = report.progress.get("message") if report else None
    return said[:200] if isinstance(said, str) and said else Reason.PREPARING.sentence
