"""Every phase, condition and reason of a CPTJob, each with its sentence.

Readers act on conditions and reasons. The phase is one word made from them, for columns and
selectors.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class _Word(StrEnum):
    """A word with a sentence."""

    sentence: str

    def __new__(cls, word: str, sentence: str) -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.sentence = sentence
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
    """Reasons of conditions."""

    # On the way.
    ACCEPTED = "Accepted", "The spec is valid and everything in it is decided."
    PREPARING = "Preparing", "The coordinator prepares model and data."
    PREPARED = "Prepared", "The data is tokenised and the number of steps is known."
    WAITING_FOR_SECRET = "WaitingForSecret", "A secret that is named does not exist yet."
    WAITING_FOR_CLAIM = "WaitingForClaim", "A volume claim that is named does not exist yet."
    WAITING_FOR_NODE = "WaitingForNode", "A node that is named does not exist or is not ready."
    WAITING_FOR_POOL = "WaitingForPool", "The pool has too few nodes that fit."
    WAITING_FOR_QUOTA = "WaitingForQuota", "The namespace's quota does not allow all pods."
    REFUSED = "Refused", "The API server refuses an object of the job; the message says why."
    QUEUED = "Queued", "A queue holds the workers back."
    UNSCHEDULABLE = "Unschedulable", "The scheduler finds no nodes for all workers."
    SCHEDULED = "Scheduled", "Every worker pod has a node."
    STARTING = "Starting", "Pods start."
    IMAGE_PULL_FAILED = "ImagePullFailed", "An image cannot be pulled."
    CONTAINER_CONFIG_ERROR = "ContainerConfigError", "A container cannot be made as it is asked."
    MOUNT_FAILED = "MountFailed", "A volume cannot be mounted."
    STARTUP_DEADLINE_EXCEEDED = (
        "StartupDeadlineExceeded",
        "The gang did not start in time, gave back what it held and will try again.",
    )
    # Running.
    RUNNING = "Running", "Every worker trains."
    RESIZING = "Resizing", "The number of workers changes."
    RESTARTING = "Restarting", "Workers are replaced after a failure."
    DISRUPTED = "Disrupted", "A node was drained or a pod preempted; this does not count."
    HANG_DETECTED = "HangDetected", "No step was finished in time and the workers are restarted."
    CHECKPOINT_SAVED = "CheckpointSaved", "A checkpoint was saved."
    NO_CHECKPOINT = "NoCheckpoint", "No checkpoint has been saved yet."
    SUSPENDING = "Suspending", "The workers save before they leave."
    SUSPENDED = "Suspended", "The job is suspended."
    RESUMED = "Resumed", "The job goes on after it was suspended."
    # The end.
    COMPLETE = "Complete", "The model is written."
    ALREADY_COMPLETE = "AlreadyComplete", "The output has the model of a job that is the same."
    INVALID_SPEC = "InvalidSpec", "The spec asks for what cannot be done."
    NOT_SUPPORTED = "NotSupported", "The spec asks for what this version cannot do yet."
    LIMIT_EXCEEDED = "LimitExceeded", "The spec asks for more than the platform allows."
    MODEL_INVALID = "ModelInvalid", "The model directory cannot be used."
    MODEL_MISSING = "ModelMissing", "The model is not where the spec says."
    DATA_INVALID = "DataInvalid", "A data set is broken; file and line are in the message."
    DATA_MISSING = "DataMissing", "A data set is not where the spec says."
    CHECKPOINT_MISMATCH = "CheckpointMismatch", "The checkpoints belong to another model or data."
    OUTPUT_BUSY = "OutputBusy", "Another job writes to the same output."
    OUTPUT_UNWRITABLE = "OutputUnwritable", "The output cannot be written."
    STORAGE_FULL = "StorageFull", "No space is left where the output goes."
    CLAIM_NOT_SHARED = "ClaimNotShared", "A ReadWriteOnce claim cannot serve several nodes."
    RESTARTS_EXHAUSTED = "RestartsExhausted", "The workers failed too often."
    FAILS_AT_STEP = "FailsAtStep", "The workers fail again and again at one step."
    DEADLINE_EXCEEDED = "DeadlineExceeded", "The job held pods for longer than it may."
    TRAINER_FAILED = "TrainerFailed", "The trainer ended with a fault that no restart can help."
    OPERATOR_FAULT = "OperatorFault", "The operator could not go on; its log says more."


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
