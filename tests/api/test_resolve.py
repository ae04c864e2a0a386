"""What is decided for a job that leaves it out."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptjob_api.facts import ModelFacts
from cptjob_api.fields import fields
from cptjob_api.job import CPTJob
from cptjob_api.resolve import RULES, JobDefaults, Resolved, resolve, trainer_config
from cptjob_api.status import ResolvedStatus
from cptjob_api.storage import Storage
from cptjob_trainer.config import Processes, TrainerConfig, Training
from cptjob_trainer.errors import ConfigError, DataError, MissingInputError

MakeJob = Callable[..., dict[str, Any]]
NO_FACTS = ModelFacts()
LLAMA = ModelFacts(model_type="llama", max_positions=8192)
TINY = ModelFacts(model_type="llama", max_positions=512)


def build(document: dict[str, Any]) -> CPTJob:
    return CPTJob.from_json(json.dumps(document))


def _gpus(quantity: str | int) -> dict[str, Any]:
    return {"spec.trainer.resourcesPerNode": {"limits": {"nvidia.com/gpu": quantity}}}


GPUS = _gpus(4)
# The changes to a small job, facts of its model, the field, and what it must be.
TABLE: list[tuple[dict[str, Any], ModelFacts, str, Any]] = [
    ({}, NO_FACTS, "learning_rate", 2e-5),
    ({"spec.training.method": "LoRA"}, NO_FACTS, "learning_rate", 1e-4),
    ({"spec.training.learningRate": 3e-4}, NO_FACTS, "learning_rate", 3e-4),
    ({}, NO_FACTS, "min_learning_rate", 2e-6),
    ({"spec.training.schedule.minLearningRate": 0}, NO_FACTS, "min_learning_rate", 0.0),
    ({}, NO_FACTS, "epochs", 3),
    ({"spec.training.epochs": 1}, NO_FACTS, "epochs", 1),
    ({}, NO_FACTS, "max_length", 2048),
    ({}, LLAMA, "max_length", 2048),
    ({}, TINY, "max_length", 512),
    ({"spec.training.maxLength": 8192}, LLAMA, "max_length", 8192),
    ({}, LLAMA, "batch_size_per_device", 8),
    ({"spec.training.maxLength": 8192}, LLAMA, "batch_size_per_device", 2),
    ({"spec.training.maxLength": 65536}, NO_FACTS, "batch_size_per_device", 1),
    ({"spec.training.batchSizePerDevice": 32}, LLAMA, "batch_size_per_device", 32),
    ({}, LLAMA, "global_batch_size", 8),
    ({"spec.trainer": {"numNodes": 3, "numProcPerNode": 2}}, LLAMA, "global_batch_size", 48),
    ({"spec.training.globalBatchSize": 7}, LLAMA, "global_batch_size", 7),
    ({}, LLAMA, "num_proc_per_node", 1),
    (GPUS, LLAMA, "num_proc_per_node", 4),
    (_gpus("8.0"), LLAMA, "num_proc_per_node", 8),
    (_gpus("1e1"), LLAMA, "num_proc_per_node", 10),
    (_gpus("0") | {"spec.scheduling.instanceType": "p3.8xlarge"}, LLAMA, "num_proc_per_node", 1),
    (GPUS | {"spec.trainer.numProcPerNode": 2}, LLAMA, "num_proc_per_node", 2),
    ({"spec.scheduling.instanceType": "p3dn.24xlarge"}, LLAMA, "num_proc_per_node", 8),
    ({"spec.scheduling.instanceType": "unknown"}, LLAMA, "num_proc_per_node", 1),
    ({}, LLAMA, "lora_rank", None),
    ({"spec.training.method": "LoRA"}, LLAMA, "lora_rank", 16),
    ({"spec.training.method": "LoRA"}, LLAMA, "lora_alpha", 32.0),
    ({"spec.training.method": "LoRA"}, LLAMA, "lora_target_modules", ("all-linear",)),
    (
        {"spec.training": {"method": "LoRA", "lora": {"rank": 4, "targetModules": ["q_proj"]}}},
        LLAMA,
        "lora_target_modules",
        ("q_proj",),
    ),
    ({}, LLAMA, "warmup_steps", None),
    ({}, LLAMA, "split_percent", 1.0),
    (
        {"spec.validation.datasets": [{"name": "v", "storageUri": "pvc://v"}]},
        LLAMA,
        "split_percent",
        0.0,
    ),
    (
        {
            "spec.datasets": [
                {"name": "d", "storageUri": "pvc://d"},
                {"name": "g", "storageUri": "pvc://g", "role": "General"},
            ],
            "spec.validation.datasets": [{"name": "v", "storageUri": "pvc://v"}],
        },
        LLAMA,
        "split_percent",
        1.0,
    ),
    ({"spec.validation.splitPercent": 5}, LLAMA, "split_percent", 5.0),
    ({}, LLAMA, "image", "cptjob/trainer:latest"),
    ({"spec.trainer.image": "mine"}, LLAMA, "image", "mine"),
    ({}, LLAMA, "service_account_name", "default"),
    ({}, LLAMA, "pool", None),
    ({}, LLAMA, "output_uri", None),
    ({"spec.output.storageUri": "pvc://out/runs/"}, LLAMA, "output_uri", "pvc://out/runs/tiny"),
]


@pytest.mark.parametrize(("changes", "facts", "name", "expected"), TABLE, ids=str)
def test_a_field_that_is_left_out_is_decided(
    changes: dict[str, Any], facts: ModelFacts, name: str, expected: Any, job: MakeJob
) -> None:
    assert getattr(resolve(build(job(changes)), facts), name) == expected


def test_the_table_speaks_of_every_rule() -> None:
    assert {name for _, _, name, _ in TABLE} == {rule.__name__ for rule in RULES}
    assert {rule.__name__ for rule in RULES} == set(Resolved.model_fields)


def test_each_rule_says_what_it_does() -> None:
    assert all(rule.__doc__ for rule in RULES)


def test_the_platform_decides_what_the_job_does_not(job: MakeJob) -> None:
    settings = JobDefaults(
        image="ours:1",
        service_account_name="trainer",
        output_uri="s3://bucket/jobs",
        pool="gold",
        gpu_resource="amd.com/gpu",
        instance_gpus={"big": 16},
    )
    found = resolve(build(job({"spec.scheduling.instanceType": "big"})), LLAMA, settings)
    assert (found.image, found.service_account_name, found.pool) == ("ours:1", "trainer", "gold")
    assert (found.output_uri, found.num_proc_per_node) == ("s3://bucket/jobs/tiny", 16)


def test_rows_longer_than_the_models_positions_are_refused(job: MakeJob) -> None:
    long = build(job({"spec.training.maxLength": 1024}))
    with pytest.raises(
        ConfigError, match=r"maxLength: 1024 is more than the model's 512 positions"
    ):
        resolve(long, TINY)


def test_more_rows_in_a_step_than_there_can_be_are_refused(job: MakeJob) -> None:
    changes = {"spec.trainer.numNodes": 256, "spec.training.batchSizePerDevice": 4096}
    largest = build(job(changes | {"spec.trainer.numProcPerNode": 1}))
    assert resolve(largest, None).global_batch_size == 1_048_576
    more = build(job(changes | {"spec.trainer.numProcPerNode": 2}))
    with pytest.raises(
        ConfigError,
        match=r"batchSizePerDevice: 4096 rows on each of 512 devices make 2097152 a step, more",
    ):
        resolve(more, None)
    given = build(
        job(changes | {"spec.trainer.numProcPerNode": 2, "spec.training.globalBatchSize": 8192})
    )
    assert resolve(given, None).global_batch_size == 8192


def test_a_floor_above_the_default_rate_is_refused(job: MakeJob) -> None:
    high = build(job({"spec.training.schedule.minLearningRate": 1e-3}))
    with pytest.raises(ConfigError, match=r"minLearningRate: 0.001 is not less than the learning"):
        resolve(high, LLAMA)


def test_every_answer_has_its_place_in_the_status(job: MakeJob) -> None:
    assert set(fields(Resolved)) <= set(fields(ResolvedStatus))
    status = resolve(build(job()), LLAMA).status(total_steps=7)
    assert (status.learning_rate, status.total_steps) == (2e-5, 7)


def configured(document: dict[str, Any], **changes: Any) -> TrainerConfig:
    job = build(document)
    return trainer_config(
        job,
        resolve(job, TINY),
        uid="1",
        output=Path("/out"),
        locate=lambda uri: Storage.parse(uri).local({}, Path("/base")),
        **changes,
    )


def test_the_trainer_is_told_everything(job: MakeJob) -> None:
    config = configured(
        job(
            {
                "spec.training": {"method": "LoRA", "lora": {"rank": 4}, "seed": 7},
                "spec.datasets[0].version": "2",
                "spec.checkpoint.keepLast": 3,
                "spec.elasticPolicy": {"maxRestarts": 9},
                "spec.trainer": {"numNodes": 2, "numProcPerNode": 3},
            }
        )
    )
    assert config.model.path == Path("/base/volumes/models/tiny")
    assert (config.datasets[0].version, config.datasets[0].path.name) == ("2", "domain")
    lora = config.training.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.target_modules) == (4, 8.0, ("all-linear",))
    assert (config.training.seed, config.training.max_length) == (7, 512)
    assert config.training.schedule.min_learning_rate == pytest.approx(1e-5)
    assert (config.checkpoint.keep_last, config.elastic.max_restarts) == (3, 9)
    assert config.processes == Processes(num_nodes=2, num_proc_per_node=3)
    assert config.training.global_batch_size == 48


def test_a_local_run_differs_only_in_paths_and_processes(job: MakeJob) -> None:
    document = job({"spec.trainer": {"numNodes": 4}})
    cluster = configured(document)
    local = configured(
        document, processes=Processes(num_proc_per_node=2), prepared=Path("/prepared")
    )
    assert local.training == cluster.training
    changed = {
        name
        for name in TrainerConfig.model_fields
        if getattr(local, name) != getattr(cluster, name)
    }
    assert changed == {"processes", "paths"}


def test_every_training_field_reaches_the_trainer(job: MakeJob) -> None:
    given = {"maxSteps": 5, "maxGradNorm": 2.0, "precision": "Float32", "systemPrompt": "Be kind."}
    training = configured(job({"spec.training": given})).training
    asked = Training.from_json(json.dumps(given))
    for name in Training.model_fields:
        if getattr(asked, name) is not None and name != "schedule":
            assert getattr(training, name) == getattr(asked, name), name


# --- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 512}, 1024),
        ({"model_type": "bloom"}, None),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": None, "seq_length": 77}, 77),
        ({"max_position_embeddings": -1}, None),
    ],
)
def test_positions_are_found_under_their_many_names(
    config: dict[str, Any], positions: int | None
) -> None:
    assert ModelFacts.from_config(config).max_positions == positions


def test_facts_are_read_from_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "n_ctx": 64}')
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
            "__metadata__": {"format": "pt"},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    facts = ModelFacts.from_directory(tmp_path)
    assert facts == ModelFacts(model_type="llama", max_positions=64, parameters=7)


def test_broken_weights_are_left_for_prepare_to_tell(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert ModelFacts.from_directory(tmp_path) == ModelFacts()


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"config.json cannot be read \(No such file"):
        ModelFacts.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json: not JSON"):
        ModelFacts.from_directory(tmp_path)
