"""From a manifest on disk to what a trainer is told on this machine."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cptjob.volumes import Volumes
from cptjob_api import resources
from cptjob_api.facts import ModelFacts
from cptjob_api.fields import instances, parts, show
from cptjob_api.job import CPTJob
from cptjob_api.manifest import Manifest, load_manifest
from cptjob_api.resolve import JobDefaults, Resolved, gpus, resolve, trainer_config
from cptjob_api.spec import CPTJobSpec, Model
from cptjob_api.unsupported import unsupported
from cptjob_trainer.config import Processes, TrainerConfig
from cptjob_trainer.errors import ConfigError, DataError, MissingInputError, UsageError
from cptjob_trainer.words import counted


@dataclass(frozen=True)
class LocalJob:
    """A job as it would run here. ``notes`` are for the person: what was passed over."""

    job: CPTJob
    resolved: Resolved
    config: TrainerConfig
    notes: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What the manifest adds to the environment of the processes."""
        return {variable.name: variable.value for variable in self.job.spec.trainer.env}

    @property
    def on_gpus(self) -> bool:
        """Whether the manifest asks for GPUs."""
        return _gpus(self.job) > 0

    @property
    def lacks_gpus(self) -> bool:
        """Whether the manifest asks for GPUs and this machine has none."""
        return self.on_gpus and not any(map(os.path.exists, DRIVERS))


# One of these is there where a GPU can be used: of NVIDIA, AMD, and Windows' subsystem.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def _gpus(job: CPTJob) -> int:
    """GPUs of a worker, by the names that a platform has where it gives none of its own."""
    defaults = JobDefaults()
    return gpus(job, defaults.gpu_resource, defaults.instance_gpus)


def read(path: Path) -> tuple[Manifest, CPTJob]:
    """The only job of a manifest. Raises ConfigError for what cannot be done yet."""
    manifest = load_manifest(path)
    return manifest, check(manifest)


def check(manifest: Manifest) -> CPTJob:
    """Its only job, as `read` has it."""
    job = manifest.job
    faults = [*unsupported(job), *resources.faults(job)]
    if excess := resources.too_many_processes(job, _gpus(job)):
        faults.append(excess)
    if faults:
        raise ConfigError("\n".join(_with_line(manifest, job, text) for text in faults))
    return job


def namespace(job: CPTJob, given: str | None) -> str | None:
    """Where the job goes: what is given, or what its manifest says. Raises UsageError for both."""
    own = job.metadata.namespace
    if given and own and given != own:
        raise UsageError(f"the manifest is for namespace {own}, and not for {given}")
    return given or own


def _with_line(manifest: Manifest, job: CPTJob, text: str) -> str:
    line = manifest.line(job, text.partition(":")[0])
    return f"{manifest.path}:{line}: {text}"


def load(path: Path, output: Path | None, volumes: Volumes, processes: int | None) -> LocalJob:
    """Reads, resolves and places a job. Its inputs must be there."""
    manifest, job = read(path)
    with _lines_of(manifest, job):
        return _load(manifest, job, output, volumes, processes)


@contextmanager
def _lines_of(manifest: Manifest, job: CPTJob) -> Iterator[None]:
    """Puts file and line in front of a message that begins with a field."""
    try:
        yield
    except (ConfigError, MissingInputError) as error:
        if not str(error).startswith("spec."):
            raise
        lines = str(error).splitlines()
        raise type(error)("\n".join(_with_line(manifest, job, line) for line in lines)) from error


def _load(
    manifest: Manifest, job: CPTJob, output: Path | None, volumes: Volumes, processes: int | None
) -> LocalJob:
    spec = job.spec
    check_claims(job, volumes)
    _check_inputs(spec, volumes)
    resolved = resolve(job, _facts(volumes.locate(spec.model.storage_uri)))
    # Whatever runs here, the rows of a step are those that the manifest stands for.
    count = processes or spec.trainer.num_nodes * resolved.num_proc_per_node
    config = trainer_config(
        job,
        resolved,
        uid=job.metadata.uid or local_uid(job.metadata.name),
        output=output_directory(resolved, output, volumes),
        locate=volumes.locate,
        processes=Processes(num_nodes=1, num_proc_per_node=count),
    )
    return LocalJob(job, resolved, config, _notes(manifest, job))


def check_claims(job: CPTJob, volumes: Volumes) -> None:
    """Refuse a --volume for a claim that the manifest does not name. Raises UsageError."""
    uris = [uri for _, uri in _inputs(job.spec)]
    volumes.check_claims([*uris, *filter(None, [job.spec.output.storage_uri])])


def _inputs(spec: CPTJobSpec) -> Iterator[tuple[str, str]]:
    """What is read: each field and its URI."""
    yield "spec.model.storageUri", spec.model.storage_uri
    for index, dataset in enumerate(spec.datasets):
        yield f"spec.datasets[{index}].storageUri", dataset.storage_uri
    for index, held_out in enumerate(spec.validation.datasets):
        yield f"spec.validation.datasets[{index}].storageUri", held_out.storage_uri


def _check_inputs(spec: CPTJobSpec, volumes: Volumes) -> None:
    """Raises MissingInputError with a line for each input that is not there."""
    missing = []
    for field, uri in _inputs(spec):
        try:
            volumes.locate_input(field, uri)
        except MissingInputError as error:
            missing.append(str(error))
    if missing:
        raise MissingInputError("\n".join(missing))


def _facts(model: Path) -> ModelFacts:
    """What is not readable here, prepare refuses with all that it knows about broken models."""
    try:
        return ModelFacts.from_directory(model)
    except (MissingInputError, DataError):
        return ModelFacts()


def output_directory(resolved: Resolved, given: Path | None, volumes: Volumes) -> Path:
    """--output, else the job's folder in the storage that the manifest names."""
    if given is not None:
        return given.expanduser().absolute()
    if resolved.output_uri is None:
        raise ConfigError("spec.output.storageUri: not given; give it, or --output DIR")
    return volumes.locate(resolved.output_uri).absolute()


def local_uid(name: str) -> str:
    """The same for each run of a job, so that the next one continues."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"cptjob:local/{name}"))


# What of `spec` only a cluster heeds: pods, their secrets and places, the operator's deadlines.
CLUSTER_ONLY = (
    "trainer.image",
    "trainer.imagePullSecrets",
    "trainer.secretRefs",
    "trainer.serviceAccountName",
    "scheduling",
    "failurePolicy",
    "startupDeadlineSeconds",
    "ttlSecondsAfterFinished",
    "managedBy",
)


def _passed_over(job: CPTJob) -> list[str]:
    """Fields of CLUSTER_ONLY that a job sets to something else than their default."""
    bare = CPTJobSpec(model=Model(storage_uri="pvc://none"))
    return [
        show(("spec", *path))
        for place in CLUSTER_ONLY
        for path, value in instances(job.spec, parts(place))
        if (path, value) not in list(instances(bare, parts(place)))
    ]


def _notes(manifest: Manifest, job: CPTJob) -> tuple[str, ...]:
    notes = list(manifest.notes)
    passed_over = _passed_over(job)
    if passed_over:
        notes.append(f"a local run passes over what only a cluster heeds: {', '.join(passed_over)}")
    if idle := resources.idle_gpus(job, _gpus(job)):
        notes.append(_with_line(manifest, job, idle))
    if job.spec.suspend:
        notes.append("spec.suspend holds a job back on a cluster only; a local run starts at once")
    if seconds := job.spec.active_deadline_seconds:
        notes.append(
            f"spec.activeDeadlineSeconds ends a job on a cluster only; a local run goes on after "
            f"{counted(seconds, 'second')}, until it is complete or stopped with Ctrl-C"
        )
    return tuple(notes)
