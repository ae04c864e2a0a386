"""The definition of CPTJob in a real API server, before any operator runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiException

from cptjob_api.rules import MUTABLE, RULES, TRANSITIONS, Rule
from job_cases import ACCEPTED_STATUS, BROKEN, BY_SCHEMA, OTHER, SOUND, Job, sound_job
from testplane.plane import ControlPlane

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    path
    for path in sorted((ROOT / "deploy" / "examples").rglob("*.yaml"))
    if any(each["kind"] == "CPTJob" for each in yaml.safe_load_all(path.read_text("utf-8")))
]
# A fault for each rule about addresses, by the beginning of its message.
BAD_URIS = {"write pvc://": "pvc://a/../b", "file://": "file:///x", "hf:// can be": "hf://a/b"}


def faults(refused: ApiException) -> list[tuple[str, str]]:
    """Field and message of each fault that the API server tells."""
    causes = json.loads(refused.body)["details"]["causes"]
    return [(each["field"], each["message"]) for each in causes]


def in_any_item(field: str) -> str:
    """`datasets[3].name` as rules write it: `datasets[].name`."""
    return re.sub(r"\[\d+\]", "[]", field)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_applies(path: Path, plane: ControlPlane, namespace: str) -> None:
    plane.kubectl("apply", "-n", namespace, "-f", str(path))
    assert plane.kubectl("diff", "-n", namespace, "-f", str(path)) == ""


@pytest.mark.parametrize("changes", SOUND, ids=str)
def test_a_sound_job_is_accepted(changes: dict[str, Any], jobs: Any) -> None:
    jobs.create(sound_job(changes), dry_run=True)


def breaking(rule: Rule) -> Job:
    """A job that breaks this rule and no other."""
    place = ".".join(filter(None, (rule.at, rule.field)))
    for changes, at, message in BROKEN:
        if in_any_item(at) == place and rule.message.startswith(message):
            return sound_job(changes)
    (bad,) = (uri for begin, uri in BAD_URIS.items() if rule.message.startswith(begin))
    groups = {
        "spec.validation.datasets[].storageUri": {
            "spec.validation.datasets": [{"name": "v", "storageUri": bad}]
        },
        "spec.datasets[].storageUri": {"spec.datasets[0].storageUri": bad},
    }
    return sound_job(groups.get(place, {place: bad}))


@pytest.mark.parametrize(
    "rule",
    [rule for rule in RULES if rule.cel is not None],
    ids=lambda rule: f"{rule.at} {rule.message[:30]}",
)
def test_every_static_rule_refuses_with_its_message_at_its_field(rule: Rule, jobs: Any) -> None:
    with pytest.raises(ApiException) as refused:
        jobs.create(breaking(rule), dry_run=True)
    ((field, message),) = faults(refused.value)
    if rule.at == "metadata":
        # The API server cannot name a field of metadata, so the message begins with it.
        assert message == f"Invalid value: metadata.{rule.field}: {rule.message}"
    else:
        assert in_any_item(field) == ".".join(filter(None, (rule.at, rule.field)))
        assert message.endswith(f": {rule.message}")


@pytest.mark.parametrize(("changes", "place", "message"), BY_SCHEMA, ids=str)
def test_what_may_be_there_once_is_refused_twice(
    changes: dict[str, Any], place: str, message: str, jobs: Any
) -> None:
    with pytest.raises(ApiException) as refused:
        jobs.create(sound_job(changes), dry_run=True)
    ((field, said),) = faults(refused.value)
    assert field == f"{place}[1]"
    assert said.startswith("Duplicate value")


def test_kubectl_says_what_is_wrong_in_one_line(plane: ControlPlane, namespace: str) -> None:
    job = sound_job({"spec.training.lora": {}})
    done = plane.try_kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))
    assert done.returncode != 0
    assert done.stderr.strip().split("\n") == [
        'The CPTJob "tiny" is invalid: spec.training.lora: Invalid value: '
        "lora is for method LoRA; set method: LoRA or leave it out"
    ]


def test_kubectl_refuses_a_misspelt_field_by_name(plane: ControlPlane, namespace: str) -> None:
    job = sound_job({"spec.training.learnigRate": 1})
    done = plane.try_kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))
    assert 'unknown field "spec.training.learnigRate"' in done.stderr


# --- changes to an accepted job -------------------------------------------------------------------


@pytest.fixture(name="accepted")
def make_accepted(jobs: Any) -> Job:
    """A job whose settings are resolved, as the operator does at acceptance."""
    jobs.create(sound_job())
    accepted: Job = jobs.patch_status("tiny", ACCEPTED_STATUS)
    return accepted


def change(name: str) -> dict[str, Any]:
    """A merge patch that gives this field of the spec another value."""
    value = OTHER[name]
    for part in reversed(name.split(".")):
        value = {part: value}
    return {"spec": value}


def test_an_accepted_job_may_change_only_what_is_mutable(jobs: Any, accepted: Job) -> None:
    told: dict[str, list[tuple[str, str]]] = {}
    for name in OTHER:
        try:
            jobs.patch("tiny", change(name), dry_run=True)
        except ApiException as refused:
            told[name] = faults(refused)
    messages = {each.field: each.message for each in TRANSITIONS}
    assert set(told) == set(OTHER) - set(MUTABLE)
    for name, ((field, said),) in told.items():
        assert field == "spec"
        assert said.endswith(f": spec.{name}: {messages[f'spec.{name}']}")


def test_a_job_that_is_not_accepted_yet_may_change_anything(jobs: Any) -> None:
    jobs.create(sound_job())
    for name in OTHER:
        jobs.patch("tiny", change(name), dry_run=True)


def test_the_number_of_nodes_of_a_suspended_job_may_change(jobs: Any, accepted: Job) -> None:
    jobs.patch("tiny", {"spec": {"suspend": True}})
    changed = jobs.patch("tiny", {"spec": {"trainer": {"numNodes": 3}}})
    assert changed["spec"]["trainer"]["numNodes"] == 3


# --- what kubectl shows and does ------------------------------------------------------------------


def test_a_fresh_job_has_observed_nothing(jobs: Any) -> None:
    created = jobs.create(sound_job())
    assert created["status"]["observedGeneration"] == -1


def test_the_status_is_written_apart_from_the_spec(jobs: Any) -> None:
    created = jobs.create(sound_job() | {"status": {"phase": "Running"}})
    assert "phase" not in created["status"]
    jobs.patch_status("tiny", {"phase": "Running", "observedGeneration": 1})
    changed = jobs.patch("tiny", {"spec": {"suspend": True}, "status": {"phase": "Failed"}})
    assert changed["status"]["phase"] == "Running"
    assert changed["metadata"]["generation"] == 2


def test_kubectl_shows_the_columns(plane: ControlPlane, jobs: Any) -> None:
    jobs.create(sound_job({"spec.trainer.numNodes": 2}))
    jobs.patch_status(
        "tiny",
        {
            "phase": "Running",
            "restarts": 1,
            "trainerStatus": {
                "currentStep": 40,
                "totalSteps": 100,
                "progressPercentage": 40,
                "estimatedRemainingSeconds": 90,
            },
            "resolved": {"pool": "pool-a"},
            "lastCheckpoint": {"step": 20, "time": "2030-01-01T00:00:00Z", "uri": "pvc://o/tiny"},
        },
    )
    table = plane.kubectl("get", "cpt", "-n", jobs.namespace, "-o", "wide")
    head, row = (line.split() for line in table.splitlines())
    shown = dict(zip(head, row, strict=True))
    shown.pop("AGE")
    assert shown == {
        "NAME": "tiny",
        "STATE": "Running",
        "NODES": "2",
        "STEP": "40",
        "PROGRESS": "40",
        "RESTARTS": "1",
        "CHECKPOINT": "20",
        "ETA": "90",
        "POOL": "pool-a",
    }


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("cptjob.spec.training", "What is trained and how."),
        ("cptjob.spec.training.learningRate", "Left out:"),
        ("cptjob.status.phase", "FIELD: phase <string>"),
    ],
)
def test_kubectl_explains_the_fields(place: str, sentence: str, plane: ControlPlane) -> None:
    assert sentence in plane.kubectl("explain", place)


def test_kubectl_scales_a_job(plane: ControlPlane, jobs: Any) -> None:
    jobs.create(sound_job())
    plane.kubectl("scale", "cptjob/tiny", "--replicas=3", "-n", jobs.namespace)
    assert jobs.get("tiny")["spec"]["trainer"]["numNodes"] == 3


def test_the_scale_of_a_job_tells_its_workers_and_their_selector(
    plane: ControlPlane, jobs: Any
) -> None:
    jobs.create(sound_job({"spec.trainer.numNodes": 2}))
    jobs.patch_status("tiny", {"replicas": 1, "selector": "app=tiny"})
    path = f"/apis/training.cptjob.io/v1alpha1/namespaces/{jobs.namespace}/cptjobs/tiny/scale"
    code, scale = plane.get(path)
    assert code == 200
    assert scale["spec"] == {"replicas": 2}
    assert scale["status"] == {"replicas": 1, "selector": "app=tiny"}
