"""Everything that a manifest may leave out and a constant cannot answer.

`RULES` is the specification: each is a small pure function of one `Question`, and they are asked
in order, so that a later one may look at what was decided before. What the manifest says always
wins. The answers go into `status.resolved` and into the trainer's configuration, once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cptjob_api import quantities
from cptjob_api.facts import ModelFacts
from cptjob_api.job import CPTJob
from cptjob_api.spec import (
    CPTJobSpec,
    Dataset,
    LabelValue,
    ObjectName,
    ResourceName,
    ValidationDataset,
)
from cptjob_api.status import ResolvedStatus
from cptjob_api.storage import Storage
from cptjob_trainer.config import (
    AcceptedConfig,
    AcceptedTraining,
    Checkpoint,
    DatasetInput,
    Elastic,
    Lora,
    ModelInput,
    Paths,
    Processes,
    ResolvedLora,
    ResolvedSchedule,
    ResolvedTraining,
    StorageUri,
    Strict,
    TrainerConfig,
    ValidationInput,
    rule,
)
from cptjob_trainer.errors import ConfigError
from cptjob_trainer.model import presets

# GPUs of well-known instance types; the platform's settings may add to them.
INSTANCE_GPUS: dict[str, int] = {
    "p3.2xlarge": 1,
    "p3.8xlarge": 4,
    "p3.16xlarge": 8,
    "p3dn.24xlarge": 8,
}


class JobDefaults(Strict):
    """What the platform decides for jobs that do not say."""

    image: str = Field(
        default="cptjob/trainer:latest",
        min_length=1,
        max_length=512,
        description="Image of the trainer.",
    )
    service_account_name: ObjectName = Field(
        default="default", description="Service account of the pods."
    )
    output_uri: StorageUri | None = Field(
        default=None,
        description="Storage under which each job gets a folder for its results, such as "
        "pvc://CLAIM/path.",
        json_schema_extra=rule("each job must name one"),
    )
    pool: LabelValue | None = Field(
        default=None,
        description="Pool of nodes to train on.",
        json_schema_extra=rule("the only pool; of several, each job must name one"),
    )
    gpu_resource: ResourceName = Field(
        default="nvidia.com/gpu", min_length=1, description="Resource name of a GPU."
    )
    instance_gpus: Annotated[
        dict[LabelValue, Annotated[int, Field(ge=0, le=1024)]], Field(max_length=1000)
    ] = Field(default=INSTANCE_GPUS, description="GPUs of a node, by its instance type.")


class Resolved(Strict):
    """Every answer. Field names are those of `status.resolved`.

    Length and batch are None where only the model can tell them and nobody has seen it.
    """

    image: str
    service_account_name: str
    pool: str | None
    output_uri: str | None
    num_proc_per_node: int
    epochs: int
    max_length: int | None
    batch_size_per_device: int | None
    global_batch_size: int | None
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_target_modules: tuple[str, ...] | None
    split_percent: float

    def status(self, total_steps: int | None = None) -> ResolvedStatus:
        """As the status shows it."""
        return ResolvedStatus(**dict(self), total_steps=total_steps)


@dataclass(frozen=True)
class Question:
    """What a rule may look at. `facts` is None where nobody has seen the model."""

    job: CPTJob
    facts: ModelFacts | None
    settings: JobDefaults
    decided: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> CPTJobSpec:
        return self.job.spec


def gpus(job: CPTJob, resource: str, instance_gpus: Mapping[str, int]) -> int:
    """GPUs of a worker: those in resourcesPerNode, else those of the instance type."""
    asked = job.spec.trainer.resources_per_node
    given = asked.limits.get(resource) or asked.requests.get(resource)
    if given is not None:
        return quantities.whole(given) or 0
    return instance_gpus.get(job.spec.scheduling.instance_type or "", 0)


def image(ask: Question) -> str:
    """The platform's trainer image."""
    return ask.spec.trainer.image or ask.settings.image


def service_account_name(ask: Question) -> str:
    """The platform's service account for jobs."""
    return ask.spec.trainer.service_account_name or ask.settings.service_account_name


def pool(ask: Question) -> str | None:
    """The platform's default pool."""
    return ask.spec.scheduling.pool or ask.settings.pool


def output_uri(ask: Question) -> str | None:
    """A folder with the job's name in its own or the platform's output storage."""
    storage = ask.spec.output.storage_uri or ask.settings.output_uri
    return str(Storage.parse(storage) / ask.job.metadata.name) if storage else None


def num_proc_per_node(ask: Question) -> int:
    """The GPUs in resourcesPerNode, else of the instance type, else 1."""
    counted = gpus(ask.job, ask.settings.gpu_resource, ask.settings.instance_gpus)
    return ask.spec.trainer.num_proc_per_node or counted or 1


def epochs(ask: Question) -> int:
    """3: continued training on a domain is usually 3 to 5 epochs."""
    return ask.spec.training.epochs or 3


def max_length(ask: Question) -> int | None:
    """The model's positions, at most 2048; longer than the positions is refused."""
    if ask.facts is None:
        return ask.spec.training.max_length
    return presets.max_length(ask.spec.training, ask.facts.max_positions)


def batch_size_per_device(ask: Question) -> int | None:
    """8, or fewer so that a pass has at most 16384 tokens."""
    given, length = ask.spec.training.batch_size_per_device, ask.decided["max_length"]
    if given is not None or length is None:
        return given
    return presets.batch_size_per_device(length)


def global_batch_size(ask: Question) -> int | None:
    """numNodes × numProcPerNode × batchSizePerDevice."""
    given, rows = ask.spec.training.global_batch_size, ask.decided["batch_size_per_device"]
    if given is not None or rows is None:
        return given
    devices = ask.spec.trainer.num_nodes * int(ask.decided["num_proc_per_node"])
    return presets.global_batch_size(devices, rows)


def learning_rate(ask: Question) -> float:
    """2e-5 for Full, 1e-4 for LoRA."""
    default = 1e-4 if ask.spec.training.method == "LoRA" else 2e-5
    return ask.spec.training.learning_rate or default


def min_learning_rate(ask: Question) -> float:
    """learningRate / 10; one that is given must be below the learning rate."""
    given, peak = ask.spec.training.schedule.min_learning_rate, float(ask.decided["learning_rate"])
    if given is None:
        return float(Decimal(repr(peak)) / 10)  # 2e-06 and not 2.0000000000000003e-06
    if given >= peak:
        raise ConfigError(
            f"spec.training.schedule.minLearningRate: {given} is not less than the learning rate, "
            f"which is {peak} by default; set learningRate or a lower minLearningRate"
        )
    return given


def warmup_steps(ask: Question) -> int | None:
    """1 % of the total steps, which only prepare knows."""
    return ask.spec.training.schedule.warmup_steps


def lora_rank(ask: Question) -> int | None:
    """With LoRA, the constant of its field."""
    lora = _lora(ask)
    return lora.rank if lora else None


def lora_alpha(ask: Question) -> float | None:
    """With LoRA, 2 × rank."""
    lora = _lora(ask)
    return (lora.alpha or 2.0 * lora.rank) if lora else None


def lora_target_modules(ask: Question) -> tuple[str, ...] | None:
    """With LoRA, every linear layer but the output head."""
    lora = _lora(ask)
    return (lora.target_modules or ("all-linear",)) if lora else None


def split_percent(ask: Question) -> float:
    """0 when each role of the data has a validation data set, else 1.

    A role that has one is not split, so 1 holds out text of the others only.
    """
    validation = ask.spec.validation
    if validation.split_percent is not None:
        return validation.split_percent
    covered = {dataset.role for dataset in validation.datasets}
    return 0.0 if covered.issuperset(dataset.role for dataset in ask.spec.datasets) else 1.0


def _lora(ask: Question) -> Lora | None:
    if ask.spec.training.method != "LoRA":
        return None
    return ask.spec.training.lora or Lora()


RULES: tuple[Callable[[Question], Any], ...] = (
    image,
    service_account_name,
    pool,
    output_uri,
    num_proc_per_node,
    epochs,
    max_length,
    batch_size_per_device,
    global_batch_size,
    learning_rate,
    min_learning_rate,
    warmup_steps,
    lora_rank,
    lora_alpha,
    lora_target_modules,
    split_percent,
)


def resolve(
    job: CPTJob, facts: ModelFacts | None = None, settings: JobDefaults | None = None
) -> Resolved:
    """Decide everything that the job leaves out. Pure: the same job gets the same answers.

    Without `facts`, what depends on the model is left to who sees it: `presets.complete`.
    Raises ConfigError for what only shows beside the model, such as too long a row.
    """
    ask = Question(job, facts, settings or JobDefaults())
    decided: dict[str, Any] = {}
    for each in RULES:
        decided[each.__name__] = each(replace(ask, decided=decided))
    return Resolved(**decided)


def trainer_config(
    job: CPTJob,
    resolved: Resolved,
    *,
    uid: str,
    output: Path,
    locate: Callable[[str], Path],
    processes: Processes | None = None,
    prepared: Path | None = None,
) -> TrainerConfig:
    """What a trainer is told, all decided: `resolved` must have been made with a model's facts.

    For the rest see `accepted_config`.
    """
    accepted = accepted_config(
        job,
        resolved,
        uid=uid,
        output=output,
        locate=locate,
        processes=processes,
        prepared=prepared,
    )
    training = ResolvedTraining(**dict(accepted.training))
    return TrainerConfig(**dict(accepted) | {"training": training})


def accepted_config(
    job: CPTJob,
    resolved: Resolved,
    *,
    uid: str,
    output: Path,
    locate: Callable[[str], Path],
    processes: Processes | None = None,
    prepared: Path | None = None,
) -> AcceptedConfig:
    """What a trainer is told, open where only the model can decide.

    `locate` finds a storage URI on the machine that trains; `output` is the job's own folder there.
    `processes` may differ from the manifest's: a local run has its own. The global batch does not
    follow it.
    """
    spec = job.spec
    return AcceptedConfig(
        name=job.metadata.name,
        uid=uid,
        task=spec.task,
        model=ModelInput(uri=spec.model.storage_uri, path=locate(spec.model.storage_uri)),
        datasets=tuple(_dataset(each, locate) for each in spec.datasets),
        data=spec.data,
        validation=ValidationInput(
            datasets=tuple(_dataset(each, locate) for each in spec.validation.datasets),
            split_percent=resolved.split_percent,
            every_steps=spec.validation.every_steps,
        ),
        training=_training(job, resolved),
        checkpoint=Checkpoint(**dict(spec.checkpoint)),
        elastic=Elastic(max_restarts=spec.elastic_policy.max_restarts)
        if spec.elastic_policy
        else Elastic(),
        processes=processes
        or Processes(
            num_nodes=spec.trainer.num_nodes, num_proc_per_node=resolved.num_proc_per_node
        ),
        hang_detection=spec.hang_detection,
        paths=Paths(output=output) if prepared is None else Paths(output=output, prepared=prepared),
    )


def _dataset(dataset: ValidationDataset, locate: Callable[[str], Path]) -> DatasetInput:
    return DatasetInput(
        name=dataset.name,
        version=dataset.version,
        uri=dataset.storage_uri,
        path=locate(dataset.storage_uri),
        role=dataset.role,
        weight=dataset.weight if isinstance(dataset, Dataset) else None,
    )


def _training(job: CPTJob, resolved: Resolved) -> AcceptedTraining:
    given = job.spec.training
    lora = None
    if resolved.lora_alpha is not None and resolved.lora_target_modules is not None:
        asked = dict(given.lora or Lora())
        decided = {"alpha": resolved.lora_alpha, "target_modules": resolved.lora_target_modules}
        lora = ResolvedLora(**asked | decided)
    schedule = dict(given.schedule) | {"min_learning_rate": resolved.min_learning_rate}
    answers = {
        "lora": lora,
        "schedule": ResolvedSchedule(**schedule),
        "epochs": resolved.epochs,
        "max_length": resolved.max_length,
        "batch_size_per_device": resolved.batch_size_per_device,
        "global_batch_size": resolved.global_batch_size,
        "learning_rate": resolved.learning_rate,
    }
    return AcceptedTraining(**dict(given) | answers)
