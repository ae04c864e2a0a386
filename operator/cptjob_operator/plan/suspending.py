"""The rule for a job that is asked to hold still. Pure."""

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_operator.plan.gang import next_attempt
from cptjob_operator.plan.look import Look, delete
from cptjob_operator.wanted import Event, Wanted


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
            deletions=delete([pod for pod in leaving if pod.deleting is None], "suspended")
            + look.stuck(),
        )
    if look.status.phase is Phase.SUSPENDED:
        return Wanted(
            status=look.stand(Phase.SUSPENDED, Reason.SUSPENDED, _suspended(look)),
            objects=look.missing_children(),
        )
    status = look.status
    if gang.pods or status.phase not in (None, Phase.PENDING):
        status = gang.next_incarnation(gang.coordinator_id)
        status = next_attempt(status)
    suspended = look.with_status(status.model_copy(update={"retry_time": None}))
    return Wanted(
        status=suspended.stand(Phase.SUSPENDED, Reason.SUSPENDED, _suspended(look)),
        # A job that waits, too, keeps what was decided at acceptance.
        objects=look.missing_children(),
        events=(Event("Normal", Reason.SUSPENDED, _suspended(look)),),
    )


def _suspended(look: Look) -> str:
    saved = look.status.last_checkpoint
    if saved is None:
        return f"{Reason.SUSPENDED.sentence} No checkpoint was saved."
    return f"Suspended after step {saved.step} was saved; it goes on from there."
