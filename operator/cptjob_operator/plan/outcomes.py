"""What the end of a pod means: whether it counts, whether its node is to blame, whether all is lost.

`RULES` is the table, asked in order; the first that knows the case answers. After the failure
policies of JobSet and of batch/v1 Job (KEP-3329), with one difference: a pod that the kubelet
evicted for the job's own use of disk or memory is not a disruption.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cptjob_api.conditions import Reason
from cptjob_operator.observed import Ended, Pod
from cptjob_trainer.errors import NEVER_RETRIED

Cause = Literal[
    "Fatal", "Disrupted", "Deleted", "Evicted", "NodeLost", "Rejected", "OutOfMemory", "Stopped",
    "CoordinatorLost", "Exited", "Vanished", "NotStarted",
]  # fmt: skip

STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Outcome:
    """Meaning of a pod's end.

    counted: it uses up a restart of `failurePolicy.maxRestarts`.
    blames_node: the node is avoided when this happens there again.
    fatal: no restart can help; the reason of the job's failure.
    """

    cause: Cause
    message: str
    counted: bool = True
    blames_node: bool = False
    fatal: Reason | None = None
    exit_code: int | None = None


#: Reasons of the job's failure, by the name of the trainer's error.
FATAL: dict[str, Reason] = {
    "DataError": Reason.DATA_INVALID,
    "MissingInputError": Reason.DATA_MISSING,
    "ConfigError": Reason.INVALID_SPEC,
    "MismatchError": Reason.CHECKPOINT_MISMATCH,
}
#: The same, where the message speaks of the model's directory.
FATAL_MODEL: dict[str, Reason] = {
    "DataError": Reason.MODEL_INVALID,
    "MissingInputError": Reason.MODEL_MISSING,
}


def outcome(pod: Pod, model_path: str = "") -> Outcome:
    """What it means that this pod has ended, or is about to be gone."""
    for rule in RULES:
        answer = rule(pod, model_path)
        if answer is not None:
            return answer
    raise AssertionError("the last rule answers always")


def vanished() -> Outcome:
    """A pod that went without an end that anybody saw. It may have done anything; never success."""
    return Outcome("Vanished", "the pod was removed before anybody saw how it ended")


def _fatal(pod: Pod, model_path: str) -> Outcome | None:
    if pod.ended is None or pod.ended.exit_code not in NEVER_RETRIED:
        return None
    said = pod.ended.termination
    name, message = (said.reason, said.message) if said else ("", "")
    of_model = bool(model_path) and model_path in message
    reason = (FATAL_MODEL if of_model else FATAL).get(name) or FATAL.get(name)
    return Outcome(
        "Fatal",
        message or f"{pod.name} ended with exit code {pod.ended.exit_code}",
        fatal=reason or Reason.TRAINER_FAILED,
        exit_code=pod.ended.exit_code,
    )


def _disrupted(pod: Pod, _model_path: str) -> Outcome | None:
    found = pod.disruption
    if found is None or (found.reason == "TerminationByKubelet" and pod.reason == "Evicted"):
        return None
    message = found.message or f"the pod was taken away ({found.reason})"
    return Outcome("Disrupted", message, counted=False, exit_code=_code(pod))


def _evicted(pod: Pod, _model_path: str) -> Outcome | None:
    if pod.reason != "Evicted":
        return None
    message = pod.message or "the node evicted the pod for its use of disk or memory"
    return Outcome("Evicted", message, exit_code=_code(pod))


def _lost(pod: Pod, _model_path: str) -> Outcome | None:
    if pod.reason not in ("NodeLost", "Shutdown", "Terminated", "NodeShutdown"):
        return None
    return Outcome("NodeLost", pod.message or "the node is gone", counted=False)


def _rejected(pod: Pod, _model_path: str) -> Outcome | None:
    """The kubelet did not take the pod that the scheduler gave it; the container never ran."""
    if pod.ended is not None or pod.phase != "Failed" or not pod.reason:
        return None
    return Outcome("Rejected", f"{pod.reason}: {pod.message}", blames_node=True)


def _deleted(pod: Pod, _model_path: str) -> Outcome | None:
    if pod.deleting is None:
        return None
    return Outcome("Deleted", "the pod was deleted", counted=False, exit_code=_code(pod))


def _without_coordinator(pod: Pod, _model_path: str) -> Outcome | None:
    """A launcher that lost the store: the coordinator's end is what counts."""
    said = pod.ended.termination if pod.ended else None
    if said is None or said.reason != "CoordinatorLostError":
        return None
    return Outcome("CoordinatorLost", said.message, counted=False, exit_code=_code(pod))


def _waited_in_vain(pod: Pod, _model_path: str) -> Outcome | None:
    """A launcher to which the others of its gang never came: nothing of its own has failed."""
    said = pod.ended.termination if pod.ended else None
    if said is None or said.reason != "GangError":
        return None
    return Outcome("NotStarted", said.message, counted=False, exit_code=_code(pod))


def _out_of_memory(pod: Pod, _model_path: str) -> Outcome | None:
    if pod.ended is None or pod.ended.reason != "OOMKilled":
        return None
    return Outcome(
        "OutOfMemory",
        "out of memory: raise trainer.resourcesPerNode.limits.memory, or lower "
        "training.batchSizePerDevice",
        exit_code=pod.ended.exit_code,
    )


def _stopped(pod: Pod, _model_path: str) -> Outcome | None:
    if pod.ended is None or pod.ended.exit_code != STOPPED:
        return None
    return Outcome("Stopped", _said(pod.ended), counted=False, exit_code=STOPPED)


def _exited(pod: Pod, _model_path: str) -> Outcome:
    if pod.ended is None:
        return Outcome("Exited", pod.message or "the pod failed")
    code = pod.ended.exit_code
    return Outcome("Exited", _said(pod.ended), blames_node=code != 0, exit_code=code)


RULES: tuple[Callable[[Pod, str], Outcome | None], ...] = (
    _fatal,
    _disrupted,
    _evicted,
    _lost,
    _rejected,
    _deleted,
    _without_coordinator,
    _waited_in_vain,
    _out_of_memory,
    _stopped,
    _exited,
)


def _code(pod: Pod) -> int | None:
    return pod.ended.exit_code if pod.ended else None


def _said(ended: Ended) -> str:
    if ended.termination is not None and ended.termination.message:
        return ended.termination.message
    return ended.message or f"exit code {ended.exit_code} ({ended.reason or 'no reason given'})"
