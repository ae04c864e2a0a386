"""The `spec` of a CPTJob: what a person writes.

Fields that the trainer reads come from `cptjob_trainer.config`, where they are defined once; the
others are here. A default in this file is a constant that never changes within the API version.
What depends on method, model or platform has none: `resolve.py` decides it.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cptjob_trainer.config import (
    Checkpoint,
    Data,
    HangDetection,
    Name,
    Role,
    Seconds,
    SplitPercent,
    StorageUri,
    Strict,
    Task,
    Training,
    Weight,
    rule,
)


def _quantity(value: Any) -> Any:
    """Kubernetes takes `8` for `"8"`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


# Go's resource.Quantity. What is below 0 resources.py refuses: a pattern does not see numbers.
QUANTITY_PATTERN = (
    r"^[+-]?([0-9]+|[0-9]+[.][0-9]*|[.][0-9]+)([eE][+-]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?$"
)
OBJECT_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
LABEL_VALUE_PATTERN = r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
Quantity = Annotated[
    str,
    BeforeValidator(_quantity, json_schema_input_type=int | str),
    Field(max_length=32, pattern=QUANTITY_PATTERN, json_schema_extra={"quantity": True}),
]
ObjectName = Annotated[
    str,
    Field(min_length=1, max_length=253, pattern=OBJECT_NAME_PATTERN),
]
LabelValue = Annotated[
    str,
    Field(min_length=1, max_length=63, pattern=LABEL_VALUE_PATTERN),
]
ResourceName = Annotated[str, Field(max_length=316)]


class SecretRef(Strict):
    """A secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the secret.")


class Model(Strict):
    """The base model: a Hugging Face model directory with safetensors and a tokenizer."""

    storage_uri: StorageUri = Field(description="Where the model directory is.")
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the credentials to read it.",
        json_schema_extra=rule("none"),
    )


class ValidationDataset(Strict):
    """One held-out data set."""

    name: Name = Field(description="Name of the data set, unique in its list.")
    version: str = Field(
        default="", max_length=63, description="Version of the data set, for the records."
    )
    storage_uri: StorageUri = Field(description="The file or directory of .jsonl files.")
    role: Role = Field(
        default="Domain",
        description="Domain text is what the model shall learn; General text is what it shall not "
        "forget.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the credentials to read it.",
        json_schema_extra=rule("none"),
    )


class Dataset(ValidationDataset):
    """One training data set."""

    weight: Weight | None = Field(
        default=None,
        description="Domain: share among the domain data sets. General: share of all tokens. All "
        "data sets of a role have one, or none has.",
        json_schema_extra=rule("by its rows for Domain, 0.05 among them all for General"),
    )


class Validation(Strict):
    """What the model is evaluated on."""

    datasets: tuple[ValidationDataset, ...] = Field(
        default=(),
        max_length=64,
        description="Held-out data sets.",
        json_schema_extra={"listMapKey": "name"},
    )
    split_percent: SplitPercent | None = Field(
        default=None,
        description="Percent of the training documents held out, chosen by a hash of their text; a "
        "role with validation data sets keeps all of its own.",
        json_schema_extra=rule("0 when each role of the data has a validation data set, else 1"),
    )
    every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None,
        description="Steps between two evaluations; one is always made before and after.",
        json_schema_extra=rule("as often as 3 % of the time allows"),
    )


class Output(Strict):
    """Where the job's results go."""

    storage_uri: StorageUri | None = Field(
        default=None,
        description="Place under which a folder with the job's name is made.",
        json_schema_extra=rule("the platform's output storage"),
    )


class Resources(Strict):
    """Resources of a container, as in a pod."""

    limits: Annotated[dict[ResourceName, Quantity], Field(max_length=16)] = Field(
        default={}, description="Most that a worker pod may use, such as cpu: 8 and memory: 64Gi."
    )
    requests: Annotated[dict[ResourceName, Quantity], Field(max_length=16)] = Field(
        default={}, description="What a node must have free."
    )


class EnvVar(Strict):
    """An environment variable."""

    name: str = Field(
        min_length=1,
        max_length=256,
        pattern=VARIABLE_PATTERN,
        description="Name of the variable.",
    )
    value: str = Field(default="", max_length=4096, description="Its value.")


class Trainer(Strict):
    """The pods that train."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        default=None,
        description="Image of the trainer; pinned when the job is accepted.",
        json_schema_extra=rule("the platform's trainer image"),
    )
    image_pull_secrets: tuple[SecretRef, ...] = Field(
        default=(), max_length=8, description="Secrets to pull the image with."
    )
    num_nodes: int = Field(
        default=1, ge=1, le=500, description="Worker pods, one a node with Manual scheduling."
    )
    num_proc_per_node: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="Processes in a worker pod, one a device.",
        json_schema_extra=rule("the GPUs in resourcesPerNode, else of instanceType, else 1"),
    )
    resources_per_node: Resources = Field(
        default=Resources(), description="Resources of a worker pod."
    )
    env: tuple[EnvVar, ...] = Field(
        default=(),
        max_length=64,
        description="Environment of the processes.",
        json_schema_extra={"listMapKey": "name"},
    )
    secret_refs: tuple[SecretRef, ...] = Field(
        default=(), max_length=8, description="Secrets whose keys become environment variables."
    )
    service_account_name: ObjectName | None = Field(
        default=None,
        description="Service account of the pods.",
        json_schema_extra=rule("the platform's service account for jobs"),
    )


class ElasticPolicy(Strict):
    """How far the number of workers may move while the job runs."""

    min_nodes: Annotated[int, Field(ge=1, le=500)] | None = Field(
        default=None,
        description="Fewest worker pods to train with.",
        json_schema_extra=rule("numNodes"),
    )
    max_nodes: Annotated[int, Field(ge=1, le=500)] | None = Field(
        default=None,
        description="Most worker pods to train with.",
        json_schema_extra=rule("numNodes"),
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Restarts of the processes in place before pods are replaced.",
    )


class Scheduling(Strict):
    """Which nodes the workers go to."""

    mode: Literal["Auto", "Manual"] = Field(
        default="Auto",
        description="Auto leaves the choice within the pool to the scheduler; Manual names nodes.",
    )
    pool: LabelValue | None = Field(
        default=None,
        description="Pool of nodes to train on.",
        json_schema_extra=rule("the platform's default pool"),
    )
    gpu_types: tuple[LabelValue, ...] = Field(
        default=(),
        max_length=16,
        description="GPU products that will do; empty allows all of the pool.",
        json_schema_extra={"listType": "set"},
    )
    instance_type: LabelValue | None = Field(
        default=None,
        description="Instance type of the nodes; it also presets numProcPerNode.",
        json_schema_extra=rule("any"),
    )
    node_names: tuple[ObjectName, ...] = Field(
        default=(),
        max_length=500,
        description="Nodes for mode Manual, at least numNodes of them.",
        json_schema_extra={"listType": "set"},
    )
    priority_class_name: ObjectName | None = Field(
        default=None,
        description="Priority class of the pods.",
        json_schema_extra=rule("the cluster's default"),
    )
    scheduler_name: ObjectName | None = Field(
        default=None,
        description="Scheduler of the pods.",
        json_schema_extra=rule("the cluster's default"),
    )


class FailurePolicy(Strict):
    """How failures are answered."""

    max_restarts: int = Field(
        default=10, ge=0, le=10_000, description="Counted restarts before the job fails."
    )
    reset_on_progress: bool = Field(
        default=True, description="A newer checkpoint sets the count of restarts back to 0."
    )
    max_excluded_nodes: int = Field(
        default=2,
        ge=0,
        le=500,
        description="Most nodes avoided at a time because pods failed there.",
    )
    excluded_node_ttl_seconds: Seconds = Field(
        default=86_400,
        alias="excludedNodeTTLSeconds",
        description="How long such a node is avoided.",
    )


class MLflow(Strict):
    """An MLflow run that metrics go to."""

    tracking_uri: str = Field(min_length=1, max_length=1024, description="The MLflow server.")
    experiment: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None,
        description="Experiment to log to.",
        json_schema_extra=rule("the job's namespace"),
    )
    run_name: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Name of the run.", json_schema_extra=rule("the job's name")
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the server's credentials.",
        json_schema_extra=rule("none"),
    )


class Tracking(Strict):
    """Where metrics go besides the output."""

    tensor_board: bool = Field(
        default=False,
        description="On a cluster, show the job's curves with TensorBoard for as long as it is there.",
    )
    mlflow: MLflow | None = Field(
        default=None,
        description="An MLflow run that metrics go to.",
        json_schema_extra=rule("none"),
    )


class CPTJobSpec(Strict):
    """What a job is asked to do."""

    task: Task = Field(default="CausalLM", description="What the model learns to do.")
    model: Model = Field(description="The base model.")
    datasets: tuple[Dataset, ...] = Field(
        default=(),
        max_length=64,
        description="Training data; the classification tasks have a built-in default.",
        json_schema_extra={"listMapKey": "name"},
    )
    data: Data = Field(default=Data(), description="How documents are read.")
    validation: Validation = Field(
        default=Validation(), description="What the model is evaluated on."
    )
    training: Training = Field(default=Training(), description="What is trained and how.")
    checkpoint: Checkpoint = Field(
        default=Checkpoint(), description="When and how checkpoints are saved."
    )
    output: Output = Field(default=Output(), description="Where the job's results go.")
    trainer: Trainer = Field(default=Trainer(), description="The pods that train.")
    elastic_policy: ElasticPolicy | None = Field(
        default=None,
        description="How far the number of workers may move while the job runs.",
        json_schema_extra=rule("it does not move; processes restart in place up to 3 times"),
    )
    scheduling: Scheduling = Field(
        default=Scheduling(), description="Which nodes the workers go to."
    )
    failure_policy: FailurePolicy = Field(
        default=FailurePolicy(), description="How failures are answered."
    )
    hang_detection: HangDetection = Field(
        default=HangDetection(), description="When a silent gang is taken for hung and restarted."
    )
    tracking: Tracking = Field(
        default=Tracking(), description="Where metrics go besides the output."
    )
    suspend: bool = Field(
        default=False, description="Save, give back all pods, and wait until this is false."
    )
    active_deadline_seconds: Seconds | None = Field(
        default=None,
        description="Time that the job may hold pods in all before it fails.",
        json_schema_extra=rule("no limit"),
    )
    startup_deadline_seconds: Seconds = Field(
        default=900,
        description="Time that a gang may take to start before it gives back what it holds.",
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = Field(
        default=None,
        description="Time after the end at which the object is deleted; the output stays.",
        json_schema_extra=rule("it is kept"),
    )
    managed_by: Annotated[str, Field(min_length=1, max_length=63)] | None = Field(
        default=None,
        description="Controller that looks after the job.",
        json_schema_extra=rule("this operator"),
    )
