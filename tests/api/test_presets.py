"""What the model decides, decided beside the model: by the client, or by the pods of a job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptjob_api.facts import ModelFacts
from cptjob_api.job import CPTJob
from cptjob_api.resolve import Resolved, accepted_config, resolve, trainer_config
from cptjob_trainer.config import AcceptedConfig, Processes, TrainerConfig, digest
from cptjob_trainer.errors import ConfigError
from cptjob_trainer.model import presets

MakeJob = Callable[..., dict[str, Any]]

JOBS: dict[str, dict[str, Any]] = {
    "nothing is given": {},
    "the length is given": {"spec.training.maxLength": 128},
    "the batch of a device is given": {"spec.training.batchSizePerDevice": 3},
    "the batch is given": {"spec.training.globalBatchSize": 100},
    "all is given": {
        "spec.training": {"maxLength": 64, "batchSizePerDevice": 2, "globalBatchSize": 4}
    },
    "adapters": {"spec.training.method": "LoRA"},
    "many nodes": {"spec.trainer": {"numNodes": 4, "numProcPerNode": 8}},
}
POSITIONS = (None, 256, 512, 100_000)


def build(document: dict[str, Any]) -> CPTJob:
    return CPTJob.from_json(json.dumps(document))


def accepted(job: CPTJob, resolved: Resolved) -> AcceptedConfig:
    """As a cluster has it: paths of the pods, the manifest's processes."""
    return accepted_config(
        job,
        resolved,
        uid="1",
        output=Path("/volumes/out"),
        locate=lambda uri: Path("/volumes", uri),
    )


def local(job: CPTJob, facts: ModelFacts) -> TrainerConfig:
    """As one machine has it: its own paths, and the processes that it can run."""
    return trainer_config(
        job,
        resolve(job, facts),
        uid="2",
        output=Path("/home/out"),
        locate=lambda uri: Path("/home", uri),
        processes=Processes(num_nodes=1, num_proc_per_node=2),
    )


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_a_job_makes_the_same_on_a_cluster_as_on_one_machine(
    changes: dict[str, Any], positions: int | None, job: MakeJob
) -> None:
    made = build(job(changes))
    on_cluster = presets.complete(accepted(made, resolve(made)), positions)
    on_one = local(made, ModelFacts(max_positions=positions))
    assert on_cluster.training == on_one.training
    assert digest(on_cluster, "model", "data") == digest(on_one, "model", "data")


def test_what_only_the_model_can_tell_is_left_open(job: MakeJob) -> None:
    resolved = resolve(build(job()))
    assert (resolved.max_length, resolved.batch_size_per_device) == (None, None)
    assert resolved.global_batch_size is None
    assert resolved.learning_rate == 2e-5


def test_what_can_be_told_without_the_model_is_not_left_open(job: MakeJob) -> None:
    resolved = resolve(
        build(job({"spec.training.batchSizePerDevice": 3, "spec.trainer.numNodes": 2}))
    )
    assert (resolved.max_length, resolved.global_batch_size) == (None, 6)


def test_a_batch_is_that_of_acceptance_however_many_nodes_there_are_now(job: MakeJob) -> None:
    made = build(job({"spec.trainer.numNodes": 4}))
    config = presets.complete(accepted(made, resolve(made)), 512)
    assert config.training.global_batch_size == 32
    resized = config.model_copy(update={"processes": Processes(num_nodes=2)})
    assert presets.complete(resized, 512).training.global_batch_size == 32


def test_what_is_decided_stays(job: MakeJob) -> None:
    config = local(build(job()), ModelFacts(max_positions=512))
    assert presets.complete(config, None) == config


def test_the_digest_of_a_configuration_is_what_it_was(job: MakeJob) -> None:
    config = local(build(job()), ModelFacts(max_positions=512))
    assert digest(config, "model", "data") == "b047d8b9192ab6524b44e5181be7e607"


def test_a_row_longer_than_the_positions_is_refused_beside_the_model(job: MakeJob) -> None:
    made = build(job({"spec.training.maxLength": 1024}))
    with pytest.raises(
        ConfigError, match=r"maxLength: 1024 is more than the model's 512 positions"
    ):
        presets.complete(accepted(made, resolve(made)), 512)


def test_a_configuration_is_completed_by_the_model_that_it_names(
    job: MakeJob, tmp_path: Path
) -> None:
    made = build(job())
    open_config = accepted_config(
        made, resolve(made), uid="1", output=tmp_path / "out", locate=lambda _: tmp_path
    )
    file = tmp_path / "trainer.json"
    open_config.dump(file)
    (tmp_path / "config.json").write_text('{"n_positions": 128}')
    assert presets.load(file).training.max_length == 128


@pytest.mark.parametrize("text", [None, "{", "[]", '{"n_positions": "many"}'])
def test_a_model_that_says_nothing_of_positions_has_no_limit(
    text: str | None, job: MakeJob, tmp_path: Path
) -> None:
    made = build(job())
    file = tmp_path / "trainer.json"
    accepted_config(
        made, resolve(made), uid="1", output=tmp_path / "out", locate=lambda _: tmp_path
    ).dump(file)
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert presets.load(file).training.max_length == 2048
