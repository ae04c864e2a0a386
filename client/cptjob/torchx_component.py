"""The torchx component `cptjob.train`: a manifest as an application, for `torchx run -s cptjob`."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchx.specs import AppDef, Role

from cptjob import jobs
from cptjob.logs import ROLES
from cptjob_api.fields import show
from cptjob_api.job import CPTJob
from cptjob_api.manifest import read_job
from cptjob_trainer.errors import ConfigError, CPTJobError

#: The key of an application's metadata that has the manifest's text.
MANIFEST = "cptjob.manifest"

# What other schedulers find to run.
_ELSEWHERE = (
    "raise SystemExit('cptjob.train is for `torchx run -s cptjob`; `cptjob run FILE` trains here')"
)


class TorchxError(SystemExit):
    """Ends torchx's commands with a message, where every other error ends them with a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = "\n".join(f"error: {line}" for line in message.splitlines())


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns what is foreseen to go wrong into a TorchxError."""
    try:
        yield
    except CPTJobError as error:
        raise TorchxError(str(error)) from None


def train(manifest: str, name: str = "", nodes: int = 0) -> AppDef:
    """Continue the pre-training of a model on a cluster, as a CPTJob's manifest says.

    Args:
        manifest: file of the job
        name: of the job; left out, the manifest's
        nodes: number of workers; left out, the manifest's
    """
    with told():
        file, job = jobs.read(Path(manifest))
        for note in file.notes:
            logging.getLogger(__name__).info("note: %s", note)
        job = _changed(job, name, nodes)
    return AppDef(name=job.metadata.name, roles=roles(job), metadata={MANIFEST: job.yaml()})


def roles(job: CPTJob) -> list[Role]:
    """What torchx asks after: whose logs there are, and of how many. The operator decides the rest."""
    sizes = dict(zip(ROLES, (1, job.spec.trainer.num_nodes), strict=True))
    return [
        Role(
            name=name,
            image=job.spec.trainer.image or "",
            entrypoint=sys.executable,
            args=["-c", _ELSEWHERE],
            num_replicas=size,
        )
        for name, size in sizes.items()
    ]


def _changed(job: CPTJob, name: str, nodes: int) -> CPTJob:
    """The job with what is given in place of its own. Raises ConfigError."""
    document: dict[str, Any] = job.manifest()
    if name:
        document["metadata"]["name"] = name
    if nodes:
        document["spec"].setdefault("trainer", {})["numNodes"] = nodes
    made, broken = read_job(document)
    if made is None:
        raise ConfigError("\n".join(f"{show(each.path)}: {each.message}" for each in broken))
    return made
