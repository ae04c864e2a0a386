"""The error tree."""

import pickle
import re

import pytest

from cptjob_trainer import errors
from cptjob_trainer.errors import NEVER_RETRIED, CPTJobError, DataError, Fault, ManifestError


def kinds(root: type[CPTJobError] = CPTJobError) -> list[type[CPTJobError]]:
    below = [each for kind in root.__subclasses__() for each in kinds(kind)]
    return list(dict.fromkeys([root, *below]))


def test_the_drawn_tree_names_each_error_with_its_exit_code() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d+)  ", errors.__doc__ or ""))
    helper = errors.FaultyError
    assert {kind.__name__: str(kind.exit_code) for kind in kinds() if kind is not helper} == drawn


@pytest.mark.parametrize(
    ("code", "retried"),
    [(64, False), (65, False), (66, False), (78, False), (73, True), (75, True)],
)
def test_what_a_restart_cannot_help_is_not_retried(code: int, retried: bool) -> None:
    assert any(kind.exit_code == code for kind in kinds())
    assert (code not in NEVER_RETRIED) is retried


def test_faults_show_file_and_line_up_to_a_limit() -> None:
    error = DataError(
        "broken data", [Fault("a.jsonl", n + 1, "no text") for n in range(22)], more=5
    )
    lines = str(error).splitlines()
    assert lines[:2] == ["broken data", "a.jsonl:1: no text"]
    assert lines[-1] == "... and 7 more"
    assert len(lines) == 22


def test_a_fault_of_a_whole_file_shows_no_line() -> None:
    assert str(DataError(faults=[Fault("a.jsonl", 0, "empty")])) == "a.jsonl: empty"


@pytest.mark.parametrize("kind", [DataError, ManifestError])
def test_faults_survive_the_trip_between_processes(kind: type[DataError]) -> None:
    error = kind("broken", [Fault("a", 1, "b")], more=2)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  (our own bytes)
    assert (type(again), str(again), again.faults) == (kind, str(error), error.faults)
