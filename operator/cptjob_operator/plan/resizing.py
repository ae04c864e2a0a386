"""Rules for a gang whose number of workers was changed. Pure."""

from cptjob_api.conditions import Phase, Reason
from cptjob_operator.plan import accept
from cptjob_operator.plan.gang import next_attempt
from cptjob_operator.plan.look import Look
from cptjob_operator.wanted import Event, Wanted


def beyond_limit(look: Look) -> Wanted | None:
    """More workers than allowed: nothing is made until the number is lowered or the limit raised.

    A gang of another number that trains is left alone: it goes on if the number comes back.
    """
    most = max(look.settings.limits.max_nodes, look.profile.num_nodes or 0)
    if look.gang.size <= most:
        return None
    phase = Phase.RESTARTING if look.ran else Phase.PENDING
    message = accept.too_many_nodes("trainer.numNodes", look.gang.size, most)
    return look.wait(phase, Reason.LIMIT_EXCEEDED, message)


def resizing(look: Look) -> Look | None:
    """Launchers meet in a gang of the number that they were told: another one is another attempt.

    It is no restart: somebody asked for it.
    """
    gang = look.gang
    if all(pod.num_nodes in (None, gang.size) for pod in gang.workers if pod.active):
        return None
    told = Event("Normal", Reason.STARTING, f"all workers are made anew, as a gang of {gang.size}")
    return look.with_status(next_attempt(look.status), events=(*look.events, told))
