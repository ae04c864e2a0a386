"""What the types accept and the trainer cannot do yet is refused, never ignored."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from cptjob_api import crd, reference
from cptjob_api.fields import annotation_at, parts
from cptjob_api.job import CPTJob
from cptjob_api.unsupported import MISSING, marks, unsupported

MakeJob = Callable[..., dict[str, Any]]

VALIDATION = {"name": "v", "storageUri": "file:///v"}
ASKED: list[tuple[dict[str, Any], str]] = [
    ({"spec.task": "MaskedLM"}, "spec.task: only CausalLM"),
    ({"spec.model.storageUri": "s3://bucket/x"}, "spec.model.storageUri: s3://"),
    ({"spec.datasets[0].storageUri": "hf://a/b"}, "spec.datasets[0].storageUri: s3://"),
    (
        {"spec.validation.datasets": [{"name": "v", "storageUri": "s3://bucket/v"}]},
        "spec.validation.datasets[0].storageUri: s3://",
    ),
    (
        {"spec.output.storageUri": "s3://bucket/x"},
        "spec.output.storageUri: s3:// cannot be written",
    ),
    ({"spec.model.secretRef": {"name": "key"}}, "spec.model.secretRef: no storage"),
    ({"spec.datasets[0].secretRef": {"name": "key"}}, "spec.datasets[0].secretRef: no storage"),
    (
        {"spec.validation.datasets": [VALIDATION | {"secretRef": {"name": "key"}}]},
        "spec.validation.datasets[0].secretRef: no storage",
    ),
    ({"spec.data.deduplicate": "Near"}, "spec.data.deduplicate: "),
    ({"spec.training.sifting.mode": "Shared"}, "spec.training.sifting.mode: "),
    (
        {"spec.training.ropeScaling": {"type": "YaRN", "factor": 4}},
        "spec.training.ropeScaling: positions",
    ),
    ({"spec.training.guards.spikeFactor": 10}, "spec.training.guards.spikeFactor: "),
    ({"spec.training.guards.rollbackAfter": 3}, "spec.training.guards.rollbackAfter: "),
    ({"spec.hangDetection.startupTimeoutSeconds": 60}, "spec.hangDetection.startupTimeoutSeconds"),
    ({"spec.hangDetection.stepTimeoutSeconds": 60}, "spec.hangDetection.stepTimeoutSeconds: "),
    ({"spec.checkpoint.storageUri": "pvc://x"}, "spec.checkpoint.storageUri: "),
    ({"spec.checkpoint.snapshotEverySteps": 10}, "spec.checkpoint.snapshotEverySteps: "),
    ({"spec.checkpoint.maxBandwidth": "1Gi"}, "spec.checkpoint.maxBandwidth: "),
    ({"spec.tracking.mlflow": {"trackingUri": "http://mlflow"}}, "spec.tracking.mlflow: "),
    ({"spec.elasticPolicy.maxNodes": 4}, "spec.elasticPolicy.maxNodes: "),
    ({"spec.elasticPolicy.minNodes": 1, "spec.trainer.numNodes": 2}, "spec.elasticPolicy.minNodes"),
]

FINE: list[dict[str, Any]] = [
    {},
    {"spec.training": {"method": "LoRA", "guards": {"skipNonFinite": True}, "sifting": {}}},
    {"spec.hangDetection": {"stepTimeoutSeconds": 1800}},
    {"spec.elasticPolicy": {"minNodes": 2, "maxNodes": 2}, "spec.trainer.numNodes": 2},
    {"spec.elasticPolicy": {"maxRestarts": 1}},
    {"spec.validation.datasets": [VALIDATION]},
]


def _told(document: dict[str, Any]) -> list[str]:
    return unsupported(CPTJob.from_json(json.dumps(document)))


@pytest.mark.parametrize(("changes", "message"), ASKED, ids=str)
def test_what_cannot_be_done_yet_is_named(
    changes: dict[str, Any], message: str, job: MakeJob
) -> None:
    (told,) = _told(job(changes))
    assert told.startswith(message)


@pytest.mark.parametrize("changes", FINE, ids=str)
def test_what_can_be_done_is_not_refused(changes: dict[str, Any], job: MakeJob) -> None:
    assert _told(job(changes)) == []


def test_all_of_it_is_told_at_once(job: MakeJob) -> None:
    changes = {key: value for each, _ in ASKED[4:8] for key, value in each.items()}
    assert len(_told(job(changes))) == 4


def test_what_cannot_be_done_yet_is_marked_in_the_definition_and_in_the_reference() -> None:
    schema, rows = crd.schema(), reference.text().splitlines()
    for field, mark in marks().items():
        here = schema
        for part in parts(field):
            here = here["items"] if part == -1 else here["properties"][part]
        (row,) = (row for row in rows if row.startswith(f"| `{field}` |"))
        assert mark in here["description"]
        assert mark in row
    told = {message.partition(":")[0].replace("[0]", "[]") for _, message in ASKED}
    assert told == set(marks())


def test_each_line_speaks_of_a_field_that_there_is_and_is_asked_for_above() -> None:
    for missing in MISSING:
        path = tuple(0 if part == -1 else part for part in parts(missing.field))
        assert annotation_at(CPTJob, path) is not None, missing.field
        said = missing.field.replace("[]", "[0]")
        assert any(message.startswith(said) for _, message in ASKED), missing.field
