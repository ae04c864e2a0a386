"""Everything about a job's pods that settings, pool and spec have decided, frozen at acceptance.

It lies in the job's immutable ConfigMap beside the trainer's configuration. Pods are made from it
alone, with the job's name and its present number of nodes, so that neither new settings nor a new
operator change a job that was accepted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from cptjob_api import resources
from cptjob_api.job import CPTJob
from cptjob_api.resolve import Resolved, gpus
from cptjob_api.storage import Storage
from cptjob_operator.settings import Pool, Security, Settings, Toleration
from cptjob_trainer.config import Paths, Strict

#: Label of a job that puts its workers into a queue of Kueue.
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
#: Annotation of a job that names the PodGroup of Kubernetes' own gang scheduling.
POD_GROUP = "training.cptjob.io/pod-group"
#: Labels and annotations of a job that its workers get: those that schedulers and queues read.
PASSED_ON = (
    "kueue.x-k8s.io/",
    "pod-group.scheduling.sigs.k8s.io/",
    "scheduling.k8s.io/",
    "scheduling.volcano.sh/",
    "scheduling.x-k8s.io/",
    "volcano.sh/",
)
#: Where a claim is mounted.
VOLUMES = "/volumes"


class Frozen(Strict):
    """Base of what is kept: an older operator takes no offence at fields of a newer one."""

    model_config = ConfigDict(extra="ignore")


class Mount(Frozen):
    """A volume claim of the job."""

    claim: str = Field(description="Name of the claim.")
    read_only: bool = Field(default=True, description="Whether the job only reads it.")


class Resources(Frozen):
    """Resources of a container."""

    requests: dict[str, str] = Field(default={}, description="What a node must have free.")
    limits: dict[str, str] = Field(default={}, description="Most that it may use.")


class Placement(Frozen):
    """Which nodes workers may go to."""

    mode: Literal["Auto", "Manual"] = Field(default="Auto", description="Who chooses the nodes.")
    node_names: tuple[str, ...] = Field(default=(), description="Nodes of mode Manual.")
    pool: str = Field(description="Name of the pool.")
    label_key: str = Field(description="Label of the pool's nodes.")
    label_value: str = Field(description="Its value.")
    product_label_key: str = Field(description="Label that names a node's GPU product.")
    products: tuple[str, ...] = Field(default=(), description="Products that will do; () is any.")
    instance_type: str | None = Field(default=None, description="Instance type of the nodes.")
    node_selector: dict[str, str] = Field(default={}, description="More labels of the nodes.")
    tolerations: tuple[Toleration, ...] = Field(default=(), description="Taints of the nodes.")
    toleration_seconds: int = Field(
        default=30, description="How long pods stay on a node that is not ready."
    )


class Profile(Frozen):
    """What a job's pods are made from."""

    version: Literal[1] = Field(default=1, description="Version of this format.")
    image: str = Field(description="Image of the trainer.")
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        default="IfNotPresent", description="When nodes pull it."
    )
    image_pull_secrets: tuple[str, ...] = Field(default=(), description="Secrets to pull it with.")
    service_account_name: str = Field(description="Service account of the pods.")
    placement: Placement = Field(description="Which nodes workers may go to.")
    gpu_resource: str = Field(description="Resource name of a GPU.")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs of a worker.")
    num_proc_per_node: int = Field(default=1, ge=1, description="Processes of a worker.")
    num_nodes: int | None = Field(
        default=None, description="Workers at acceptance: no later limit forbids so many."
    )
    worker: Resources = Field(default=Resources(), description="Resources of a worker.")
    coordinator: Resources = Field(default=Resources(), description="Those of the coordinator.")
    labels: dict[str, str] = Field(default={}, description="Labels of the workers.")
    annotations: dict[str, str] = Field(default={}, description="Annotations of the workers.")
    queue: str | None = Field(default=None, description="Queue of Kueue.")
    pod_group: str | None = Field(
        default=None, description="PodGroup of Kubernetes' own gang scheduling."
    )
    runtime_class_name: str | None = Field(default=None, description="Runtime of the workers.")
    priority_class_name: str | None = Field(default=None, description="Priority of the pods.")
    scheduler_name: str | None = Field(default=None, description="Scheduler of the workers.")
    env: dict[str, str] = Field(default={}, description="Environment of the processes.")
    secret_refs: tuple[str, ...] = Field(
        default=(), description="Secrets whose keys become environment variables."
    )
    mounts: tuple[Mount, ...] = Field(default=(), description="Claims, in order of their names.")
    shm_size: str = Field(description="Most that /dev/shm may hold.")
    scratch_size: str = Field(description="Most that /tmp may hold.")
    run_as_user: int | None = Field(default=None, description="User of the processes.")
    fs_group: int | None = Field(default=None, description="Group of the mounted volumes.")
    security: Security = Field(default="restricted", description="Pod Security standard.")
    termination_seconds: int = Field(description="Time that a pod has to save and end.")
    model_path: str = Field(description="Where pods find the base model.")
    log_dir: str | None = Field(
        default=None,
        description="Where TensorBoard finds event files; None in a job that did not ask for it.",
    )

    @property
    def output_claim(self) -> str | None:
        """The claim that the output goes to."""
        return next((each.claim for each in self.mounts if not each.read_only), None)


def path_of(uri: str) -> str:
    """Where pods find a storage URI."""
    storage = Storage.parse(uri)
    return f"{VOLUMES}/{storage.place}/{storage.path}".rstrip("/")


def freeze(job: CPTJob, resolved: Resolved, settings: Settings) -> Profile:
    """The profile of a job that `accept` has found no fault with."""
    spec, jobs = job.spec, settings.jobs
    assert resolved.pool is not None, "a job without a pool is refused"
    pool = settings.pools[resolved.pool]
    gpu = pool.gpu_resource or jobs.gpu_resource
    requests, limits = resources.of_worker(job, gpu, jobs.instance_gpus, pool.extra_resources)
    own = {each.name: each.value for each in spec.trainer.env}
    labels, annotations = _passed_on(job.metadata.labels), _passed_on(job.metadata.annotations)
    return Profile(
        image=resolved.image,
        image_pull_policy=jobs.image_pull_policy,
        image_pull_secrets=_once(
            *(each.name for each in spec.trainer.image_pull_secrets), *jobs.image_pull_secrets
        ),
        service_account_name=resolved.service_account_name,
        placement=_placement(job, resolved.pool, pool, jobs.toleration_seconds),
        gpu_resource=gpu,
        gpus_per_node=gpus(job, gpu, jobs.instance_gpus),
        num_proc_per_node=resolved.num_proc_per_node,
        num_nodes=spec.trainer.num_nodes,
        worker=Resources(requests=requests, limits=limits),
        coordinator=Resources(
            requests=settings.coordinator.requests, limits=settings.coordinator.limits
        ),
        labels=pool.labels | labels,
        annotations=pool.annotations | annotations,
        queue=job.metadata.labels.get(QUEUE_LABEL),
        pod_group=job.metadata.annotations.get(POD_GROUP),
        runtime_class_name=pool.runtime_class_name,
        priority_class_name=spec.scheduling.priority_class_name or jobs.priority_class_name,
        scheduler_name=spec.scheduling.scheduler_name or jobs.scheduler_name,
        env={each.name: each.value for each in pool.env} | own,
        secret_refs=_once(*(each.name for each in spec.trainer.secret_refs)),
        mounts=_mounts(job, resolved.output_uri),
        shm_size=pool.shm_size,
        scratch_size=pool.scratch_size,
        run_as_user=pool.run_as_user,
        fs_group=pool.fs_group,
        security=_security(job, pool),
        termination_seconds=spec.checkpoint.grace_period_seconds + jobs.grace_margin_seconds,
        model_path=path_of(spec.model.storage_uri),
        log_dir=_log_dir(resolved.output_uri) if spec.tracking.tensor_board else None,
    )


def _placement(job: CPTJob, name: str, pool: Pool, toleration_seconds: int) -> Placement:
    asked = job.spec.scheduling
    return Placement(
        mode=asked.mode,
        node_names=asked.node_names,
        pool=name,
        label_key=pool.label_key,
        label_value=pool.label_value or name,
        product_label_key=pool.product_label_key,
        products=asked.gpu_types or pool.gpu_products,
        instance_type=asked.instance_type,
        node_selector=pool.node_selector,
        tolerations=pool.tolerations,
        toleration_seconds=toleration_seconds,
    )


def _passed_on(words: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in words.items() if key.startswith(PASSED_ON)}


def _once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _security(job: CPTJob, pool: Pool) -> Security:
    allowed = job.metadata.namespace in pool.security.namespaces
    return pool.security.profile if allowed else "restricted"


def _read(job: CPTJob) -> Iterator[str]:
    yield job.spec.model.storage_uri
    yield from (each.storage_uri for each in job.spec.datasets)
    yield from (each.storage_uri for each in job.spec.validation.datasets)


def _log_dir(output: str | None) -> str:
    assert output is not None, "a job without an output is refused"
    return str(Paths(output=Path(path_of(output))).events)


def _mounts(job: CPTJob, output: str | None) -> tuple[Mount, ...]:
    assert output is not None, "a job without an output is refused"
    written = Storage.parse(output).place
    claims = {Storage.parse(uri).place for uri in _read(job)} | {written}
    return tuple(Mount(claim=each, read_only=each != written) for each in sorted(claims))
