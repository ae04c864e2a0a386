"""`cptjob estimate` on prepared data says what the training will do, to the row."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cptjob.estimate import estimate
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepare import prepare

Job = Callable[..., TrainerConfig]
SHAPE = {"num_hidden_layers": 1, "hidden_size": 4}
WEIGHT = st.sampled_from([0.01, 0.05, 0.1, 0.3, 1 / 3])


def packs(_: Path) -> bool:
    return True


@pytest.fixture
def build(tmp_path: Path, make: SimpleNamespace, job: Job) -> Job:
    model = make.model(tmp_path / "shaped", **SHAPE)
    domain = make.texts(tmp_path / "domain.jsonl", make.sentences(60))
    general = [
        make.texts(tmp_path / f"{name}.jsonl", make.sentences(30, name)) for name in ("one", "two")
    ]

    def built(count: int, **settings: Any) -> TrainerConfig:
        return job(domain, general=general[:count], model=model, **settings)

    return built


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(0, 2),
    weights=st.none() | st.fixed_dictionaries({"one": WEIGHT, "two": WEIGHT}),
    split=st.sampled_from([0.0, 10.0]),
    length=st.sampled_from([48, 64]),
    epochs=st.integers(1, 7),
    batch=st.integers(1, 9),
    max_steps=st.none() | st.integers(1, 40),
)
def test_prepared_data_gives_the_steps_of_the_training(
    count: int,
    weights: dict[str, float] | None,
    split: float,
    length: int,
    epochs: int,
    batch: int,
    max_steps: int | None,
    build: Job,
) -> None:
    config = build(
        count,
        weights=weights,
        split=split,
        max_length=length,
        epochs=epochs,
        global_batch_size=batch,
        max_steps=max_steps,
    )
    prepared = prepare(config, packs=packs, processes=1)
    answer = estimate(config)
    assert answer.rows.tokens_are_counted
    assert (answer.rows.total, answer.steps) == (prepared.total_rows, prepared.total_steps)


def test_other_epochs_and_weights_need_no_other_preparation(build: Job) -> None:
    prepare(build(2, weights={"one": 0.1, "two": 0.1}), packs=packs)
    other = build(2, weights={"one": 0.3, "two": 0.01}, epochs=5, global_batch_size=7)
    answer = estimate(other)
    assert answer.rows.tokens_are_counted
    assert answer.steps == prepare(other, packs=packs).total_steps


def test_the_tokens_of_prepared_data_are_counted(build: Job) -> None:
    (source,) = prepare(build(0), packs=packs).sources
    assert estimate(build(0, epochs=3)).tokens == 3 * source.tokens


@pytest.mark.parametrize(
    "change",
    [{"max_length": 48}, {"split": 20.0}, {"system_prompt": "Be brief."}, {"data": "changed"}],
    ids=lambda change: next(iter(change)),
)
def test_data_prepared_otherwise_is_not_counted(change: dict[str, Any], build: Job) -> None:
    config = build(1)
    prepare(config, packs=packs)
    assert estimate(config).rows.tokens_are_counted
    if change == {"data": "changed"}:
        path = config.datasets[0].path
        path.write_bytes(path.read_bytes().replace(b"fox", b"box"))
        change = {}
    assert not estimate(build(1, **change)).rows.tokens_are_counted


def test_a_changed_tokenizer_makes_other_rows(build: Job) -> None:
    config = build(1)
    prepare(config, packs=packs)
    settings_file = config.model.path / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text() + " ")
    assert not estimate(config).rows.tokens_are_counted
