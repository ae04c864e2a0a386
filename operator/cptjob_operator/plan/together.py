"""Where the two pods of a one-worker job go whose claims only one node can mount. Pure.

The worker leads, as it needs the devices: the coordinator's node is what it prefers. When it went to
another, the coordinator, which needs little, is made anew on that one.
"""

from cptjob_operator.observed import Claim, Pod
from cptjob_operator.plan.look import Look
from cptjob_operator.profile import Profile


def needed(look: Look) -> bool:
    """Whether the pods must share a node, as far as is known of their claims."""
    if look.gang.size > 1:
        return False
    known = look.observed.claims or {}
    found = [known.get(each.claim) for each in look.profile.mounts]
    return any(claim is None or not is_shared(look.profile, claim) for claim in found)


def is_shared(profile: Profile, claim: Claim) -> bool:
    """Whether pods on several nodes can mount the claim."""
    modes, written = set(claim.access_modes), claim.name == profile.output_claim
    return "ReadWriteMany" in modes or (not written and "ReadOnlyMany" in modes)


def near(look: Look) -> str | None:
    """The node that a worker prefers: that of its coordinator, unless pods failed there."""
    pod = look.gang.coordinator
    if pod is None or pod.deleting is not None or not needed(look):
        return None
    soft, hard = look.avoided
    return None if pod.node in (*soft, *hard) else pod.node


def node_of_worker(look: Look) -> str | None:
    """The node that a coordinator must be on; None when the worker is on none, or on a lost one."""
    if not needed(look):
        return None
    return next((pod.node for pod in look.gang.workers if _stays(look, pod)), None)


def moving(look: Look) -> Look | None:
    """Replaces a coordinator that is not, or will not be, where its worker is or can be."""
    pod = look.gang.coordinator
    if pod is None or not pod.active or pod.deleting is not None:
        return None
    if look.observed.claims is None or not needed(look):
        return None
    node = node_of_worker(look)
    if node is not None:
        strays = (pod.node or pod.bound_to) != node
    else:
        strays = _waits_for_nobody(pod) or _is_alone(look, pod)
    return look.with_status(look.gang.next_incarnation(pod.id)) if strays else None


def _stays(look: Look, worker: Pod) -> bool:
    """It has a node, and is not about to leave it."""
    if not worker.active or worker.deleting is not None or worker.node is None:
        return False
    node = look.observed.nodes.get(worker.node)
    return node is None or node.ready


def _waits_for_nobody(pod: Pod) -> bool:
    """It is bound to a node where no worker is any more."""
    return pod.node is None and pod.bound_to is not None


def _is_alone(look: Look, pod: Pod) -> bool:
    """It is on a node that is avoided, and no worker is on any."""
    return pod.node in look.avoided[1] and not any(each.node for each in look.gang.active_workers)
