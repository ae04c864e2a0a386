"""The configuration of a small job, for the benchmarks that prepare or train. Imported by them."""

from pathlib import Path
from typing import Any

from cptjob_trainer.config import (
    DatasetInput,
    ModelInput,
    Paths,
    ResolvedSchedule,
    ResolvedTraining,
    TrainerConfig,
)


def make(
    model: Path,
    data: Path,
    paths: Paths,
    length: int,
    batch: int,
    *,
    compile: Any = "Never",
    **training: Any,
) -> TrainerConfig:
    """One data set, and steps of `batch` rows of `length` tokens that are trained at once."""
    settings: dict[str, Any] = {
        "epochs": 1,
        "max_length": length,
        "batch_size_per_device": batch,
        "global_batch_size": batch,
        "learning_rate": 1e-4,
        "schedule": ResolvedSchedule(min_learning_rate=1e-5),
    }
    return TrainerConfig(
        name="bench",
        uid="bench",
        model=ModelInput(uri="file://model", path=model),
        datasets=(DatasetInput(name="data", uri="file://data", path=data),),
        training=ResolvedTraining(**(settings | training)),
        paths=paths,
        compile=compile,
    )
