"""The trainer's configuration."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from cptjob_api.fields import as_model, item
from cptjob_trainer import config as module
from cptjob_trainer.config import (
    Checkpoint,
    DatasetInput,
    ModelInput,
    Paths,
    Processes,
    ResolvedLora,
    ResolvedSchedule,
    ResolvedTraining,
    Strict,
    TrainerConfig,
    Training,
    digest,
)
from cptjob_trainer.errors import ConfigError, MissingInputError


def sound() -> TrainerConfig:
    return TrainerConfig(
        name="tiny",
        uid="1",
        model=ModelInput(uri="pvc://models/tiny", path=Path("/models/tiny")),
        datasets=(DatasetInput(name="d", uri="pvc://data/d", path=Path("/data/d")),),
        training=ResolvedTraining(
            epochs=1,
            max_length=64,
            batch_size_per_device=2,
            global_batch_size=4,
            learning_rate=2e-5,
            schedule=ResolvedSchedule(min_learning_rate=2e-6),
        ),
        paths=Paths(output=Path("/out")),
    )


def changed(config: TrainerConfig, **changes: Any) -> TrainerConfig:
    return config.model_copy(update=changes)


def test_a_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "config.json"
    sound().dump(file)
    assert TrainerConfig.load(file) == sound()
    assert [each.name for each in file.parent.iterdir()] == ["config.json"]


def test_prepared_data_lies_in_the_output_unless_told_otherwise() -> None:
    assert Paths(output=Path("/out")).prepared == Path("/out/prepared")
    assert Paths(output=Path("/out"), prepared=Path("/p")).prepared == Path("/p")


def test_the_documents_names_are_camel_case_only(tmp_path: Path) -> None:
    document = json.loads(sound().model_dump_json())
    document["training"]["learning_rate"] = document["training"].pop("learningRate")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"training\.learning_rate: Extra inputs"):
        TrainerConfig.load(file)


def test_a_missing_file_is_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="cannot be read: No such file"):
        TrainerConfig.load(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 2}'])
def test_another_file_is_a_config_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="not a trainer configuration"):
        TrainerConfig.load(file)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"uid": "2"},
        {"paths": Paths(output=Path("/elsewhere"))},
        {"processes": Processes(num_nodes=2, num_proc_per_node=4)},
        {"checkpoint": Checkpoint(every_steps=5)},
        {"model": ModelInput(uri="file://m", path=Path("m"))},
        {"datasets": (DatasetInput(name="d", uri="file://d", path=Path("d")),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_where_and_how_a_job_runs_is_not_in_its_digest(change: dict[str, Any]) -> None:
    assert digest(changed(sound(), **change), "m", "d") == digest(sound(), "m", "d")


@pytest.mark.parametrize(
    "change",
    [
        {"task": "MaskedLM"},
        {"training": sound().training.model_copy(update={"seed": 1})},
        {"training": sound().training.model_copy(update={"global_batch_size": 8})},
        {"datasets": (DatasetInput(name="d", uri="u", path=Path("p"), role="General"),)},
    ],
    ids=["task", "seed", "globalBatchSize", "role"],
)
def test_what_a_job_makes_is_in_its_digest(change: dict[str, Any]) -> None:
    assert digest(changed(sound(), **change), "m", "d") != digest(sound(), "m", "d")


def test_the_fingerprints_are_in_the_digest() -> None:
    assert len({digest(sound(), m, d) for m in "ab" for d in "ab"}) == 4


def _models() -> list[type[BaseModel]]:
    found = [each for each in vars(module).values() if isinstance(each, type)]
    return [each for each in found if issubclass(each, Strict) and each is not Strict]


@pytest.mark.parametrize("model", _models(), ids=lambda model: model.__name__)
def test_each_field_has_a_sentence(model: type[BaseModel]) -> None:
    parents = [each for each in model.__mro__ if issubclass(each, BaseModel)]
    for name in model.model_fields:
        said = [
            each.model_fields[name].description for each in parents if name in each.model_fields
        ]
        sentence = next((each for each in said if each), "")
        assert sentence.endswith("."), f"{model.__name__}.{name}"
        assert sentence[0].isupper() or sentence[0].isdigit(), f"{model.__name__}.{name}"


@pytest.mark.parametrize("model", [ResolvedTraining, ResolvedLora, ResolvedSchedule])
def test_a_resolved_group_keeps_the_bounds_of_what_it_resolves(model: type[BaseModel]) -> None:
    asked = Training if model is ResolvedTraining else model.__mro__[1]
    assert issubclass(asked, BaseModel)
    loose = asked.model_json_schema()
    strict = model.model_json_schema()
    for name in model.model_fields:
        alias = str(model.model_fields[name].alias)
        if as_model(model.model_fields[name].annotation) is None:
            options = loose["properties"][alias].get("anyOf", [loose["properties"][alias]])
            bounds = _bounds(strict["properties"][alias])
            assert bounds.items() <= _bounds(options[0]).items(), name


def _bounds(schema: dict[str, Any]) -> dict[str, Any]:
    keys = ("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    return {key: schema[key] for key in keys if key in schema}


def test_numbers_are_not_made_from_text_and_infinity_is_none() -> None:
    for text in ('{"seed": "3"}', '{"seed": true}', '{"learningRate": 1e999}'):
        with pytest.raises(ValidationError):
            Training.from_json(text)


def test_walking_the_types_sees_through_optional_and_annotated() -> None:
    assert as_model(Training.model_fields["lora"].annotation) is module.Lora
    assert item(module.Lora.model_fields["target_modules"].annotation) is str
    assert get_args(module.Task)[0] == "CausalLM"
