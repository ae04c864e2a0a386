"""Whether a job may write its output where it is told to: nothing of others is overwritten there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cptjob_trainer.checkpoint.checkpoint_manifest import FORMAT, MANIFEST
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.errors import ConfigError

# What a run writes in its output and another run replaces.
_WRITTEN: Final = (
    "adapter",
    "checkpoints",
    "logs",
    "manifest.json",
    "metrics.jsonl",
    "model",
    "prepared",
    "report.html",
    "tensorboard",
)
# Of these, what a run replaces: its result, and what it logs before. To other folders it only adds.
_RESULT: Final = ("adapter", "manifest.json", "model", "report.html")
_LOG: Final = "metrics.jsonl"


def check(config: TrainerConfig) -> None:
    """Refuse an output among the job's inputs, and one that holds what no run has made.

    Nothing is written. Raises ConfigError.
    """
    _check_apart(config)
    output = config.paths.output
    taken = [name for name in (*_RESULT, _LOG) if _is_there(output / name)]
    if not taken or _has_saved(output) or (taken == [_LOG] and _has_prepared(output)):
        return
    raise ConfigError(
        f"{output / taken[0]} is there, and no cptjob run has made it; a run would replace it: give "
        "another output, or move it away"
    )


def _check_apart(config: TrainerConfig) -> None:
    """Refuse an output within an input, and an input where the output is written. ConfigError."""
    output = config.paths.output.resolve()
    for what, path in _inputs(config):
        place = path.resolve()
        if output.is_relative_to(place):
            raise ConfigError(
                f"{config.paths.output}: the output lies in {what}, {path}; give an output beside it"
            )
        below = place.relative_to(output).parts if place.is_relative_to(output) else ()
        if below and below[0] in _WRITTEN:
            raise ConfigError(
                f"{config.paths.output}: the output's {below[0]} would replace {what}, {path}; give "
                "another output"
            )


def _inputs(config: TrainerConfig) -> Iterator[tuple[str, Path]]:
    yield "the base model", config.model.path
    for dataset in (*config.datasets, *config.validation.datasets):
        yield f"the data set {dataset.name}", dataset.path


def _is_there(path: Path) -> bool:
    """An empty folder holds nothing that could be lost."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return path.is_symlink() or path.exists()


def _has_saved(output: Path) -> bool:
    """Whether a run is finished here, or has saved: each saves before it replaces a result.

    One that dies while it does that leaves no manifest of the result.
    """
    if {"digest", "files"} <= _json(output / "manifest.json").keys():
        return True
    saved = map(_json, output.glob(f"checkpoints/step-*/{MANIFEST}"))
    return any(manifest.get("format") == FORMAT for manifest in saved)


def _has_prepared(output: Path) -> bool:
    prepared = map(_json, output.glob("prepared/*/prepared.json"))
    return any("dataFingerprint" in said for said in prepared)


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing when it is not a JSON object, or not there."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
