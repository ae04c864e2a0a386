"""What the types accept and the trainer cannot do yet.

A field that is accepted and ignored would be a lie, so each of these is refused with its reason,
and the definition and the field reference say so. Whoever teaches the trainer one of them deletes
its line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cptjob_api.fields import instances, parts, show
from cptjob_api.job import CPTJob
from cptjob_api.storage import Storage, is_storage_uri
from cptjob_trainer.config import HangDetection


@dataclass(frozen=True)
class Missing:
    """A field, the values of it that cannot be done, and what to do instead.

    values: those values in a few words; "" for any.
    """

    field: str
    refused: Callable[[Any], bool]
    reason: str
    values: str = ""

    @property
    def mark(self) -> str:
        """What the field's description says of it."""
        return f"Not supported yet: {self.values}." if self.values else "Not supported yet."


def _not(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


def _remote(uri: str) -> bool:
    return is_storage_uri(uri) and Storage.parse(uri).scheme in ("s3", "hf")


def _any(value: Any) -> bool:
    return True


_COPY = "s3:// and hf:// cannot be read yet; copy it to a volume and write pvc://CLAIM/path"
_WRITE = "s3:// cannot be written yet; write pvc://CLAIM/path"
_SECRET = "no storage that needs a secret can be read yet; leave it out"
_OTHER_SIZE = "Not supported yet: any other number than numNodes."
_REMOTE = "s3:// and hf://"
_NO_EFFECT = "the default is accepted and has no effect"
_HANGS = "hung processes are not watched for yet; leave it out"

MISSING: tuple[Missing, ...] = (
    Missing("spec.task", _not("CausalLM"), "only CausalLM can be trained yet", "all but CausalLM"),
    Missing("spec.model.storageUri", _remote, _COPY, _REMOTE),
    Missing("spec.datasets[].storageUri", _remote, _COPY, _REMOTE),
    Missing("spec.validation.datasets[].storageUri", _remote, _COPY, _REMOTE),
    Missing("spec.output.storageUri", _remote, _WRITE, "s3://"),
    Missing("spec.model.secretRef", _any, _SECRET),
    Missing("spec.datasets[].secretRef", _any, _SECRET),
    Missing("spec.validation.datasets[].secretRef", _any, _SECRET),
    Missing(
        "spec.data.deduplicate",
        _not("None"),
        "documents cannot be deduplicated yet; do it beforehand and leave this out",
        "all but None",
    ),
    Missing(
        "spec.training.sifting.mode",
        _not("None"),
        "samples cannot be sifted yet; leave it out",
        "all but None",
    ),
    Missing(
        "spec.training.ropeScaling",
        _any,
        "positions cannot be scaled yet; lower maxLength to the model's positions",
    ),
    Missing("spec.training.guards.spikeFactor", _any, "spikes are not watched yet; leave it out"),
    Missing(
        "spec.training.guards.rollbackAfter", _any, "there is no rolling back yet; leave it out"
    ),
    Missing(
        "spec.hangDetection.startupTimeoutSeconds",
        _not(HangDetection().startup_timeout_seconds),
        _HANGS,
        _NO_EFFECT,
    ),
    Missing(
        "spec.hangDetection.stepTimeoutSeconds",
        _not(HangDetection().step_timeout_seconds),
        _HANGS,
        _NO_EFFECT,
    ),
    Missing(
        "spec.checkpoint.storageUri",
        _any,
        "checkpoints go to the output only; leave it out",
    ),
    Missing(
        "spec.checkpoint.snapshotEverySteps",
        _any,
        "there are no copies in memory yet; lower everySteps instead",
    ),
    Missing("spec.checkpoint.maxBandwidth", _any, "saving cannot be slowed yet; leave it out"),
    Missing("spec.tracking.mlflow", _any, "MLflow is not spoken yet; use TensorBoard"),
)

#: Fields whose values are compared with another field's, by `_elastic`.
_BOUNDS = ("minNodes", "maxNodes")


def marks() -> dict[str, str]:
    """What the description of each field says, by field."""
    bounds = {f"spec.elasticPolicy.{name}": _OTHER_SIZE for name in _BOUNDS}
    return {missing.field: missing.mark for missing in MISSING} | bounds


def unsupported(job: CPTJob) -> list[str]:
    """One line for each thing asked that cannot be done yet; empty when the job can run."""
    found = [
        f"{show(path)}: {missing.reason}"
        for missing in MISSING
        for path, value in instances(job, parts(missing.field))
        if missing.refused(value)
    ]
    return found + _elastic(job)


def _elastic(job: CPTJob) -> list[str]:
    nodes = job.spec.trainer.num_nodes
    return [
        f"{show(path)}: the number of workers cannot move yet; set it to {nodes} or leave it out"
        for name in _BOUNDS
        for path, value in instances(job, ("spec", "elasticPolicy", name))
        if value != nodes
    ]
