"""How a checkpoint of another run is told apart from the job, in a person's words."""

from pathlib import Path
from typing import Any

from cptjob_trainer.checkpoint.checkpoint_folder import Stored, mismatch, scan

SCHEDULE = {"type": "Cosine", "minLearningRate": 2e-6}
THEIRS = {
    "model": "m1",
    "data": "d1",
    "training.learningRate": 2e-5,
    "training.schedule": SCHEDULE,
}
OLD = {"model": "pvc://models/old", "data": "law (pvc://data/law)"}


def told(ours: dict[str, Any], named: dict[str, str]) -> str:
    stored = Stored(Path("step-1.1"), 1, 1, THEIRS, OLD)
    return mismatch(stored, THEIRS | ours, named).partition("another run: ")[2]


def test_a_model_and_data_of_other_names_are_told_with_both_names() -> None:
    named = {"model": "pvc://models/new", "data": "code (pvc://data/law)"}
    assert told({"model": "m2", "data": "d2"}, named) == (
        "data is law (pvc://data/law) in the checkpoint and code (pvc://data/law) in this job; "
        "model is pvc://models/old in the checkpoint and pvc://models/new in this job"
    )


def test_other_contents_under_the_same_name_are_told_as_that() -> None:
    assert told({"model": "m2"}, OLD) == (
        "model is pvc://models/old in both, and what that holds, or how it is used, has changed"
    )


def test_a_changed_learning_rate_does_not_tell_of_the_floor_that_follows_it() -> None:
    ours = {
        "training.learningRate": 1e-3,
        "training.schedule": SCHEDULE | {"minLearningRate": 1e-4},
    }
    assert told(ours, OLD) == (
        "training.learningRate is 2e-05 in the checkpoint and 0.001 in this job"
    )


def test_of_a_schedule_only_what_differs_is_told() -> None:
    ours = {"training.schedule": SCHEDULE | {"minLearningRate": 0.0}}
    assert told(ours, OLD) == (
        "training.schedule.minLearningRate is 2e-06 in the checkpoint and 0.0 in this job"
    )


def test_a_checkpoint_keeps_the_names_of_its_model_and_data(lab: Any) -> None:
    lab.train(1, inputs=OLD)
    (stored,) = scan(lab.directory).counted
    assert stored.inputs == OLD
