"""Held-out losses as they are kept: valid JSON whatever they are, and never a reason to stop."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer.data.rows import Row
from cptjob_trainer.training.evaluate import HeldOut, load_base, rows_per_source, save_base
from cptjob_trainer.training.loop import Trainer


@pytest.mark.parametrize(
    ("domain_rows", "available", "sources", "used"),
    [
        (10**6, 10**5, 1, 512),
        (1000, 100, 1, 45),
        (1000, 100, 2, 23),
        (10, 100, 1, 8),
        (10, 5, 1, 5),
    ],
)
def test_so_many_held_out_rows_are_used_as_one_epoch_affords(
    domain_rows: int, available: int, sources: int, used: int
) -> None:
    assert rows_per_source(domain_rows, available, sources) == used


def test_the_length_of_a_job_does_not_decide_which_held_out_rows_are_measured(
    model_dir: Callable[..., Path],
    trainer: Callable[..., Trainer],
    rows: Callable[..., list[Row]],
) -> None:
    given, path = rows(400, 16, 1), model_dir("llama")
    for steps in (1, 1000):
        assert trainer(path, given, total_steps=steps).evaluator.counts == [18]


DIVERGED = HeldOut({"Domain": math.nan, "General": 2.5}, {"law": math.inf, "web": 2.5}, 100)


def strictly(text: str) -> Any:
    """What any JSON reader makes of it: NaN and Infinity are no JSON."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_losses_of_the_base_model_that_are_no_numbers_are_null_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "base-losses.json"
    save_base(path, DIVERGED, 1.5)
    assert strictly(path.read_text())["byRole"] == {"Domain": None, "General": 2.5}
    assert [file.name for file in tmp_path.iterdir()] == ["base-losses.json"]
    base, seconds = load_base(path) or (None, None)
    assert base is not None
    assert math.isnan(base.by_role["Domain"])
    assert math.isnan(base.by_source["law"])
    assert (base.by_role["General"], base.tokens, seconds) == (2.5, 100, 1.5)


def test_losses_of_the_base_model_that_cannot_be_kept_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "base-losses.json"
    save_base(path, DIVERGED, 1.5)
    assert load_base(path) is None
    (tmp_path / "base-losses.json").write_text('{"byRole": []}')
    assert load_base(tmp_path / "base-losses.json") is None
