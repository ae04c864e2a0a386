"""The `status` of a CPTJob: what the operator reports. Nobody else writes it."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, ConfigDict, Field

from cptjob_api.conditions import Condition, Phase
from cptjob_trainer.config import Strict

Count = Annotated[int, Field(ge=0)]
ShortText = Annotated[str, Field(max_length=1024)]
LongText = Annotated[str, Field(max_length=32_768)]


class Reported(Strict):
    """Base of what is reported: a reader takes no offence at fields of a newer operator."""

    model_config = ConfigDict(extra="ignore")


class ConditionStatus(Reported):
    """One condition, in the standard form of Kubernetes."""

    type: Annotated[str, Field(max_length=316)] = Field(description="Type of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    observed_generation: Count | None = Field(
        default=None, description="Generation of the spec that it speaks of."
    )
    last_transition_time: AwareDatetime = Field(description="When its status last changed.")
    reason: Annotated[str, Field(max_length=1024)] = Field(description="One word that says why.")
    message: LongText = Field(default="", description="A sentence for people.")


class ResolvedStatus(Reported):
    """Everything that a default, a rule or a preset has decided. Set once, at acceptance."""

    image: ShortText | None = Field(default=None, description="Image of the trainer.")
    image_id: ShortText | None = Field(
        default=None, alias="imageID", description="Digest of that image, once a pod has pulled it."
    )
    service_account_name: ShortText | None = Field(
        default=None, description="Service account of the pods."
    )
    pool: ShortText | None = Field(default=None, description="Pool of nodes.")
    output_uri: ShortText | None = Field(
        default=None, description="The job's own folder in the output storage."
    )
    num_proc_per_node: Count | None = Field(default=None, description="Processes in a worker pod.")
    epochs: Count | None = Field(default=None, description="Epochs over the domain data.")
    max_length: Count | None = Field(default=None, description="Tokens in a row.")
    batch_size_per_device: Count | None = Field(
        default=None, description="Rows that a device takes through one pass."
    )
    global_batch_size: Count | None = Field(
        default=None, description="Rows of one optimizer step over all devices."
    )
    learning_rate: float | None = Field(default=None, description="Peak learning rate.")
    min_learning_rate: float | None = Field(
        default=None, description="Learning rate of the last step."
    )
    warmup_steps: Count | None = Field(default=None, description="Steps of warm-up.")
    lora_rank: Count | None = Field(default=None, description="Rank of each adapter.")
    lora_alpha: float | None = Field(default=None, description="Scale of the adapters.")
    lora_target_modules: tuple[ShortText, ...] | None = Field(
        default=None, max_length=64, description="Modules that get an adapter."
    )
    split_percent: float | None = Field(
        default=None, description="Percent of the training documents held out."
    )
    total_steps: Count | None = Field(
        default=None, description="Optimizer steps of the job; known once it is prepared."
    )
    digest: ShortText | None = Field(
        default=None, description="Identity of the result; known once it is prepared."
    )


class PodCounts(Reported):
    """Worker pods by what they do."""

    active: Count = Field(default=0, description="Pods that exist and have not ended.")
    scheduled: Count = Field(default=0, description="Active pods that have a node.")
    ready: Count = Field(default=0, description="Pods that train.")
    succeeded: Count = Field(default=0, description="Pods that ended well.")
    failed: Count = Field(default=0, description="Pods that failed.")


class Metric(Reported):
    """One figure of the trainer."""

    name: Annotated[str, Field(max_length=128)] = Field(description="Name of the figure.")
    value: Annotated[str, Field(max_length=64)] = Field(description="Its newest value.")


class TrainerStatus(Reported):
    """What the trainer says about itself."""

    current_step: Count | None = Field(default=None, description="Steps done.")
    total_steps: Count | None = Field(default=None, description="Steps of the whole job.")
    epoch: float | None = Field(default=None, description="Epochs done.")
    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="Steps done, in percent."
    )
    estimated_remaining_seconds: Count | None = Field(
        default=None, description="Time until the end, at the present speed."
    )
    tokens_per_second: float | None = Field(default=None, description="Speed of all devices.")
    metrics: tuple[Metric, ...] = Field(
        default=(),
        max_length=64,
        description="Newest figures.",
        json_schema_extra={"listMapKey": "name"},
    )
    last_updated_time: AwareDatetime | None = Field(
        default=None, description="When the trainer said so."
    )


class LastCheckpoint(Reported):
    """The newest complete checkpoint."""

    step: Count = Field(description="Steps done when it was saved.")
    time: AwareDatetime = Field(description="When it was complete.")
    uri: ShortText = Field(description="Where it is.")


class NodeRanks(Reported):
    """A node and the ranks that it runs."""

    name: ShortText = Field(description="Name of the node.")
    ranks: tuple[Count, ...] = Field(
        default=(), max_length=1024, description="Ranks of the processes on it."
    )


class ExcludedNode(Reported):
    """A node that is avoided for a while."""

    name: ShortText = Field(description="Name of the node.")
    reason: ShortText = Field(default="", description="Why it is avoided.")
    failures: Count = Field(
        default=1,
        description="Counted failures there. After the first another node is preferred, after the "
        "second none of the job's pods goes there.",
    )
    until: AwareDatetime | None = Field(default=None, description="When this ends.")


class Incarnation(Reported):
    """How often the pod of one index was made in this attempt."""

    index: Count = Field(description="Index of the worker, or 0.")
    role: Annotated[str, Field(max_length=32)] = Field(
        default="worker", description="worker or coordinator."
    )
    incarnation: Count = Field(default=0, description="Its newest incarnation.")


class LastFailure(Reported):
    """The newest failure that made pods be replaced."""

    time: AwareDatetime = Field(description="When it was noticed.")
    pod: ShortText = Field(default="", description="The pod that failed.")
    node: ShortText | None = Field(default=None, description="The node it ran on.")
    exit_code: int | None = Field(default=None, description="Exit code of its container.")
    reason: ShortText = Field(default="", description="One word that says why.")
    message: ShortText = Field(default="", description="What the pod said itself.")
    step: Count | None = Field(default=None, description="Last step known to be done by then.")
    repeated: Count = Field(
        default=1, description="Counted failures in a row without a newer checkpoint."
    )
    at_step: Count = Field(default=1, description="Of these, those in a row at this step.")


class Result(Reported):
    """What came out."""

    parent_model: ShortText | None = Field(default=None, description="The base model.")
    job_name: ShortText | None = Field(default=None, description="Name of the job.")
    training_seconds: Count | None = Field(default=None, description="Time spent training.")
    output_uri: ShortText | None = Field(default=None, description="The job's own folder.")
    model_uri: ShortText | None = Field(default=None, description="The trained model.")
    manifest_uri: ShortText | None = Field(
        default=None, description="The record of what was made from what, with digests."
    )
    metrics: tuple[Metric, ...] = Field(
        default=(),
        max_length=64,
        description="Figures of the end, held-out losses among them.",
        json_schema_extra={"listMapKey": "name"},
    )


class CPTJobStatus(Reported):
    """What the operator reports."""

    observed_generation: Annotated[int, Field(ge=-1)] = Field(
        default=-1, description="Generation of the spec that this status speaks of; -1 is none."
    )
    phase: Phase | None = Field(default=None, description="One word for columns and selectors.")
    start_time: AwareDatetime | None = Field(default=None, description="When it was accepted.")
    completion_time: AwareDatetime | None = Field(
        default=None, description="When it completed or failed."
    )
    conditions: tuple[ConditionStatus, ...] = Field(
        default=(),
        max_length=32,
        description="Conditions; readers act on these.",
        json_schema_extra={"listMapKey": "type"},
    )
    resolved: ResolvedStatus | None = Field(
        default=None, description="Everything that was left to a default, as it was decided."
    )
    attempt: Count = Field(default=0, description="How often all pods were made anew.")
    restarts: Count = Field(default=0, description="Restarts of any kind.")
    restarts_count_towards_max: Count = Field(
        default=0, description="Restarts that count against failurePolicy.maxRestarts."
    )
    retry_time: AwareDatetime | None = Field(
        default=None, description="When pods are made again after a failure; absent when none wait."
    )
    last_failure: LastFailure | None = Field(
        default=None, description="The newest failure that made pods be replaced."
    )
    pods: PodCounts | None = Field(default=None, description="Worker pods by what they do.")
    incarnations: tuple[Incarnation, ...] = Field(
        default=(), max_length=501, description="Newest incarnation of each pod."
    )
    replicas: Count = Field(default=0, description="Worker pods, for the scale subresource.")
    selector: ShortText | None = Field(
        default=None, description="Label selector of the worker pods, for the scale subresource."
    )
    trainer_status: TrainerStatus | None = Field(
        default=None, description="What the trainer says about itself."
    )
    last_checkpoint: LastCheckpoint | None = Field(
        default=None, description="The newest complete checkpoint."
    )
    nodes: tuple[NodeRanks, ...] = Field(
        default=(),
        max_length=500,
        description="Nodes and the ranks that they run.",
        json_schema_extra={"listMapKey": "name"},
    )
    excluded_nodes: tuple[ExcludedNode, ...] = Field(
        default=(),
        max_length=500,
        description="Nodes that are avoided for a while.",
        json_schema_extra={"listMapKey": "name"},
    )
    active_seconds: Count = Field(
        default=0, description="Time with pods, in all; activeDeadlineSeconds bounds it."
    )
    node_seconds: Count = Field(default=0, description="Nodes held, times the time.")
    gpu_seconds: Count = Field(default=0, description="GPUs held, times the time; 0 on CPU nodes.")
    lost_gpu_seconds: Count = Field(
        default=0, description="The part of them that trained what was lost or did not train."
    )
    accounted_time: AwareDatetime | None = Field(
        default=None, description="Until when these times are counted."
    )
    result: Result | None = Field(default=None, description="What came out.")

    def condition(self, kind: Condition) -> ConditionStatus | None:
        """The condition of that type, if it is there."""
        return next((each for each in self.conditions if each.type == kind), None)
