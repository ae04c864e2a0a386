"""Where the pods of a job go that must share a node, as a ReadWriteOnce claim demands. Pure.

Each such pod carries a place, a number, and is bound by affinity to the node where pods of the same
place are. When their node is lost or avoided, the next ones get another place: else the scheduler
would send them to the node where the old ones still hang.
"""

from cptjob_operator.identity import Role
from cptjob_operator.objects import pods
from cptjob_operator.observed import Pod
from cptjob_operator.plan.look import Look


def place(look: Look) -> int:
    """The place of the next pod: that of pods that hold a node which will do, else a new one."""
    active = look.gang.active
    anchored = [pod.place for pod in active if pod.node is not None and _stays(look, pod)]
    if anchored:
        return max(anchored)
    left = {pod.place for pod in active if pod.node is not None}
    waiting = [pod.place for pod in active if pod.node is None and pod.deleting is None]
    free = [each for each in waiting if each not in left]
    return max(free) if free else max((*left, *waiting, -1)) + 1


def moving(look: Look) -> Look | None:
    """Replaces pods that wait for a node which will not do, and a coordinator that is alone on one."""
    if not pods.share_a_node(look.job, look.profile):
        return None
    gang, at = look.gang, place(look)
    wanted = [pod for pod in (gang.coordinator, *gang.workers) if pod is not None and pod.active]
    moved = [
        pod.id
        for pod in wanted
        if pod.deleting is None and pod.place != at and (pod.node is None or _is_alone(look, pod))
    ]
    return look.with_status(gang.next_incarnation(*moved)) if moved else None


def _stays(look: Look, pod: Pod) -> bool:
    """Whether pods can join this one on its node; one that is not ready may come back."""
    return pod.deleting is None and pod.node not in look.avoided[1]


def _is_alone(look: Look, pod: Pod) -> bool:
    """A coordinator on a node that is avoided, whose worker is yet to come."""
    workers = [each for each in look.gang.active_workers if each.node is not None]
    return pod.role is Role.COORDINATOR and pod.node in look.avoided[1] and not workers
