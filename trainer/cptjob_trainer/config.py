"""The configuration of a training run: the contract between the API and the trainer.

Field groups (`Training`, `Schedule`, `Checkpoint`, ...) are defined here once and embedded by the
API. `None` in a group means that the value is decided when a job is accepted; the rule that
decides stands beside the field. `AcceptedConfig` is what a trainer pod gets. `TrainerConfig` is
what it works with: every such value is decided, but for those that only prepare can know (warm-up,
evaluation interval).

This module needs pydantic only, so that the operator and the client can import it.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic.alias_generators import to_camel

from cptjob_trainer.errors import ConfigError, MissingInputError

Task = Literal["CausalLM", "MaskedLM", "TextClassification", "ImageClassification"]
Role = Literal["Domain", "General"]


class Strict(BaseModel):
    """Base of everything here: no unknown fields, no conversions, no changes after the fact.

    Python code builds these with snake_case names; documents use the camelCase ones only, which
    `from_json` and the manifest loader see to.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
        use_attribute_docstrings=False,
        protected_namespaces=(),
    )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a JSON document with camelCase names. Raises pydantic's ValidationError."""
        return cls.model_validate_json(text, by_alias=True, by_name=False)


def rule(sentence: str) -> dict[str, JsonValue]:
    """How an empty field is decided; goes into the field reference and the CRD's description."""
    return {"rule": sentence}


# --- bounds that the API and the resolved configuration share -------------------------------------

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
BANDWIDTH_PATTERN = r"^[0-9]+([.][0-9]+)?(k|M|G|Ki|Mi|Gi)?$"
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=NAME_PATTERN)]
StorageUri = Annotated[str, Field(min_length=1, max_length=1024)]
MaxLength = Annotated[int, Field(ge=8, le=1_048_576)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
MAX_GLOBAL_BATCH_SIZE = 1_048_576
GlobalBatchSize = Annotated[int, Field(ge=1, le=MAX_GLOBAL_BATCH_SIZE)]
Epochs = Annotated[int, Field(ge=1, le=1000)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
MinLearningRate = Annotated[float, Field(ge=0, lt=1)]
DropoutRate = Annotated[float, Field(ge=0, lt=1)]
SplitPercent = Annotated[float, Field(ge=0, le=50)]
Weight = Annotated[float, Field(gt=0, le=1_000_000)]
LoraAlpha = Annotated[float, Field(gt=0, le=65_536)]
Seconds = Annotated[int, Field(ge=1, le=31_536_000)]
TargetModule = Annotated[str, Field(min_length=1, max_length=256)]


# --- groups ---------------------------------------------------------------------------------------


class Data(Strict):
    """How documents are read."""

    deduplicate: Literal["None", "Exact", "Near"] = Field(
        default="None", description="Which repeated documents are dropped before the training."
    )
    normalize: Literal["None", "NFC", "NFKC"] = Field(
        default="None", description="Unicode normalisation of each document's text."
    )
    max_bad_lines: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Broken lines in all files together that are skipped; one more fails the job.",
    )


class Lora(Strict):
    """Low-rank adapters, for method LoRA."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of each adapter.")
    alpha: LoraAlpha | None = Field(
        default=None,
        description="Scale of the adapters; their output is multiplied by alpha / rank.",
        json_schema_extra=rule("2 × rank"),
    )
    dropout: DropoutRate = Field(
        default=0.0, description="Dropout on the input of each adapter while training."
    )
    target_modules: tuple[TargetModule, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Names (or name endings) of the modules that get an adapter.",
        json_schema_extra=rule("all-linear: every linear layer but the output head"),
    )


class ResolvedLora(Lora):
    """`Lora` with every value decided."""

    alpha: LoraAlpha
    target_modules: tuple[TargetModule, ...]


class Optimizer(Strict):
    """The optimizer. Norms, biases and other vectors get no weight decay."""

    name: Literal["AdamW"] = Field(default="AdamW", description="The optimizer.")
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = Field(
        default=(0.9, 0.95), description="Decay of the first and of the second moment's average."
    )
    eps: float = Field(
        default=1e-8, gt=0, le=1, description="Added to the denominator of an update."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, le=1, description="Decoupled weight decay, times the learning rate."
    )


class Schedule(Strict):
    """How the learning rate moves: a linear warm-up, then the type's own curve."""

    type: Literal["Constant", "Cosine", "Linear", "WSD"] = Field(
        default="Cosine",
        description="Curve after the warm-up; WSD holds the peak and decays over the last tenth.",
    )
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None,
        description="Steps over which the learning rate rises to its peak.",
        json_schema_extra=rule("1 % of the total steps, from 1 to 2000, once prepare knows them"),
    )
    constant_steps: int = Field(
        default=0,
        ge=0,
        le=100_000_000,
        description="Steps at the peak between the warm-up and the decay.",
    )
    min_learning_rate: MinLearningRate | None = Field(
        default=None,
        description="Learning rate of the last step; must be below the learning rate.",
        json_schema_extra=rule("learningRate / 10"),
    )


class ResolvedSchedule(Schedule):
    """`Schedule` with every value decided that does not need the data."""

    min_learning_rate: MinLearningRate


class Dropout(Strict):
    """Dropout while training. Left out, the model's own configuration holds."""

    hidden: DropoutRate | None = Field(
        default=None,
        description="Dropout on embeddings and on the output of each block.",
        json_schema_extra=rule("the model's own value"),
    )
    attention: DropoutRate | None = Field(
        default=None,
        description="Dropout on attention weights.",
        json_schema_extra=rule("the model's own value"),
    )
    feed_forward: DropoutRate | None = Field(
        default=None,
        description="Dropout inside the feed-forward part of each block.",
        json_schema_extra=rule("the model's own value"),
    )


class Sifting(Strict):
    """Dropping samples with a low loss while training."""

    mode: Literal["None", "TwoPass", "Shared", "Unbiased", "Token"] = Field(
        default="None",
        description="How samples are sifted: TwoPass runs a forward pass of its own, Shared uses "
        "the training pass, Unbiased re-weights what it keeps, Token sifts single tokens.",
    )
    beta_value: float = Field(
        default=0.5,
        gt=0,
        le=3,
        description="Strength of the sifting; 1 / (1 + betaValue) of the samples are kept.",
    )
    loss_history_length: int = Field(
        default=500,
        ge=1,
        le=100_000,
        description="Recent losses of a data set that a new loss is ranked against.",
    )
    sift_delay: int = Field(
        default=0, ge=0, le=100_000_000, description="Steps before the sifting begins."
    )
    tolerance: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Relative rise of held-out loss that switches the sifting off; 0 never does.",
    )


class Guards(Strict):
    """What happens when the loss goes wrong."""

    skip_non_finite: bool = Field(
        default=True,
        description="Skip the update of a step whose gradients are not finite numbers.",
    )
    spike_factor: Annotated[float, Field(gt=1, le=1_000_000)] | None = Field(
        default=None,
        description="Skip a step whose gradient norm is this many times the recent median.",
        json_schema_extra=rule("off"),
    )
    rollback_after: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="Go back to the last checkpoint after so many skipped steps in a row.",
        json_schema_extra=rule("off"),
    )


class RopeScaling(Strict):
    """Rotary position scaling, to train on rows longer than the model's positions."""

    type: Literal["Linear", "Dynamic", "YaRN"] = Field(description="Method of the scaling.")
    factor: float = Field(gt=1, le=1024, description="How many times longer rows become.")
    original_max_length: MaxLength | None = Field(
        default=None,
        description="Positions that the model was trained with.",
        json_schema_extra=rule("the model's own value"),
    )


class Training(Strict):
    """What is trained and how."""

    method: Literal["Full", "LoRA"] = Field(
        default="Full",
        description="Full updates every weight; LoRA trains low-rank adapters and merges them.",
    )
    lora: Lora | None = Field(
        default=None,
        description="Settings of the adapters; only with method LoRA.",
        json_schema_extra=rule("with method LoRA, the defaults of its fields"),
    )
    epochs: Epochs | None = Field(
        default=None,
        description="How often the rows of each domain data set are seen.",
        json_schema_extra=rule("3"),
    )
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None,
        description="Upper limit of optimizer steps, whatever the epochs say.",
        json_schema_extra=rule("no limit"),
    )
    max_length: MaxLength | None = Field(
        default=None,
        description="Tokens in a row; at most the model's positions.",
        json_schema_extra=rule("the model's positions, at most 2048"),
    )
    batch_size_per_device: BatchSize | None = Field(
        default=None,
        description="Rows that a device takes through one forward and backward pass.",
        json_schema_extra=rule("8, or fewer so that a pass has at most 16384 tokens"),
    )
    global_batch_size: GlobalBatchSize | None = Field(
        default=None,
        description="Rows of one optimizer step over all devices; frozen for the job's life.",
        json_schema_extra=rule("numNodes × numProcPerNode × batchSizePerDevice at acceptance"),
    )
    learning_rate: LearningRate | None = Field(
        default=None,
        description="Peak learning rate.",
        json_schema_extra=rule("2e-5 for Full, 1e-4 for LoRA"),
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        le=1_000_000,
        description="Norm that gradients are clipped to; 0 turns clipping off.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2_147_483_647,
        description="Decides the order of rows, dropout and the adapters' first weights.",
    )
    deterministic: bool = Field(
        default=False,
        description="Use deterministic kernels only: the same bits again, at some cost on GPUs.",
    )
    precision: Literal["Auto", "Float32", "BFloat16"] = Field(
        default="Auto",
        description="Number type of the computation; weights stay Float32. Auto is BFloat16 where "
        "the device is fast at it.",
    )
    system_prompt: Annotated[str, Field(min_length=1, max_length=16_384)] | None = Field(
        default=None,
        description="Text in front of each document, by the model's chat template where it has "
        "one; no loss is taken on it.",
        json_schema_extra=rule("none"),
    )
    rope_scaling: RopeScaling | None = Field(
        default=None,
        description="Rotary position scaling.",
        json_schema_extra=rule("none"),
    )
    activation_checkpointing: Literal["Auto", "None", "Full"] = Field(
        default="Auto",
        description="Recompute activations in the backward pass to save memory; Auto when memory "
        "would not suffice.",
    )
    optimizer: Optimizer = Field(default=Optimizer(), description="The optimizer.")
    schedule: Schedule = Field(default=Schedule(), description="How the learning rate moves.")
    dropout: Dropout = Field(default=Dropout(), description="Dropout while training.")
    sifting: Sifting = Field(
        default=Sifting(), description="Dropping samples with a low loss while training."
    )
    guards: Guards = Field(default=Guards(), description="What happens when the loss goes wrong.")


class AcceptedTraining(Training):
    """`Training` with every value decided that needs neither the model nor the data."""

    lora: ResolvedLora | None = None
    epochs: Epochs
    learning_rate: LearningRate
    schedule: ResolvedSchedule


class ResolvedTraining(AcceptedTraining):
    """`Training` with every value decided that does not need the data."""

    max_length: MaxLength
    batch_size_per_device: BatchSize
    global_batch_size: GlobalBatchSize


class Checkpoint(Strict):
    """When and how checkpoints are saved. One is always saved at the end."""

    every_steps: int = Field(
        default=2000, ge=1, le=100_000_000, description="Steps between two checkpoints."
    )
    keep_last: Annotated[int, Field(ge=1, le=5000)] | None = Field(
        default=None,
        description="How many of the newest checkpoints are kept.",
        json_schema_extra=rule("all"),
    )
    storage_uri: StorageUri | None = Field(
        default=None,
        description="Where checkpoints go.",
        json_schema_extra=rule("checkpoints/ under the job's output"),
    )
    grace_period_seconds: int = Field(
        default=120,
        ge=1,
        le=3600,
        description="Time that a pod which is asked to stop has for its last checkpoint.",
    )
    snapshot_every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None,
        description="Steps between two copies in the node's memory.",
        json_schema_extra=rule("none are made"),
    )
    max_bandwidth: Annotated[str, Field(max_length=32, pattern=BANDWIDTH_PATTERN)] | None = Field(
        default=None,
        description="Bytes a second that saving may use on a node, such as 200Mi.",
        json_schema_extra=rule("no limit"),
    )
    on_mismatch: Literal["Refuse", "StartNew"] = Field(
        default="Refuse",
        description="What to do when the output holds checkpoints of another model, data or seed.",
    )


class HangDetection(Strict):
    """When a silent gang is taken for hung and restarted."""

    startup_timeout_seconds: int = Field(
        default=1800,
        ge=1,
        le=86_400,
        description="Time from the start of a gang to its first step.",
    )
    step_timeout_seconds: int = Field(
        default=1800, ge=1, le=86_400, description="Time without a finished step or evaluation."
    )


# --- what a trainer pod gets ----------------------------------------------------------------------


class ModelInput(Strict):
    """The base model."""

    uri: str = Field(description="Where the manifest says that it is.")
    path: Path = Field(description="The directory to read.")


class DatasetInput(Strict):
    """One data set."""

    name: Name = Field(description="Its name in the job.")
    version: str = Field(default="", max_length=63, description="Its version, for the records.")
    uri: str = Field(description="Where the manifest says that it is.")
    path: Path = Field(description="The file or directory to read.")
    role: Role = Field(
        default="Domain", description="Domain text, or General text against forgetting."
    )
    weight: Weight | None = Field(default=None, description="Its share; None is automatic.")


class ValidationInput(Strict):
    """What the model is evaluated on."""

    datasets: tuple[DatasetInput, ...] = Field(default=(), description="Held-out data sets.")
    split_percent: SplitPercent = Field(
        default=1.0, description="Percent of the training documents held out, chosen by their hash."
    )
    every_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Steps between two evaluations; None lets the trainer keep to 3 % of the time.",
    )


class Elastic(Strict):
    """Restarts in place."""

    max_restarts: int = Field(
        default=3, ge=0, le=1000, description="Restarts of the worker processes in place."
    )


class Processes(Strict):
    """How many processes train."""

    num_nodes: int = Field(default=1, ge=1, le=500, description="Launchers, one a node.")
    num_proc_per_node: int = Field(default=1, ge=1, le=1024, description="Workers of a launcher.")

    @property
    def world_size(self) -> int:
        """Worker processes in all."""
        return self.num_nodes * self.num_proc_per_node


class Paths(Strict):
    """Directories of this run."""

    output: Path = Field(description="Everything the job leaves behind.")
    prepared: Path = Field(
        default_factory=lambda data: data["output"] / "prepared",
        description="Tokenised data; shared between jobs when it is given.",
    )

    @property
    def events(self) -> Path:
        """TensorBoard's event files."""
        return self.output / "tensorboard"


class AcceptedConfig(Strict):
    """Everything that a trainer pod is told, in one JSON file.

    What depends on the model may be open: who accepts a job on a cluster has not seen the model.
    `presets.load` decides it beside the model.
    """

    version: Literal[1] = Field(default=1, description="Version of this format.")
    name: str = Field(description="Name of the job.")
    uid: str = Field(description="Identity of the job; a new one for each new CPTJob object.")
    task: Task = Field(default="CausalLM", description="What the model learns to do.")
    model: ModelInput = Field(description="The base model.")
    datasets: tuple[DatasetInput, ...] = Field(description="Training data.")
    data: Data = Field(default=Data(), description="How documents are read.")
    validation: ValidationInput = Field(
        default=ValidationInput(), description="What the model is evaluated on."
    )
    training: AcceptedTraining = Field(description="What is trained and how.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="When checkpoints are saved.")
    elastic: Elastic = Field(default=Elastic(), description="Restarts in place.")
    processes: Processes = Field(default=Processes(), description="How many processes train.")
    hang_detection: HangDetection = Field(
        default=HangDetection(), description="When a gang is taken for hung."
    )
    paths: Paths = Field(description="Directories of this run.")
    compile: Literal["Auto", "Always", "Never"] = Field(
        default="Auto", description="Whether the model is compiled; Auto where it pays."
    )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `dump` wrote. Raises MissingInputError or ConfigError."""
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise MissingInputError(
                f"{path}: the trainer's configuration cannot be read: {error.strerror}"
            ) from error
        try:
            return cls.from_json(text)
        except ValidationError as error:
            raise ConfigError(f"{path}: not a trainer configuration: {summary(error)}") from error

    def dump(self, path: Path | str) -> None:
        """Write as JSON, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(target)


class TrainerConfig(AcceptedConfig):
    """`AcceptedConfig` with everything decided that the model decides."""

    training: ResolvedTraining = Field(description="What is trained and how.")


# Settings of `training` that divide a step's work and leave its result alone.
DIVISION = ("batch_size_per_device", "activation_checkpointing")

# What says how or where a job runs, not what it makes. `globalBatchSize` is in `training`, so the
# process counts can go.
_NOT_DIGESTED: dict[str, Any] = {
    "name": True,
    "uid": True,
    "paths": True,
    "processes": True,
    "elastic": True,
    "hang_detection": True,
    "checkpoint": True,
    "model": True,
    "datasets": {"__all__": {"uri", "path"}},
    "training": set(DIVISION),
    "validation": {"datasets": {"__all__": {"uri", "path"}}},
}


def digest(config: TrainerConfig, model_fingerprint: str, data_fingerprint: str) -> str:
    """Identity of the result, 32 hex digits: two jobs with the same one make the same model.

    The fingerprints stand for the contents of the model and of the data, wherever they lie.
    """
    settings = config.model_dump_json(exclude=_NOT_DIGESTED)
    text = "\n".join(["cptjob/1", settings, model_fingerprint, data_fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def summary(error: ValidationError) -> str:
    """pydantic's faults in one line, with the camelCase path of each."""
    return "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'document'}: {fault['msg']}"
        for fault in error.errors(include_url=False)
    )
