"""An output where a run would overwrite what it has not made is refused, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cptjob_trainer.checkpoint import output_folder
from cptjob_trainer.config import (
    DatasetInput,
    ModelInput,
    Paths,
    ResolvedSchedule,
    ResolvedTraining,
    TrainerConfig,
)
from cptjob_trainer.errors import ConfigError


def job(output: Path, model: Path, data: Path) -> TrainerConfig:
    return TrainerConfig(
        name="job",
        uid="uid",
        model=ModelInput(uri="pvc://m/model", path=model),
        datasets=(DatasetInput(name="law", uri="pvc://d/law", path=data),),
        training=ResolvedTraining(
            epochs=1,
            max_length=64,
            batch_size_per_device=1,
            global_batch_size=1,
            learning_rate=1e-4,
            schedule=ResolvedSchedule(min_learning_rate=1e-5),
        ),
        paths=Paths(output=output),
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a model and data, as people have them."""
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (".", "the output's model would replace the base model"),
        ("model", "the output lies in the base model"),
        ("data/out", "the output lies in the data set law"),
        ("link/out", "the output lies in the data set law"),
    ],
)
def test_an_output_that_overlaps_an_input_is_refused(project: Path, output: str, said: str) -> None:
    (project / "link").symlink_to("data")
    with pytest.raises(ConfigError, match=said):
        output_folder.check(job(project / output, project / "model", project / "data"))
    assert not (project / "data" / "out").exists()


def test_data_where_a_run_prepares_its_own_is_refused(project: Path) -> None:
    data = project / "out" / "prepared" / "law"
    with pytest.raises(ConfigError, match="the output's prepared would replace the data set law"):
        output_folder.check(job(project / "out", project / "model", data))


def test_an_output_beside_its_inputs_is_accepted(project: Path) -> None:
    out = project / "out"
    (out / "data").mkdir(parents=True)
    (out / "model").mkdir()
    output_folder.check(job(out, project / "model", out / "data" / "law.jsonl"))


@pytest.mark.parametrize(
    "name", ["model/notes", "adapter/notes", "manifest.json", "metrics.jsonl", "report.html"]
)
def test_what_no_run_has_made_is_not_replaced(project: Path, name: str) -> None:
    out = project / "out"
    foreign = out / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"version": 1}')
    with pytest.raises(ConfigError, match="is there, and no cptjob run has made it"):
        output_folder.check(job(out, project / "model", project / "data"))
    assert foreign.read_text() == '{"version": 1}'


def finished(out: Path) -> None:
    said = {"version": 1, "digest": "d", "jobName": "job", "files": {}}
    (out / "manifest.json").write_text(json.dumps(said))


def dying_while_it_replaces_its_model(out: Path) -> None:
    saved = out / "checkpoints" / "step-3.1"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"format": "cptjob-checkpoint"}))


@pytest.mark.parametrize("left", [finished, dying_while_it_replaces_its_model])
def test_a_run_s_own_result_is_replaced(project: Path, left: Callable[[Path], None]) -> None:
    out = project / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").write_text("{}")
    (out / "metrics.jsonl").write_text("{}\n")
    left(out)
    output_folder.check(job(out, project / "model", project / "data"))


def test_a_run_that_has_not_saved_yet_goes_on_with_its_metrics_but_vouches_for_no_model(
    project: Path,
) -> None:
    out = project / "out"
    (out / "prepared" / "abc").mkdir(parents=True)
    (out / "prepared" / "abc" / "prepared.json").write_text('{"dataFingerprint": "d"}')
    (out / "metrics.jsonl").write_text("{}\n")
    config = job(out, project / "model", project / "data")
    output_folder.check(config)
    (out / "model").symlink_to(project / "model")
    with pytest.raises(ConfigError, match="no cptjob run has made it"):
        output_folder.check(
            config.model_copy(update={"model": ModelInput(uri="pvc://m", path=project / "base")})
        )
