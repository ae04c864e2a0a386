"""What a checkpoint must agree with to be continued, and the refusal of what cannot. No torch."""

from typing import TYPE_CHECKING, Any

from cptjob_trainer.checkpoint import checkpoint_folder, output_folder
from cptjob_trainer.checkpoint.checkpoint_folder import Stored, mismatch
from cptjob_trainer.config import DIVISION, TrainerConfig
from cptjob_trainer.errors import MismatchError
from cptjob_trainer.model import modeldir

if TYPE_CHECKING:
    from cptjob_trainer.data.prepared import Prepared

#: What decides, by method, how the trained tensors are put together.
_ADAPTER = {"Full": (), "LoRA": ("training.lora",)}


def lineage(config: TrainerConfig, prepared: "Prepared") -> dict[str, Any]:
    """All of it, under the names of the checkpoint's manifest."""
    return {
        **_before_preparing(config, prepared.model_fingerprint),
        "data": prepared.data_fingerprint,
        "totalSteps": prepared.total_steps,
    }


def inputs(config: TrainerConfig) -> dict[str, str]:
    """What a person calls the values of a lineage that are fingerprints."""
    data = (*config.datasets, *config.validation.datasets)
    return {
        "model": config.model.uri,
        "data": ", ".join(f"{dataset.name} ({dataset.uri})" for dataset in data),
    }


def refused(theirs: Stored, ours: dict[str, Any], named: dict[str, str]) -> MismatchError:
    """The error that says what differs from a checkpoint, and what to do about it."""
    return MismatchError(
        f"{mismatch(theirs, ours, named)}. Restore the old value, give another output, or set "
        "checkpoint.onMismatch: StartNew to begin anew"
    )


def check_before_preparing(config: TrainerConfig) -> None:
    """Refuse an output that must not be written: one among the inputs, one that holds what no run
    has made, and one with another run's checkpoints, as far as model and settings tell.

    Preparing takes long and leaves files behind. What only the data can tell is found after it.
    Raises ConfigError, and what the model's check and the folder's scan raise.
    """
    output_folder.check(config)
    directory = config.paths.output / "checkpoints"
    if config.checkpoint.on_mismatch != "Refuse" or not directory.is_dir():
        return
    newest = checkpoint_folder.scan(directory).last_written()
    if newest is None:
        return
    known = _before_preparing(config, modeldir.check_model(config.model.path).fingerprint)
    unknown = {key: newest.lineage[key] for key in ("data", "totalSteps") if key in newest.lineage}
    if newest.lineage != known | unknown:
        raise refused(newest, known | unknown, inputs(config))


def of_model(config: TrainerConfig, model_fingerprint: str) -> dict[str, Any]:
    """Those parts without which a checkpoint's tensors make no model: the base and the adapter."""
    every = _before_preparing(config, model_fingerprint)
    names = ["model", "training.method"]
    return {name: every[name] for name in (*names, *_ADAPTER[config.training.method])}


def _before_preparing(config: TrainerConfig, model_fingerprint: str) -> dict[str, Any]:
    training = config.training.model_dump(mode="json", by_alias=True, exclude=set(DIVISION))
    return {
        "model": model_fingerprint,
        **{f"training.{name}": value for name, value in training.items()},
    }
