"""The manifest of a result, as far as it does not need a model."""

import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import Prepared
from cptjob_trainer.results.record import read_record
from cptjob_trainer.results.result import manifest
from cptjob_trainer.training.evaluate import HeldOut

BASE = HeldOut({"Domain": 4.0, "General": 3.0}, {"law": 4.0, "web": 3.0}, 100)
Job = Callable[..., TrainerConfig]


@pytest.fixture
def trained(tmp_path: Path, make: SimpleNamespace, job: Job) -> tuple[TrainerConfig, Prepared]:
    """A job with general text of no given weight, and its prepared data."""
    law = make.texts(tmp_path / "law.jsonl", make.sentences(60))
    web = make.texts(tmp_path / "web.jsonl", make.sentences(40, "web"))
    config = job(law, general=[web])
    return config, prepare(config, packs=lambda _: True)


def test_the_asked_mix_is_in_the_manifest_even_where_the_prepared_data_is_gone(
    trained: tuple[TrainerConfig, Prepared], tmp_path: Path
) -> None:
    config, prepared = trained
    value = manifest(config, prepared, LoopState(), BASE, 1)
    assert value["data"]["prepared"] == prepared.directory.name
    record = read_record(tmp_path / "nothing", value)
    shares = [source.asked_share for source in record.sources]
    assert shares == [0.95, 0.05], "as asked, not as rows of tokens come out"


def test_the_notes_of_preparing_are_found_again_by_the_manifest(
    trained: tuple[TrainerConfig, Prepared],
) -> None:
    config, prepared = trained
    value = manifest(config, prepared, LoopState(), BASE, 1)
    assert prepared.warnings
    assert read_record(config.paths.output, value).notes == prepared.warnings


def test_a_loss_that_is_no_number_is_null_with_a_reason(
    trained: tuple[TrainerConfig, Prepared],
) -> None:
    state = LoopState(heldout={"heldout_domain_loss": math.nan, "heldout_general_loss": 2.5})
    value: dict[str, Any] = manifest(*trained, state, BASE, 1)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["metrics"]["heldout_domain_loss"] is None
    assert value["metrics"]["heldout_general_loss"] == 2.5
    reason = "the model's loss on this text is not a finite number"
    assert value["notFinite"] == {"heldout_domain_loss": reason}


def test_the_manifest_names_the_version_that_made_it(
    trained: tuple[TrainerConfig, Prepared],
) -> None:
    value = manifest(*trained, LoopState(), BASE, 1)
    assert value["software"]["cptjob"] == version("cptjob")


def test_the_manifest_says_where_each_data_set_was_and_which_version(
    trained: tuple[TrainerConfig, Prepared],
) -> None:
    config, prepared = trained
    dated = [each.model_copy(update={"version": "7"}) for each in config.datasets]
    config = config.model_copy(update={"datasets": tuple(dated)})
    sources = manifest(config, prepared, LoopState(), BASE, 1)["data"]["sources"]
    assert [(each["uri"], each["version"]) for each in sources] == [("pvc://c", "7")] * 2
