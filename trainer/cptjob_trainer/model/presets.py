"""What a row's length and the batch are when the job does not say: rules about the model.

Whoever sees the model first applies them: the client before a local run, the pods of a job on a
cluster, each by itself and with the same outcome. No torch.
"""

import json
from pathlib import Path

from cptjob_trainer.config import (
    MAX_GLOBAL_BATCH_SIZE,
    AcceptedConfig,
    ResolvedTraining,
    TrainerConfig,
    Training,
)
from cptjob_trainer.errors import ConfigError
from cptjob_trainer.model import model_config
from cptjob_trainer.words import counted

#: Longest row that is chosen for a job; a longer one must be asked for.
LONGEST_ROW = 2048
#: Tokens in one pass of a device that memory is sure to take with the models this is for.
PASS_TOKENS = 16_384
#: Most rows in one pass that are chosen for a job.
MOST_ROWS = 8


def max_length(training: Training, positions: int | None) -> int:
    """The model's positions, at most 2048. `positions` is None where the model has no limit.

    Raises ConfigError for a given length beyond the positions.
    """
    given = training.max_length
    if given is None:
        return min(positions or LONGEST_ROW, LONGEST_ROW)
    if positions is not None and given > positions and training.rope_scaling is None:
        raise ConfigError(
            f"spec.training.maxLength: {given} is more than the model's {positions} positions; "
            f"set it to {positions} or less"
        )
    return given


def batch_size_per_device(length: int) -> int:
    """8, or fewer so that a pass has at most 16384 tokens."""
    return min(MOST_ROWS, max(1, PASS_TOKENS // length))


def global_batch_size(devices: int, rows: int) -> int:
    """`rows` for each device: numNodes × numProcPerNode × batchSizePerDevice.

    Raises ConfigError for more than a step can have.
    """
    batch = devices * rows
    if batch > MAX_GLOBAL_BATCH_SIZE:
        raise ConfigError(
            f"spec.training.batchSizePerDevice: {counted(rows, 'row')} on each of "
            f"{counted(devices, 'device')} make {batch} a step, more than "
            f"{MAX_GLOBAL_BATCH_SIZE}; lower it or give globalBatchSize"
        )
    return batch


def complete(config: AcceptedConfig, positions: int | None) -> TrainerConfig:
    """The configuration with everything decided. What was decided before stays as it is.

    The number of devices is that of acceptance, so that a job that is resized keeps its batch.
    Raises ConfigError as `max_length` and `global_batch_size` do.
    """
    training = config.training
    length = max_length(training, positions)
    rows = training.batch_size_per_device or batch_size_per_device(length)
    batch = training.global_batch_size or global_batch_size(config.processes.world_size, rows)
    decided = {
        "max_length": length,
        "batch_size_per_device": rows,
        "global_batch_size": batch,
    }
    resolved = ResolvedTraining(**dict(training) | decided)
    return TrainerConfig(**dict(config) | {"training": resolved})


def load(path: Path | str) -> TrainerConfig:
    """Read the file that a trainer is told and complete it by the model that it names.

    Raises what `AcceptedConfig.load` and `complete` raise.
    """
    config = AcceptedConfig.load(path)
    return complete(config, _positions(config.model.path))


def _positions(directory: Path) -> int | None:
    """What is not readable here, prepare refuses with all that it knows about broken models."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return model_config.max_positions(config) if isinstance(config, dict) else None
