"""The rule for a gang whose number of workers was changed. Pure."""

from cptjob_api.conditions import Reason
from cptjob_operator.plan.gang import next_attempt
from cptjob_operator.plan.look import Look
from cptjob_operator.wanted import Event


def resizing(look: Look) -> Look | None:
    """Launchers meet in a gang of the number that they were told: another one is another attempt.

    It is no restart: somebody asked for it.
    """
    gang = look.gang
    if all(pod.num_nodes in (None, gang.size) for pod in gang.workers if pod.active):
        return None
    told = Event("Normal", Reason.STARTING, f"all workers are made anew, as a gang of {gang.size}")
    return look.with_status(next_attempt(look.status), events=(*look.events, told))
