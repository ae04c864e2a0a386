"""Rules for a job that ends, has ended, or is none of ours. Pure."""

from dataclasses import replace
from datetime import datetime, timedelta

from pydantic_core import from_json

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.status import CPTJobStatus, Result
from cptjob_operator.identity import MANAGER
from cptjob_operator.observed import Pod, Report
from cptjob_operator.plan.look import Look, delete
from cptjob_operator.plan.reported import read_report
from cptjob_operator.wanted import Deletion, Event, Wanted
from cptjob_trainer.termination import Termination

_ENDS = (Phase.COMPLETE, Phase.FAILED)
#: It says how the job ended within a second or two after the workers.
LAST_WORD_SECONDS = 15


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
    if status is None or status.phase not in _ENDS:
        return None
    deletions = delete(look.gang.active, "the job has ended") + look.stuck() + look.old()
    written = None
    events: tuple[Event, ...] = ()
    if status.observed_generation != look.generation:
        events = (Event("Warning", Reason.ALREADY_ENDED, Reason.ALREADY_ENDED.sentence),)
    if status.observed_generation != look.generation or _counts_differ(look):
        was = status.condition(
            Condition.COMPLETE if status.phase is Phase.COMPLETE else Condition.FAILED
        )
        known = (each for each in Reason if was and each == was.reason)
        reason = next(known, Reason.COMPLETE)
        written = look.stand(status.phase, reason, was.message if was else "")
    kept = look.with_extras(Wanted(status=written, deletions=deletions, events=events))
    ttl = look.spec.ttl_seconds_after_finished
    if ttl is None or status.completion_time is None:
        return kept
    due = status.completion_time + timedelta(seconds=ttl)
    if look.now < due:
        return replace(kept, again=min(kept.again or due, due))
    gone = Deletion("CPTJob", look.job.metadata.name, look.uid, why="ttlSecondsAfterFinished")
    return Wanted(deletions=(*deletions, gone))


def deadline(look: Look) -> Wanted | None:
    """The job has held pods for longer than it may."""
    limit, spent = look.spec.active_deadline_seconds, look.status.active_seconds
    if limit is None or spent < limit:
        return None
    return look.fail(
        Reason.DEADLINE_EXCEEDED,
        f"held pods for {spent} s, more than activeDeadlineSeconds ({limit}) allows",
    )


def completion(look: Look) -> Wanted | None:
    """The model is written: the coordinator says so, or every worker has ended well."""
    gang = look.gang
    said = _last_word(gang.coordinator)
    every = len(gang.workers) == gang.size and all(pod.phase == "Succeeded" for pod in gang.workers)
    if said is None and not every:
        return None
    if said is None and (due := _last_word_due(look)) > look.now:
        return Wanted(again=due)
    already = said is not None and said.reason == Reason.ALREADY_COMPLETE
    reason = Reason.ALREADY_COMPLETE if already else Reason.COMPLETE
    status = look.with_status(_with_result(look, said.message if said else ""))
    return Wanted(
        status=status.stand(
            Phase.COMPLETE, reason, reason.sentence, completion_time=look.now, retry_time=None
        ),
        deletions=delete(gang.active, "the job is complete"),
        events=(Event("Normal", reason, reason.sentence),),
        again=look.now,
    )


def _last_word(coordinator: Pod | None) -> Termination | None:
    """What a coordinator said that ended because the job is complete.

    It ends well, too, when the workers failed: then it has another reason, and they tell.
    """
    if coordinator is None or coordinator.phase != "Succeeded" or coordinator.ended is None:
        return None
    said = coordinator.ended.termination
    complete = (Reason.COMPLETE, Reason.ALREADY_COMPLETE)
    return said if said is not None and said.reason in complete else None


def _last_word_due(look: Look) -> datetime:
    """Until when a coordinator that outlives the workers may still bring the job's last figures."""
    speaker = look.gang.coordinator
    ends = [pod.ended.finished for pod in look.gang.workers if pod.ended and pod.ended.finished]
    if speaker is None or not speaker.active or speaker.deleting is not None or not ends:
        return look.now
    return max(ends) + timedelta(seconds=LAST_WORD_SECONDS)


def _with_result(look: Look, said: str) -> CPTJobStatus:
    """The status with what came out; `said` is the coordinator's last report, as JSON."""
    status = look.status
    try:
        last = from_json(said)
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


def _counts_differ(look: Look) -> bool:
    before = look.job.status.pods if look.job.status else None
    return before is not None and before.active != len(look.gang.active_workers)
