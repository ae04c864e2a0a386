"""Writes a checkpoint as a model directory: `python -m cptjob_trainer.results.export --config C --step N`."""

import argparse
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cptjob_trainer import lifeline, termination
from cptjob_trainer.checkpoint import checkpoint_folder, lineage
from cptjob_trainer.checkpoint.checkpoint_manifest import faults, read_manifest
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.errors import (
    CheckpointError,
    DataError,
    MismatchError,
    MissingInputError,
    OutputError,
)
from cptjob_trainer.model import modeldir, presets


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process as its error says."""
    parser = argparse.ArgumentParser(prog="cptjob_trainer.results.export", description=__doc__)
    parser.add_argument("--config", required=True, help="AcceptedConfig as JSON")
    parser.add_argument("--step", required=True, type=int, help="step of the checkpoint")
    parser.add_argument("--to", required=True, type=Path, help="directory to make")
    options = parser.parse_args(arguments)
    lifeline.follow_parent(signal.SIGTERM)
    with termination.guard():
        _export(presets.load(options.config), options.step, options.to)


def _export(config: TrainerConfig, step: int, target: Path) -> None:
    checkpoint = find(config.paths.output / "checkpoints", step)
    check_run(checkpoint, config)
    check_target(target)
    manifest = read_whole(checkpoint)

    # These import torch: what is at fault is said before.
    import transformers

    from cptjob_trainer.results import output

    transformers.utils.logging.disable_progress_bar()  # loading is not what a person waits for
    lora = config.training.lora if config.training.method == "LoRA" else None
    published = output.export(
        checkpoint,
        manifest,
        config.model.path,
        target,
        lora_scale=None if lora is None else lora.alpha / lora.rank,
    )
    print(f"the model of step {step} is in {published.path}")


def find(checkpoints: Path, step: int) -> Path:
    """The directory of the checkpoint of `step`, the newest of them. Raises MissingInputError
    where there is none, DataError where it is broken.
    """
    if not checkpoints.is_dir():
        raise MissingInputError(
            f"{checkpoints}: there is no such folder; give the --output of a run that has saved"
        )
    try:
        scan = checkpoint_folder.scan(checkpoints)
    except CheckpointError as error:
        raise DataError(f"{checkpoints}: {error}") from error
    stored = sorted(scan.counted, key=lambda each: each.order)
    if found := [each.path for each in stored if each.step == step]:
        return found[-1]
    for path, reason in scan.broken:
        if path.name.startswith(f"step-{step}."):
            raise _broken(path, reason)
    steps = ", ".join(str(each) for each in sorted({each.step for each in stored})) or "none"
    raise MissingInputError(f"{checkpoints} has no checkpoint of step {step}; it has: {steps}")


def check_run(checkpoint: Path, config: TrainerConfig) -> None:
    """Refuse a manifest with another base or adapter than the checkpoint's: its model would be
    neither. Other settings may have changed since. Raises MismatchError.
    """
    stored = checkpoint_folder.read_stored(checkpoint)
    model = modeldir.check_model(config.model.path).fingerprint
    ours = lineage.of_model(config, model)
    theirs = {key: value for key, value in stored.lineage.items() if key in ours}
    if theirs != ours:
        told = checkpoint_folder.mismatch(
            replace(stored, lineage=theirs), ours, lineage.inputs(config)
        )
        raise MismatchError(f"{told}. Export with the manifest of that run")


def read_whole(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as it says. Raises DataError."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        raise _broken(checkpoint, str(error)) from error
    if broken := faults(checkpoint, manifest):
        raise _broken(checkpoint, "; ".join(broken))
    return manifest


def _broken(checkpoint: Path, reason: str) -> DataError:
    return DataError(f"the checkpoint {checkpoint} is broken: {reason}; take another --step")


def check_target(target: Path) -> None:
    """Raises OutputError where `target` exists or cannot be made."""
    try:
        if target.exists():
            raise OutputError(f"{target} exists; remove it, or give another folder with --to")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror}; give another folder with --to"
        ) from error


if __name__ == "__main__":
    main()
