"""Every phase, condition and reason of a CPTJob, each with its sentence.

Readers act on conditions and reasons. The phase is one word made from them, for columns and
selectors.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class _Word(StrEnum):
    """A word with a sentence, and what to do about it."""

    sentence: str
    action: str

    def __new__(cls, word: str, sentence: str, action: str = "") -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.sentence = sentence
        member.action = action
        return member


class Phase(_Word):
    """One word for columns and selectors."""

    PENDING = "Pending", "Accepted or about to be; something that it needs is awaited."
    PREPARING = "Preparing", "The coordinator checks the model and turns the data into tokens."
    QUEUED = "Queued", "A queue holds the job back; deadlines stand still."
    STARTING = "Starting", "Worker pods are being scheduled and started."
    RUNNING = "Running", "All workers train."
    RESTARTING = "Restarting", "Something failed; training goes on from the last checkpoint soon."
    SUSPENDED = "Suspended", "The job has saved and holds no pods, as it was asked."
    COMPLETE = "Complete", "The model is written."
    FAILED = "Failed", "The job ended without a model and is not tried again."


class Condition(_Word):
    """Types of conditions."""

    READY = "Ready", "The job is as it was asked to be: running, queued, suspended or complete."
    RECONCILING = "Reconciling", "The job is on its way to its first running gang; absent after."
    STALLED = "Stalled", "The job cannot go on without a change."
    PREPARED = "Prepared", "Model and data were checked and the data is tokenised."
    SCHEDULED = "Scheduled", "Every worker pod has a node."
    RUNNING = "Running", "Every worker trains."
    SUSPENDED = "Suspended", "The job holds no pods, as it was asked."
    CHECKPOINT_READY = "CheckpointReady", "There is a checkpoint to continue from."
    COMPLETE = "Complete", "The model is written; never taken back."
    FAILED = "Failed", "The job has failed; never taken back."


class Reason(_Word):
    """Reasons of conditions, with what a person can do where something is to be done."""

    # On the way.
    ACCEPTED = "Accepted", "The spec is valid and everything in it is decided."
    CONFIG_LOST = (
        "ConfigLost",
        "The job's ConfigMap was gone; it is made again from status.resolved and, for the rest, "
        "from the platform's present settings.",
        "Nothing, unless the settings have changed since or it comes again: find out who deletes "
        "it.",
    )
    PREPARING = "Preparing", "The coordinator prepares model and data."
    PREPARED = "Prepared", "The data is tokenised and the number of steps is known."
    WAITING_FOR_SECRET = (
        "WaitingForSecret",
        "A secret that is named does not exist yet.",
        "Make the secret in the job's namespace; the job goes on by itself.",
    )
    WAITING_FOR_CLAIM = (
        "WaitingForClaim",
        "A volume claim that is named does not exist yet, or no volume is bound to it.",
        "Make the claim in the job's namespace, or its volume; the job goes on by itself.",
    )
    WAITING_FOR_NODE = (
        "WaitingForNode",
        "A node that is named does not exist or is not ready.",
        "Mend or uncordon the node that is named, or make a new job with another one.",
    )
    WAITING_FOR_POOL = (
        "WaitingForPool",
        "The pool has too few nodes that fit.",
        "Add nodes, label them, or wait; the message says what the others lack.",
    )
    WAITING_FOR_QUOTA = (
        "WaitingForQuota",
        "The namespace's quota does not allow all pods.",
        "Raise the quota, or wait until other pods of the namespace are gone.",
    )
    REFUSED = (
        "Refused",
        "The API server refuses an object of the job; the message says why.",
        "Mend the policy, webhook or object that the message names; it is tried again.",
    )
    QUEUED = (
        "Queued",
        "A queue holds the workers back.",
        "Nothing; the queue's Workload object says what it waits for.",
    )
    UNSCHEDULABLE = (
        "Unschedulable",
        "The scheduler finds no nodes for all workers.",
        "Read the scheduler's words in the message: free GPUs, memory, taints, volumes.",
    )
    SCHEDULED = "Scheduled", "Every worker pod has a node."
    STARTING = "Starting", "Pods start."
    IMAGE_PULL_FAILED = (
        "ImagePullFailed",
        "An image cannot be pulled.",
        "Mend the registry or the secret for it, or make a new job with another image.",
    )
    CONTAINER_CONFIG_ERROR = (
        "ContainerConfigError",
        "A container cannot be made as it is asked.",
        "Mend what the message names, such as a key of a secret.",
    )
    MOUNT_FAILED = (
        "MountFailed",
        "A volume cannot be mounted.",
        "Look at the volume and its driver; `kubectl describe pod` has the mount's error.",
    )
    STARTUP_DEADLINE_EXCEEDED = (
        "StartupDeadlineExceeded",
        "The gang did not start in time, gave back what it held and will try again.",
        "Mend what the message names; raise `startupDeadlineSeconds` for slow images.",
    )
    # Running.
    RUNNING = "Running", "Every worker trains."
    RESTARTING = (
        "Restarting",
        "Workers are replaced after a failure.",
        "Nothing, unless it comes again: `status.lastFailure` has the pod, node and error.",
    )
    DISRUPTED = "Disrupted", "A node was drained or a pod preempted; this does not count."
    CHECKPOINT_SAVED = "CheckpointSaved", "A checkpoint was saved."
    NO_CHECKPOINT = (
        "NoCheckpoint",
        "No checkpoint has been saved yet.",
        "Lower `checkpoint.everySteps` in the next job if this lasts for hours.",
    )
    SUSPENDING = "Suspending", "The workers save before they leave."
    SUSPENDED = (
        "Suspended",
        "The job is suspended.",
        "Set `spec.suspend` to false to go on.",
    )
    RESUMED = "Resumed", "The job goes on after it was suspended."
    # The end.
    COMPLETE = "Complete", "The model is written."
    ALREADY_COMPLETE = (
        "AlreadyComplete",
        "The output has the model of a job that is the same.",
        "Nothing; give the job another name or output to train again.",
    )
    ALREADY_ENDED = (
        "AlreadyEnded",
        "The job has ended: a change of its spec, but of ttlSecondsAfterFinished, does nothing any more.",
        "Delete the job and make it again: it goes on from what it has saved.",
    )
    INVALID_SPEC = (
        "InvalidSpec",
        "The spec asks for what cannot be done.",
        "Edit the field that the message names; once the job has Failed, make a new one.",
    )
    NOT_SUPPORTED = (
        "NotSupported",
        "The spec asks for what this version cannot do yet.",
        "Edit the job: leave out the field that the message names.",
    )
    LIMIT_EXCEEDED = (
        "LimitExceeded",
        "The spec asks for more than the platform allows.",
        "Ask for less, or let the platform raise `settings.limits`.",
    )
    MODEL_INVALID = (
        "ModelInvalid",
        "The model directory cannot be used.",
        "Mend or convert the model directory; the message names the file.",
    )
    MODEL_MISSING = (
        "ModelMissing",
        "The model is not where the spec says.",
        "Copy the model to the claim and path of `model.storageUri`, and make the job anew.",
    )
    DATA_INVALID = (
        "DataInvalid",
        "A data set is broken; file and line are in the message.",
        "Mend the lines that are named (`cptjob validate --data` finds all), and make the job anew.",
    )
    DATA_MISSING = (
        "DataMissing",
        "A data set is not where the spec says.",
        "Copy the data to the claim and path of its `storageUri`, and make the job anew.",
    )
    CHECKPOINT_MISMATCH = (
        "CheckpointMismatch",
        "The checkpoints belong to another model or data.",
        "Take another output or name, or `checkpoint.onMismatch: StartNew`.",
    )
    CLAIM_NOT_SHARED = (
        "ClaimNotShared",
        "A ReadWriteOnce claim cannot serve several nodes.",
        "Take a ReadWriteMany claim, or one node without TensorBoard.",
    )
    RESTARTS_EXHAUSTED = (
        "RestartsExhausted",
        "The workers failed too often.",
        "Mend the cause in `status.lastFailure` and make the job anew: it goes on from its checkpoint.",
    )
    FAILS_AT_STEP = (
        "FailsAtStep",
        "The workers fail again and again at one step.",
        "Look at the error and at the data around that step: it is no passing fault.",
    )
    DEADLINE_EXCEEDED = (
        "DeadlineExceeded",
        "The job held pods for longer than it may.",
        "Make the job anew with a later deadline: it goes on from its checkpoint.",
    )
    TRAINER_FAILED = (
        "TrainerFailed",
        "The trainer ended with a fault that no restart can help.",
        "Read the message and the logs of the pod that it names.",
    )
    OPERATOR_FAULT = (
        "OperatorFault",
        "The operator could not go on; its log says more.",
        "Look into the operator's log for this job, and report it.",
    )


@dataclass(frozen=True)
class PhaseRow:
    """What a reader sees in one phase. `kstatus` is what GitOps tools conclude."""

    phase: Phase
    true: tuple[Condition, ...]
    false: tuple[Condition, ...]
    kstatus: str


_R = Condition
# The one table: phase × conditions × kstatus. A fresh object has observedGeneration -1 and is
# InProgress. A condition in neither column is absent or keeps what it was.
PHASES: tuple[PhaseRow, ...] = (
    PhaseRow(Phase.PENDING, (_R.RECONCILING,), (_R.READY, _R.PREPARED), "InProgress"),
    PhaseRow(Phase.PREPARING, (_R.RECONCILING,), (_R.READY, _R.PREPARED), "InProgress"),
    PhaseRow(Phase.QUEUED, (_R.READY, _R.PREPARED), (_R.SCHEDULED, _R.RUNNING), "Current"),
    PhaseRow(Phase.STARTING, (_R.RECONCILING, _R.PREPARED), (_R.READY, _R.RUNNING), "InProgress"),
    PhaseRow(Phase.RUNNING, (_R.READY, _R.PREPARED, _R.SCHEDULED, _R.RUNNING), (), "Current"),
    PhaseRow(Phase.RESTARTING, (_R.PREPARED,), (_R.READY, _R.RUNNING), "InProgress"),
    PhaseRow(Phase.SUSPENDED, (_R.READY, _R.SUSPENDED), (_R.RUNNING,), "Current"),
    PhaseRow(Phase.COMPLETE, (_R.READY, _R.COMPLETE), (_R.RUNNING,), "Current"),
    PhaseRow(Phase.FAILED, (_R.STALLED, _R.FAILED), (_R.READY, _R.RUNNING), "Failed"),
)
