"""What the platform decides, read once from one YAML file that the chart writes.

    settings = load(Path("/etc/cptjob-operator/settings.yaml"))

Strict: a misspelt field or a value out of bounds ends the start with its line and what to do. A
change needs a new start, which leaves accepted jobs as they are: see `profile.py`.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from cptjob_api.faults import explain
from cptjob_api.fields import show
from cptjob_api.job import GROUP
from cptjob_api.kubeyaml import documents
from cptjob_api.resolve import JobDefaults
from cptjob_api.rules import Broken
from cptjob_api.spec import EnvVar, LabelValue, ObjectName, Quantity, ResourceName
from cptjob_api.storage import PATTERNS
from cptjob_trainer.config import Seconds, StorageUri, Strict, rule
from cptjob_trainer.errors import Fault, ManifestError, MissingInputError

_NAME = r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]"
LabelKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=317,
        pattern=rf"^([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_NAME}$",
    ),
]
Namespace = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
AnyLabelValue = Annotated[str, Field(max_length=63, pattern=rf"^({_NAME})?$")]
Labels = Annotated[dict[LabelKey, AnyLabelValue], Field(max_length=64)]
Annotations = Annotated[
    dict[LabelKey, Annotated[str, Field(max_length=16_384)]], Field(max_length=64)
]
Quantities = Annotated[dict[ResourceName, Quantity], Field(max_length=16)]


def _whole(pattern: str, minimum: int) -> Any:
    """A quantity of whole pieces. A rule below looks at it, as words tell more than a pattern."""
    form: dict[str, JsonValue] = {"pattern": pattern, "minimum": minimum, "maxLength": 32}
    return Field(json_schema_extra={"quantity": {"type": ["integer", "string"], **form}})


# Both stay below 2^63, where Kubernetes stops counting.
SIZE = r"^([1-9][0-9]{0,17}|[1-9][0-9]{0,8}(k|M|G|Ki|Mi|Gi)|[1-9][0-9]{0,5}(T|Ti))$"
COUNT = r"^[0-9]{1,18}$"
Size = Annotated[Quantity, _whole(SIZE, minimum=1)]
Counts = Annotated[
    dict[ResourceName, Annotated[Quantity, _whole(COUNT, minimum=0)]], Field(max_length=16)
]
_FOLDER = r"([^./][^/]*|[.][.][^/]+|[.][^./][^/]*|[.])?"  # anything but ..
#: Where a job may write.
OUTPUT = rf"{PATTERNS['pvc'].removesuffix('(/.*)?$')}(/{_FOLDER})*$"
UserId = Annotated[int, Field(ge=1, le=2_147_483_647)]
Security = Literal["restricted", "baseline"]

#: Label of a node that says which pool it is in.
POOL_LABEL = f"{GROUP}/pool"


class Toleration(Strict):
    """A taint that pods of a pool tolerate."""

    key: LabelKey = Field(description="Key of the taint.")
    operator: Literal["Exists", "Equal"] = Field(
        default="Exists", description="Whether any value will do, or an equal one."
    )
    value: AnyLabelValue = Field(default="", description="Value of the taint, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint.", json_schema_extra=rule("any")
    )


class PoolSecurity(Strict):
    """What the pods of a pool may do."""

    profile: Security = Field(
        default="restricted",
        description="Pod Security standard that the pods keep to, in `namespaces`; elsewhere they "
        "keep to restricted.",
    )
    namespaces: Annotated[tuple[Namespace, ...], Field(max_length=1000)] = Field(
        default=(), description="Namespaces whose jobs get `profile` when it is not restricted."
    )


class Pool(Strict):
    """A pool of nodes, and what pods on them need."""

    label_key: LabelKey = Field(
        default=POOL_LABEL,
        description="Label that the pool's nodes carry. Where kubelets are not trusted, take one "
        "under node-restriction.kubernetes.io/.",
    )
    label_value: LabelValue | None = Field(
        default=None,
        description="Value of that label.",
        json_schema_extra=rule("the pool's name"),
    )
    gpu_resource: Annotated[ResourceName, Field(min_length=1)] | None = Field(
        default=None,
        description="Resource name of the pool's GPUs.",
        json_schema_extra=rule("that of the jobs' defaults"),
    )
    product_label_key: LabelKey = Field(
        default="nvidia.com/gpu.product",
        description="Label of a node that names its GPU product.",
    )
    gpu_products: Annotated[tuple[LabelValue, ...], Field(max_length=64)] = Field(
        default=(), description="GPU products that jobs may use here; empty allows any."
    )
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = Field(
        default=(), description="Taints of the pool's nodes."
    )
    node_selector: Labels = Field(
        default={}, description="More labels that a node needs for workers."
    )
    labels: Labels = Field(default={}, description="Labels of the worker pods.")
    annotations: Annotations = Field(default={}, description="Annotations of the worker pods.")
    runtime_class_name: ObjectName | None = Field(
        default=None,
        description="Runtime class of the worker pods.",
        json_schema_extra=rule("the cluster's default"),
    )
    extra_resources: Counts = Field(
        default={}, description="Resources that each worker gets besides, such as RDMA devices."
    )
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64)] = Field(
        default=(), description="Environment of the workers, such as NCCL's; a job's own wins."
    )
    shm_size: Size = Field(
        default="8Gi", description="Most that a pod may keep in /dev/shm; counts as its memory."
    )
    scratch_size: Size = Field(
        default="50Gi", description="Most that a pod may write to /tmp on its node's disk."
    )
    run_as_user: UserId | None = Field(
        default=None,
        description="User that the pods run as.",
        json_schema_extra=rule("the image's own"),
    )
    fs_group: UserId | None = Field(
        default=65_532,
        description="Group that owns mounted volumes where their driver heeds it.",
    )
    security: PoolSecurity = Field(
        default=PoolSecurity(), description="What the pods of the pool may do."
    )


class Jobs(JobDefaults):
    """What the platform decides for jobs that do not say, and what they may say."""

    output_uri: StorageUri | None = Field(
        default=None,
        description="Storage under which each job gets a folder for its results: pvc://CLAIM/path.",
        json_schema_extra={**rule("each job must name one"), "pattern": OUTPUT},
    )
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        default="IfNotPresent", description="When nodes pull the image."
    )
    image_pull_secrets: Annotated[tuple[ObjectName, ...], Field(max_length=8)] = Field(
        default=(), description="Secrets to pull images with, besides those of the job."
    )
    allowed_service_accounts: Annotated[tuple[ObjectName, ...], Field(max_length=100)] = Field(
        default=(),
        description="Service accounts that a job may name, besides the default one.",
    )
    priority_class_name: ObjectName | None = Field(
        default=None,
        description="Priority class of the pods.",
        json_schema_extra=rule("the cluster's default"),
    )
    scheduler_name: ObjectName | None = Field(
        default=None,
        description="Scheduler of the worker pods.",
        json_schema_extra=rule("the cluster's default"),
    )
    toleration_seconds: Annotated[int, Field(ge=0, le=3600)] = Field(
        default=30,
        description="How long pods stay bound to a node that is not ready or not reachable.",
    )
    grace_margin_seconds: Annotated[int, Field(ge=5, le=600)] = Field(
        default=30,
        description="Time that a pod has to end, on top of its time for the last checkpoint.",
    )


class Limits(Strict):
    """Most that one job may ask for."""

    max_nodes: Annotated[int, Field(ge=1, le=500)] = Field(
        default=500, description="Worker pods of a job."
    )
    max_checkpoints: Annotated[int, Field(ge=1, le=5000)] = Field(
        default=5000, description="Checkpoints that a job keeps."
    )
    max_uncounted_restarts: Annotated[int, Field(ge=0, le=100_000)] = Field(
        default=100,
        description="Restarts for which a job is not to blame, such as drained nodes, before it "
        "fails all the same.",
    )


class Coordinator(Strict):
    """The small pod that prepares a job's data and serves its progress."""

    requests: Quantities = Field(
        default={"cpu": "500m", "memory": "1Gi"}, description="What a node must have free."
    )
    limits: Quantities = Field(default={"memory": "8Gi"}, description="Most that it may use.")


class Backoff(Strict):
    """Waiting between restarts."""

    base_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=10.0, description="First pause; each further one is twice as long."
    )
    cap_seconds: Annotated[float, Field(gt=0, le=86_400)] = Field(
        default=600.0, description="Longest pause."
    )


class Writes(Strict):
    """How fast the operator may write to the API server."""

    per_second: Annotated[float, Field(gt=0, le=10_000)] = Field(
        default=400.0, description="Writes in a second, over a longer time."
    )
    burst: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=800, description="Writes at once after a quiet time."
    )


class Timing(Strict):
    """When the operator does what nobody asked it for."""

    resync_seconds: Seconds = Field(
        default=300, description="Time between two full lists of everything that is watched."
    )
    progress_seconds: Seconds = Field(
        default=30, description="Shortest time between two writes of a job's progress."
    )
    status_seconds: Annotated[float, Field(ge=0, le=60)] = Field(
        default=1.0,
        description="How long news of a job may wait for more of them, before they are written "
        "into its status at once.",
    )
    broken_start_seconds: Seconds = Field(
        default=120,
        description="Time that pods may wait for an image, a secret or a mount that fails before "
        "they give back what they hold.",
    )
    backoff: Backoff = Field(default=Backoff(), description="Waiting between restarts.")
    writes: Writes = Field(
        default=Writes(), description="How fast the operator may write to the API server."
    )


class Leader(Strict):
    """The lease that says which operator acts."""

    name: ObjectName = Field(default="cptjob-operator", description="Name of the Lease.")
    lease_seconds: Annotated[int, Field(ge=2, le=600)] = Field(
        default=15, description="Time after which a silent leader is replaced."
    )
    renew_seconds: Annotated[float, Field(gt=0, le=300)] = Field(
        default=5.0, description="Time between two renewals; well below leaseSeconds."
    )


class Network(Strict):
    """Who may reach the pods of a job besides themselves."""

    operator_namespace: Namespace = Field(
        default="cptjob-system", description="Namespace of the operator."
    )
    operator_labels: Labels = Field(
        default={"app.kubernetes.io/name": "cptjob-operator"},
        min_length=1,
        description="Labels of the operator's pods.",
    )
    monitoring_namespace: Namespace | None = Field(
        default="monitoring",
        description="Namespace whose pods may read the metrics of jobs.",
        json_schema_extra=rule("none"),
    )


Port = Annotated[int, Field(ge=1, le=65_535)]


class Serving(Strict):
    """What the operator itself serves and logs."""

    metrics_port: Port = Field(default=9400, description="Port of /metrics.")
    probe_port: Port = Field(default=9401, description="Port of /healthz and /readyz.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="What is logged."
    )


class Settings(Strict):
    """Everything that the platform decides."""

    watched_namespaces: Annotated[tuple[Namespace, ...], Field(max_length=1000)] = Field(
        default=(),
        description="Namespaces whose jobs are looked after; empty is all.",
        json_schema_extra={"uniqueItems": True},
    )
    jobs: Jobs = Field(
        default=Jobs(), description="What is decided for jobs that do not say, and what they may."
    )
    pools: Annotated[dict[LabelValue, Pool], Field(min_length=1, max_length=200)] = Field(
        default={"default": Pool()}, description="Pools of nodes, by name."
    )
    limits: Limits = Field(default=Limits(), description="Most that one job may ask for.")
    coordinator: Coordinator = Field(
        default=Coordinator(),
        description="The small pod that prepares a job's data and serves its progress.",
    )
    timing: Timing = Field(
        default=Timing(), description="When the operator does what nobody asked it for."
    )
    leader: Leader = Field(default=Leader(), description="The lease that says which operator acts.")
    network: Network = Field(
        default=Network(), description="Who may reach the pods of a job besides themselves."
    )
    serving: Serving = Field(
        default=Serving(), description="What the operator itself serves and logs."
    )

    @property
    def default_pool(self) -> str | None:
        """The pool of a job that names none; None where it must name one."""
        return self.jobs.pool or (next(iter(self.pools)) if len(self.pools) == 1 else None)

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        found = list(_broken(self))
        if found:
            text = "; ".join(f"{show(each.path)}: {each.message}" for each in found)
            raise PydanticCustomError("rules", "{text}", {"text": text, "broken": found})
        return self


def _broken(settings: Settings) -> Iterator[Broken]:
    """Every rule that does not hold."""
    for each in RULES:
        yield from each(settings)


def _default_pool(settings: Settings) -> Iterator[Broken]:
    name = settings.jobs.pool
    if name is not None and name not in settings.pools:
        known = ", ".join(settings.pools)
        yield Broken(("jobs", "pool"), f"there is no pool {name}; pools: {known}")


def _default_output(settings: Settings) -> Iterator[Broken]:
    uri = settings.jobs.output_uri
    if uri is not None and not re.fullmatch(OUTPUT, uri):
        yield Broken(
            ("jobs", "outputUri"),
            f"write pvc://CLAIM/path, without '..' in it, and not {uri}; nothing else can be "
            "written to on a cluster yet",
        )


def _values_of_tolerations(settings: Settings) -> Iterator[Broken]:
    for name, pool in settings.pools.items():
        for index, each in enumerate(pool.tolerations):
            if each.value and each.operator == "Exists":
                yield Broken(
                    ("pools", name, "tolerations", index, "value"),
                    "goes with operator: Equal; set it or leave it out",
                )


def _extra_resources(settings: Settings) -> Iterator[Broken]:
    for name, pool in settings.pools.items():
        for resource, quantity in pool.extra_resources.items():
            if not re.fullmatch(COUNT, quantity):
                yield Broken(
                    ("pools", name, "extraResources", resource),
                    f"must be a whole number, not {quantity}",
                )


def _sizes(settings: Settings) -> Iterator[Broken]:
    for name, pool in settings.pools.items():
        for field, size in (("shmSize", pool.shm_size), ("scratchSize", pool.scratch_size)):
            if not re.fullmatch(SIZE, size):
                yield Broken(
                    ("pools", name, field),
                    f"must be a number of bytes such as 1536Mi, not {size}",
                )


def _security(settings: Settings) -> Iterator[Broken]:
    for name, pool in settings.pools.items():
        if pool.security.profile != "restricted" and not pool.security.namespaces:
            yield Broken(
                ("pools", name, "security", "namespaces"),
                f"name those whose jobs get {pool.security.profile}; without any, none does",
            )


def _lease(settings: Settings) -> Iterator[Broken]:
    if settings.leader.renew_seconds * 2 > settings.leader.lease_seconds:
        yield Broken(("leader", "renewSeconds"), "must be at most half of leaseSeconds")


def _backoff(settings: Settings) -> Iterator[Broken]:
    if settings.timing.backoff.cap_seconds < settings.timing.backoff.base_seconds:
        yield Broken(("timing", "backoff", "capSeconds"), "must be at least baseSeconds")


#: What the types alone do not say. The chart refuses the same: by its schema, or in its _checks.tpl.
RULES: tuple[Callable[[Settings], Iterator[Broken]], ...] = (
    _default_pool,
    _default_output,
    _values_of_tolerations,
    _extra_resources,
    _sizes,
    _security,
    _lease,
    _backoff,
)


def load(path: Path) -> Settings:
    """Read the settings. Raises MissingInputError, or ManifestError with every fault's line."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(faults=[Fault(str(path), 0, "not UTF-8 text")]) from error
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(text, str(path))


def parse(text: str, file: str = "settings") -> Settings:
    """Settings from YAML; `file` is its name in messages. An empty file means all defaults."""
    found = list(documents(text, file))
    if len(found) > 1:
        raise ManifestError(faults=[Fault(file, found[1].line, "one document is enough")])
    if not found:
        return Settings()
    document = found[0]
    try:
        return Settings.from_json(json.dumps(document.value))
    except ValidationError as error:
        faults = [
            Fault(file, document.line_of(each.path), _told(each))
            for each in explain(error, Settings)
        ]
        raise ManifestError(faults=sorted(faults, key=lambda fault: fault.line)) from error


def _told(broken: Broken) -> str:
    place = show(broken.path)
    return f"{place}: {broken.message}" if place else broken.message
