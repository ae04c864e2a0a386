"""Why pods do not run yet, in words a person can act on. Pure.

Each rule looks at one pod and knows one kind of obstacle; they are asked in order of how much they
explain, over all pods, so that of eight pending workers the one with the plainest cause speaks.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cptjob_api.conditions import Reason
from cptjob_operator.observed import Claim, Pod

#: Obstacles that time does not remove: somebody must mend an image, a secret or a volume.
BROKEN = (
    Reason.IMAGE_PULL_FAILED,
    Reason.CONTAINER_CONFIG_ERROR,
    Reason.WAITING_FOR_SECRET,
    Reason.MOUNT_FAILED,
)

_IMAGE = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
    }
)
_CONFIG = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_SECRET = re.compile(r'secret "([^"]+)" not found')
# A number that counts, not one within a name.
_COUNT = re.compile(r"(?<![\w.-])[0-9]+(/[0-9]+)?(?![\w-])")
_WHOSE = re.compile(r"^\S+: ")
#: What the API server says of a pod that names what does not exist.
_MISSING = (
    (re.compile(r"no PriorityClass with name (\S+) was found"), "priority class"),
    (re.compile(r'serviceaccount "([^"]+)" not found'), "service account"),
    (re.compile(r'RuntimeClass "([^"]+)" not found'), "runtime class"),
)
_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" (?:not found|is being deleted)')


_UNBOUND = "unbound immediate PersistentVolumeClaims"

#: Of the job, by name; None when nobody looked at them.
Claims = Mapping[str, Claim] | None


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a pod does not run."""

    reason: Reason
    message: str


def _gated(pod: Pod, _: Claims) -> Obstacle | None:
    if not pod.gated:
        return None
    return Obstacle(Reason.QUEUED, "a queue holds the workers back; see its Workload object")


def _image(pod: Pod, _: Claims) -> Obstacle | None:
    if pod.waiting is None or pod.waiting.reason not in _IMAGE:
        return None
    said = f"{pod.name}: {pod.waiting.message or pod.waiting.reason}"
    if not pod.pull_secrets:
        return Obstacle(
            Reason.IMAGE_PULL_FAILED,
            f"{said}; mend the registry or the secret for it, or make a new job with another image "
            "or imagePullSecrets",
        )
    # A kubelet pulls without those that are missing, and the registry's answer does not name them.
    one = len(pod.pull_secrets) == 1
    return Obstacle(
        Reason.IMAGE_PULL_FAILED,
        f"{said}; it is pulled with {'secret' if one else 'secrets'} "
        f"{', '.join(pod.pull_secrets)} of namespace {pod.namespace}: make {'it' if one else 'them'} "
        "if missing, mend the registry, or make a new job with another image",
    )


def _config(pod: Pod, _: Claims) -> Obstacle | None:
    if pod.waiting is None or pod.waiting.reason not in _CONFIG:
        return None
    secret = _SECRET.search(pod.waiting.message)
    if secret:
        return Obstacle(
            Reason.WAITING_FOR_SECRET,
            f"secret {secret[1]} does not exist in namespace {pod.namespace}; make it and the job "
            "goes on",
        )
    return Obstacle(
        Reason.CONTAINER_CONFIG_ERROR, f"{pod.name}: {pod.waiting.message or pod.waiting.reason}"
    )


def _mount(pod: Pod, _: Claims) -> Obstacle | None:
    if pod.waiting is None or pod.waiting.reason != "FailedMount":
        return None
    return Obstacle(Reason.MOUNT_FAILED, f"{pod.name}: {pod.waiting.message}")


def _claim(pod: Pod, _: Claims) -> Obstacle | None:
    missing = _CLAIM.search(pod.unschedulable or "")
    if not missing:
        return None
    return Obstacle(
        Reason.WAITING_FOR_CLAIM,
        f"volume claim {missing[1]} does not exist in namespace {pod.namespace}; make it and the "
        "job goes on",
    )


def _unbound(pod: Pod, claims: Claims) -> Obstacle | None:
    if _UNBOUND not in (pod.unschedulable or ""):
        return None
    unbound = [each for _, each in sorted((claims or {}).items()) if each.phase != "Bound"]
    if not unbound:
        return None
    names = " ".join(each.name for each in unbound)
    what = " and ".join(f"{each.name} ({_state(each)})" for each in unbound)
    return Obstacle(
        Reason.WAITING_FOR_CLAIM,
        f"no volume is bound to volume claim {what}; kubectl describe pvc {names} -n "
        f"{pod.namespace} says why, and the job goes on once it is bound",
    )


def _state(claim: Claim) -> str:
    if claim.phase == "Lost":
        return "its volume is lost"
    if claim.storage_class:
        return f"storage class {claim.storage_class}"
    return "it has no storage class, so somebody has to make a volume for it"


def _unschedulable(pod: Pod, _: Claims) -> Obstacle | None:
    if pod.unschedulable is None:
        return None
    return Obstacle(Reason.UNSCHEDULABLE, f"{pod.name}: {pod.unschedulable}")


RULES: tuple[Callable[[Pod, Claims], Obstacle | None], ...] = (
    _claim,
    _unbound,
    _image,
    _config,
    _mount,
    _gated,
    _unschedulable,
)


def obstacle(pods: Iterable[Pod], claims: Claims) -> Obstacle | None:
    """The plainest obstacle among pods that do not run; None when they are just on their way.

    Of pods with the same kind of obstacle it is always the same one that speaks.
    """
    waiting = sorted((pod for pod in pods if pod.active and not pod.ready), key=lambda pod: pod.id)
    for rule in RULES:
        for pod in waiting:
            found = rule(pod, claims)
            if found is not None:
                return found
    return None


def gist(message: str) -> frozenset[str]:
    """What a message says, whichever pod says it, and however many nodes it counts.

    The scheduler orders its reasons by their counts, and these move with every pod of the cluster.
    """
    parts = re.split(r"[,;:.] ", _WHOSE.sub("", message))
    return frozenset(_COUNT.sub("", part).strip(" .") for part in parts)


def refusal(refused: Mapping[str, str]) -> Obstacle | None:
    """What the API server did not let the job have: a quota, a policy, a name that is taken.

    refused: its messages by kind of object.
    """
    for kind, message in refused.items():
        quota = "exceeded quota" in message
        return Obstacle(
            Reason.WAITING_FOR_QUOTA if quota else Reason.REFUSED,
            f"{kind} refused: {message}; {_advice(message)}",
        )
    return None


def _advice(message: str) -> str:
    for words, what in _MISSING:
        found = words.search(message)
        if found:
            return f"make {what} {found[1]} and the job goes on"
    return "it is tried again"
