"""Reading manifests: every fault, its line, and the nearest right word."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cptjob_api import crd
from cptjob_api.faults import FORMS
from cptjob_api.fields import Path as Place
from cptjob_api.fields import as_model, fields, item, show
from cptjob_api.job import CPTJob
from cptjob_api.manifest import as_path, load_manifest, parse_manifest, read_job
from cptjob_api.spec import CPTJobSpec
from cptjob_trainer.errors import ManifestError, MissingInputError

GOOD = """\
apiVersion: training.cptjob.io/v1alpha1
kind: CPTJob
metadata:
  name: tiny
spec:
  model:
    storageUri: pvc://models/tiny
  datasets:
    - name: domain
      storageUri: pvc://data/domain
"""


def faults(text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "job.yaml")
    return str(caught.value).splitlines()


def test_a_good_manifest_is_read_with_kubernetes_numbers() -> None:
    text = GOOD + "  training: {learningRate: 2e-5, epochs: 3.0, deterministic: yes}\n"
    training = parse_manifest(text).job.spec.training
    assert (training.learning_rate, training.epochs, training.deterministic) == (2e-5, 3, True)


def test_a_misspelt_field_is_told_with_its_line_and_the_nearest_one() -> None:
    assert faults(GOOD + "  training:\n    learnigRate: 2e-5\n") == [
        "job.yaml:12: spec.training.learnigRate: unknown field; did you mean learningRate?"
    ]


def _places(model: type[BaseModel], above: Place) -> Iterator[tuple[Place, str]]:
    for name, field in fields(model).items():
        yield above, name
        inner, items = as_model(field.annotation), item(field.annotation)
        if inner:
            yield from _places(inner, (*above, name))
        elif as_model(items):
            yield from _places(items, (*above, name, 0))


@pytest.mark.parametrize(
    ("above", "name"),
    [each for each in _places(CPTJobSpec, ("spec",)) if len(each[1]) > 4],
    ids=lambda part: part if isinstance(part, str) else show(part),
)
def test_a_slip_in_any_field_at_any_level_names_that_field(above: Place, name: str) -> None:
    slip = name[0] + name[2] + name[1] + name[3:]
    if slip == name:
        slip = name[:-1]
    document = _holding(above, slip)
    _, found = read_job(document)
    messages = {show(each.path): each.message for each in found}
    assert messages[show((*above, slip))] == f"unknown field; did you mean {name}?"


def _holding(above: Place, key: str) -> dict[str, Any]:
    """A document that is nothing but the way to a key."""
    inner: Any = {key: 1}
    for part in reversed(above):
        inner = [inner] if isinstance(part, int) else {part: inner}
    return {"apiVersion": "training.cptjob.io/v1alpha1", "kind": "CPTJob", **inner}


@pytest.mark.parametrize(
    ("slip", "right"),
    [("learning_rate", "learningRate"), ("LearningRate", "learningRate"), ("wingspan", "")],
)
def test_other_ways_to_write_a_word_are_understood(slip: str, right: str) -> None:
    (fault,) = faults(GOOD + f"  training: {{{slip}: 1e-4}}\n")
    expected = f"did you mean {right}?" if right else "known here: activationCheckpointing, "
    assert expected in fault


def test_all_faults_are_told_at_once_in_the_order_of_their_lines() -> None:
    text = """\
apiVersion: training.cptjob.io/v1alpha1
kind: CPTJob
metadata:
  name: Tiny
spec:
  task: causalLM
  model:
    storageUri: pcv://models/tiny
  datasets:
    - name: a
      version: 3
      weight: 0
  training:
    seed: yes
    epochs: 2.5
    optimizer: {betas: [0.9]}
    lora: []
  checkpoint:
    keepLast: 0
  scheduling: {nodeNames: [a]}
  trainer:
    numNodes: "3"
    env: [{name: A, value: on}]
  suspend: maybe
"""
    uri = "write pvc://CLAIM/path, or file:///path in a local run, without '..' in it"
    assert [fault.removeprefix("job.yaml:") for fault in faults(text)] == [
        "4: metadata.name: must be lower-case letters, digits and '-', from a letter to a letter "
        "or digit",
        "6: spec.task: must be one of CausalLM, MaskedLM, TextClassification, ImageClassification, "
        'not "causalLM"; did you mean CausalLM?',
        f"8: spec.model.storageUri: {uri}",
        "10: spec.datasets[0].storageUri: required: the file or directory of .jsonl files",
        "11: spec.datasets[0].version: must be text, not 3; put it in quotes",
        "12: spec.datasets[0].weight: must be greater than 0, not 0; left out, it means: "
        "by its rows for Domain, 0.05 among them all for General",
        "14: spec.training.seed: must be a whole number, not true",
        "15: spec.training.epochs: must be a whole number, not 2.5",
        "16: spec.training.optimizer.betas[1]: required",
        "17: spec.training.lora: must be a mapping, not a list",
        "19: spec.checkpoint.keepLast: must be at least 1, not 0; left out, it means: all",
        "20: spec.scheduling.nodeNames: nodeNames are for mode Manual; set mode: Manual or leave "
        "them out",
        '22: spec.trainer.numNodes: must be a whole number, not "3"; take away the quotes',
        "23: spec.trainer.env[0].value: must be text, not true; put it in quotes",
        '24: spec.suspend: must be true or false, not "maybe"',
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training: {maxLength: 4}", "maxLength: must be at least 8, not 4"),
        ("training: {learningRate: 2}", "learningRate: must be at most 1, not 2"),
        ("training: {learningRate: 0}", "learningRate: must be greater than 0, not 0"),
        ("training: {dropout: {hidden: 1}}", "hidden: must be less than 1, not 1"),
        ("trainer: {numNodes: 501}", "numNodes: must be at most 500, not 501"),
        ("checkpoint: {keepLast: 5001}", "keepLast: must be at most 5000, not 5001"),
        (
            "checkpoint: {maxBandwidth: fast}",
            '"fast" is not a number of bytes a second; write it such as 200Mi',
        ),
        ("scheduling: {nodeNames: []}\n  trainer: {env: [{}]}", "env[0].name: required: name of"),
        ("managedBy: ''", "managedBy: must have at least 1 character"),
        ("training: {lora: {targetModules: []}}", "targetModules: must have at least 1 item"),
        ("training: [a]", "spec.training: must be a mapping, not a list"),
        ("training: fast", 'spec.training: must be a mapping, not "fast"'),
        ("trainer: {numNodes: 99999999999999999999999}", "numNodes: must be"),
    ],
)
def test_a_value_out_of_bounds_is_told_with_the_bound(line: str, message: str) -> None:
    assert message in "\n".join(faults(f"{GOOD}  {line}\n"))


@pytest.mark.parametrize(
    ("given", "shown"),
    [("8Gb", '"8Gb"'), ('"8 GiB"', '"8 GiB"'), ("all", '"all"')],
)
def test_what_is_no_quantity_is_told_with_an_example(given: str, shown: str) -> None:
    line = f"trainer: {{resourcesPerNode: {{limits: {{memory: {given}}}}}}}"
    assert faults(f"{GOOD}  {line}\n") == [
        f"job.yaml:11: spec.trainer.resourcesPerNode.limits.memory: {shown} is not a quantity; "
        "write a number with or without a unit, such as 8Gi, 500m or 2"
    ]


def test_every_pattern_has_its_words() -> None:
    patterns = set(re.findall(r"^ *pattern: (.*)$", crd.text(), re.MULTILINE))
    assert {each.strip("'") for each in patterns} == set(FORMS)


DATASET = "    - {{name: {}, storageUri: pvc://d/{}{}}}\n"


@pytest.mark.parametrize(
    ("further", "told"),
    [
        (
            [("a", ""), ("a", "")],
            [
                "job.yaml:11: spec.datasets[1].name: a is named 2 times; names must be unique",
                "job.yaml:12: spec.datasets[2].name: a is named 2 times; names must be unique",
            ],
        ),
        (
            [("web", ", role: General, weight: 1.5")],
            [
                "job.yaml:11: spec.datasets[1].weight: web has 1.5; weights of General data sets are "
                "shares of all tokens and must sum to less than 1"
            ],
        ),
        (
            [("a", ", weight: 2")],
            [
                "job.yaml:9: spec.datasets[0]: domain has none; give all Domain data sets a weight, "
                "or none of them"
            ],
        ),
    ],
)
def test_the_data_sets_at_fault_are_named_with_their_lines(
    further: list[tuple[str, str]], told: list[str]
) -> None:
    more = "".join(DATASET.format(name, index, rest) for index, (name, rest) in enumerate(further))
    assert faults(GOOD + more) == told


def test_variables_of_the_launcher_are_named_with_their_lines() -> None:
    (told,) = faults(f"{GOOD}  trainer:\n    env:\n    - {{name: A}}\n    - {{name: HOME}}\n")
    assert told.startswith("job.yaml:14: spec.trainer.env[1].name: HOME; RANK, LOCAL_RANK, ")


def test_too_many_data_sets_are_refused() -> None:
    many = "".join(f"    - {{name: d{n}, storageUri: pvc://d/{n}}}\n" for n in range(64))
    assert faults(GOOD + many) == ["job.yaml:8: spec.datasets: must have at most 64 items"]


def test_null_means_left_out_as_it_does_to_the_api_server() -> None:
    text = GOOD + "  training: {learningRate: null, seed: ~}\n  output:\n"
    spec = parse_manifest(text).job.spec
    assert (spec.training.learning_rate, spec.training.seed) == (None, 0)


def test_only_jobs_are_taken_and_the_rest_is_noted() -> None:
    claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: x}\n"
    manifest = parse_manifest(f"{claim}---\n{GOOD}", "job.yaml")
    assert manifest.job.metadata.name == "tiny"
    assert manifest.notes == (
        "job.yaml:1: v1 PersistentVolumeClaim is passed over; only CPTJob is read",
    )


def test_one_job_is_needed_where_one_is_asked_for() -> None:
    manifest = parse_manifest(f"{GOOD}---\n{GOOD.replace('tiny', 'other')}", "job.yaml")
    assert [job.metadata.name for job in manifest.jobs] == ["tiny", "other"]
    with pytest.raises(ManifestError, match=r"job.yaml:12: a further CPTJob begins here, other; o"):
        _ = manifest.job


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job.yaml: there is no CPTJob in it"),
        ("# nothing\n", "job.yaml: there is no CPTJob in it"),
        ("a\n", "job.yaml:1: must be a mapping with apiVersion, kind, metadata and spec"),
        ("kind: Pod\napiVersion: v1\n", "there is no CPTJob in it (job.yaml:1: v1 Pod is passed"),
        (GOOD.replace("CPTJob", "CPTjob"), 'kind: must be CPTJob, not "CPTjob"; did you mean'),
        (GOOD.replace("v1alpha1", "v1"), "apiVersion: must be training.cptjob.io/v1alpha1, not"),
        (GOOD.replace("kind: CPTJob\n", ""), "job.yaml:1: kind: required; write kind: CPTJob"),
        (
            GOOD.replace("  name: tiny", "  nmae: tiny"),
            "metadata.nmae: unknown field; did you mean",
        ),
    ],
)
def test_what_is_no_job_is_told_so(text: str, message: str) -> None:
    assert message in "\n".join(faults(text))


def test_files_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"none.yaml: cannot be read: No such file"):
        load_manifest(tmp_path / "none.yaml")
    with pytest.raises(MissingInputError, match="Is a directory"):
        load_manifest(tmp_path)
    broken = tmp_path / "latin.yaml"
    broken.write_bytes(b"a: \xe9\n")
    with pytest.raises(ManifestError, match=r"latin.yaml: not UTF-8 text"):
        load_manifest(broken)


def test_the_line_of_any_field_can_be_asked_for() -> None:
    manifest = parse_manifest(GOOD)
    assert manifest.line(manifest.job, "spec.datasets[0].storageUri") == 10
    assert manifest.line(manifest.job, "spec.training.seed") == 5


def test_json_is_a_manifest_too() -> None:
    text = json.dumps(yaml.safe_load(GOOD))
    assert parse_manifest(text).job == parse_manifest(GOOD).job


def test_a_place_is_read_as_it_is_shown() -> None:
    for place in ("spec.datasets[2].weight", "metadata.name", "spec"):
        assert show(as_path(place)) == place


def test_a_status_of_a_newer_operator_is_no_fault() -> None:
    job, found = read_job(yaml.safe_load(GOOD) | {"status": {"phase": "Running", "news": {"a": 1}}})
    assert found == []
    assert isinstance(job, CPTJob)
