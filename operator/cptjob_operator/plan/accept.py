"""Accepts a job: everything that it leaves out is decided, or the first fault is told. Pure.

`CHECKS` is the specification, in order: each looks at the same value and knows one kind of fault.
What a person can mend outside of the job (a claim or a node that is missing) is no fault here.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cptjob_api import resources
from cptjob_api.conditions import Reason
from cptjob_api.fields import instances, parts, show
from cptjob_api.job import CPTJob
from cptjob_api.resolve import JobDefaults, Resolved, accepted_config, gpus, resolve
from cptjob_api.spec import CPTJobSpec
from cptjob_api.status import ResolvedStatus
from cptjob_api.storage import Storage, is_storage_uri
from cptjob_api.unsupported import unsupported
from cptjob_operator.profile import POD_GROUP, Profile, freeze, path_of
from cptjob_operator.settings import Pool, Settings
from cptjob_trainer.config import AcceptedConfig, Checkpoint
from cptjob_trainer.errors import ConfigError

#: What a ConfigMap may hold, less room for its own words.
MAX_BYTES = 1_000_000
#: Processes of a worker that the trainer's configuration has room for.
MAX_PROCESSES = 1024

_PART = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_OBJECT_NAME = re.compile(rf"(?=.{{1,253}}$){_PART}(\.{_PART})*")
#: Fields that name objects of the cluster.
_NAMES = (
    "spec.trainer.imagePullSecrets[].name",
    "spec.trainer.secretRefs[].name",
    "spec.trainer.serviceAccountName",
    "spec.scheduling.nodeNames[]",
    "spec.scheduling.priorityClassName",
)
_URIS = (
    "spec.model.storageUri",
    "spec.datasets[].storageUri",
    "spec.validation.datasets[].storageUri",
    "spec.output.storageUri",
)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that can run. `config` leaves open what only the model can decide."""

    resolved: Resolved
    profile: Profile
    config: AcceptedConfig


@dataclass(frozen=True, slots=True)
class Refused:
    """A job that cannot run as it is. The message names the field and says what to do."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Question:
    """What a check may look at."""

    job: CPTJob
    settings: Settings

    @property
    def spec(self) -> CPTJobSpec:
        return self.job.spec

    @cached_property
    def pool_name(self) -> str | None:
        return self.spec.scheduling.pool or self.settings.default_pool

    @cached_property
    def pool(self) -> Pool | None:
        return self.settings.pools.get(self.pool_name or "")

    @cached_property
    def defaults(self) -> JobDefaults:
        """The platform's defaults for a job in this pool."""
        known = {name: getattr(self.settings.jobs, name) for name in JobDefaults.model_fields}
        gpu = self.pool.gpu_resource if self.pool else None
        known["gpu_resource"] = gpu or known["gpu_resource"]
        return JobDefaults.model_construct(**known | {"pool": self.pool_name})

    @cached_property
    def gpus(self) -> int:
        """GPUs of a worker."""
        defaults = self.defaults
        return gpus(self.job, defaults.gpu_resource, defaults.instance_gpus)


# --- the checks -----------------------------------------------------------------------------------


def unfinished(ask: Question) -> Refused | None:
    """What this version cannot do yet."""
    lines = unsupported(ask.job)
    return Refused(Reason.NOT_SUPPORTED, "; ".join(lines)) if lines else None


def limits(ask: Question) -> Refused | None:
    """More than the platform allows one job."""
    policy, most = ask.spec.elastic_policy, ask.settings.limits
    nodes = {"trainer.numNodes": ask.spec.trainer.num_nodes}
    if policy and policy.max_nodes:
        nodes["elasticPolicy.maxNodes"] = policy.max_nodes
    for field, number in nodes.items():
        if number > most.max_nodes:
            return Refused(Reason.LIMIT_EXCEEDED, too_many_nodes(field, number, most.max_nodes))
    message = too_many_checkpoints(ask.spec.checkpoint, None, ask.settings)
    return Refused(Reason.LIMIT_EXCEEDED, message) if message else None


def pool(ask: Question) -> Refused | None:
    """A pool must be named, and known."""
    known = ", ".join(ask.settings.pools)
    if ask.pool_name is None:
        return _invalid(f"spec.scheduling.pool: name a pool of nodes; there are {known}")
    if ask.pool is None:
        return _invalid(f"spec.scheduling.pool: there is no pool {ask.pool_name}; pools: {known}")
    return None


def products(ask: Question) -> Refused | None:
    """GPU products must be among those of the pool."""
    allowed = ask.pool.gpu_products if ask.pool else ()
    for index, product in enumerate(ask.spec.scheduling.gpu_types):
        if allowed and product not in allowed:
            return _invalid(
                f"spec.scheduling.gpuTypes[{index}]: pool {ask.pool_name} has no {product}; it has "
                f"{', '.join(allowed)}"
            )
    return None


def service_account(ask: Question) -> Refused | None:
    """A job may not take just any service account of its namespace."""
    jobs = ask.settings.jobs
    name = ask.spec.trainer.service_account_name
    allowed = dict.fromkeys((jobs.service_account_name, *jobs.allowed_service_accounts))
    if name is None or name in allowed:
        return None
    return _invalid(
        f"spec.trainer.serviceAccountName: {name} is not allowed on this platform; use one of "
        f"{', '.join(allowed)} or leave it out"
    )


def storage(ask: Question) -> Refused | None:
    """Everything must lie on volumes, and the output somewhere."""
    for path, uri in _values(ask.job, _URIS):
        message = _fault_of_uri(uri)
        if message:
            return _invalid(f"{path}: {message}")
    if ask.spec.output.storage_uri or ask.defaults.output_uri:
        return None
    return _invalid(
        "spec.output.storageUri: not given, and this platform has no output storage for jobs; "
        "write pvc://CLAIM/path"
    )


def names(ask: Question) -> Refused | None:
    """Names that no object of a cluster can have."""
    for path, name in _values(ask.job, _NAMES):
        if not _OBJECT_NAME.fullmatch(name):
            return _invalid(
                f"{path}: no object can be named {name}; names are lower-case letters, digits, "
                "'-' and '.', and each part begins and ends with a letter or digit"
            )
    group = ask.job.metadata.annotations.get(POD_GROUP, "a")
    if not _OBJECT_NAME.fullmatch(group):
        return _invalid(f"metadata.annotations.{POD_GROUP}: no object can be named {group!r}")
    image = ask.spec.trainer.image or ""
    if re.search(r"\s", image):
        return _invalid(f"spec.trainer.image: {image!r} has a space in it; take it away")
    return None


def amounts(ask: Question) -> Refused | None:
    """Resources that the API server would refuse."""
    fault = next(resources.faults(ask.job), None)
    return _invalid(fault) if fault else None


def processes(ask: Question) -> Refused | None:
    """A process uses one GPU."""
    gpus = ask.gpus
    if gpus > MAX_PROCESSES:
        return _invalid(
            f"{resources.FIELD}: a worker with {gpus} GPUs is more than {MAX_PROCESSES} processes "
            "can use; ask for fewer"
        )
    fault = resources.too_many_processes(ask.job, gpus)
    return _invalid(fault) if fault else None


Check = Callable[[Question], Refused | None]

CHECKS: tuple[Check, ...] = (
    unfinished,
    limits,
    pool,
    products,
    service_account,
    storage,
    names,
    amounts,
    processes,
)


def accept(job: CPTJob, settings: Settings) -> Accepted | Refused:
    """Decide everything about a job that it leaves out, or say what is wrong with it.

    Never raises on a job that the API server accepts.
    """
    ask = Question(job, settings)
    for check in CHECKS:
        refused = check(ask)
        if refused is not None:
            return refused
    try:
        resolved = resolve(job, None, ask.defaults)
    except ConfigError as error:
        return _invalid(str(error))
    accepted = Accepted(resolved, freeze(job, resolved, settings), _config(job, resolved))
    texts = accepted.config.model_dump_json() + accepted.profile.model_dump_json()
    size = len(texts.encode())
    if size > MAX_BYTES:
        return _invalid(
            f"spec: {size} bytes once everything is decided, more than a ConfigMap holds; shorten "
            "trainer.env or training.systemPrompt, or name fewer nodes or data sets"
        )
    return accepted


def accept_again(
    job: CPTJob, before: ResolvedStatus, num_nodes: int | None, settings: Settings
) -> Accepted | Refused:
    """The same for a job that was accepted before and whose configuration was lost.

    What was decided stands and no limit counts again; the rest is as the settings are now.
    num_nodes: workers that the job is known to be allowed. Refused: what has to come back first.
    """
    decided = {name: getattr(before, name) for name in Resolved.model_fields}
    known = {name: value for name, value in decided.items() if value is not None}
    try:
        resolved = Resolved(**dict(resolve(job, None, Question(job, settings).defaults)) | known)
    except ConfigError as error:
        return _invalid(str(error))
    if resolved.pool not in settings.pools:
        return Refused(
            Reason.WAITING_FOR_POOL,
            f"the job's ConfigMap is gone, and so is pool {resolved.pool} from the platform's "
            f"settings; put it back, or make the job anew in another of {', '.join(settings.pools)}",
        )
    profile = freeze(job, resolved, settings).model_copy(update={"num_nodes": num_nodes})
    return Accepted(resolved, profile, _config(job, resolved))


def too_many_nodes(field: str, number: int, most: int) -> str:
    """What to say when a field of the spec asks for more nodes than a job may have."""
    return (
        f"spec.{field}: {number} nodes are more than this platform allows a job; set it to {most} "
        "or less"
    )


def too_many_checkpoints(
    checkpoint: Checkpoint, total_steps: int | None, settings: Settings
) -> str | None:
    """What to say when a job keeps more checkpoints than allowed; None when it does not.

    total_steps: None before the data is prepared; then only `keepLast` can tell.
    """
    most = settings.limits.max_checkpoints
    if checkpoint.keep_last is not None:
        if checkpoint.keep_last <= most:
            return None
        return (
            f"spec.checkpoint.keepLast: {checkpoint.keep_last} checkpoints are more than this "
            f"platform allows a job; set it to {most} or less"
        )
    made = -(-total_steps // checkpoint.every_steps) if total_steps else 0
    if made <= most:
        return None
    return (
        f"spec.checkpoint: a checkpoint every {checkpoint.every_steps} of {total_steps} steps makes "
        f"{made}, and this platform allows a job to keep {most}; set keepLast or raise everySteps"
    )


def _config(job: CPTJob, resolved: Resolved) -> AcceptedConfig:
    return accepted_config(
        job,
        resolved,
        uid=job.metadata.uid or "",
        output=Path(path_of(resolved.output_uri or "")),
        locate=lambda uri: Path(path_of(uri)),
    )


def _invalid(message: str) -> Refused:
    return Refused(Reason.INVALID_SPEC, message)


def _values(job: CPTJob, places: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The values at these places, each with its path."""
    for place in places:
        for path, value in instances(job, parts(place)):
            yield show(path), value


def _fault_of_uri(uri: str) -> str | None:
    if not is_storage_uri(uri):
        return f"{uri!r} is no storage URI; write pvc://CLAIM/path"
    place = Storage.parse(uri)
    if place.scheme != "pvc":
        return (
            f"{place.scheme}:// is not to be had on a cluster; put it on a volume and write "
            "pvc://CLAIM/path"
        )
    if not _OBJECT_NAME.fullmatch(place.place):
        return f"no volume claim can be named {place.place}; write pvc://CLAIM/path"
    return None
