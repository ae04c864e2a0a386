"""The CustomResourceDefinition and the field reference."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cptjob_api import crd, generate, reference
from cptjob_api.fields import as_model, fields, item
from cptjob_api.kubeyaml import documents
from cptjob_api.manifest import load_manifest
from cptjob_api.spec import CPTJobSpec
from cptjob_api.status import CPTJobStatus

ROOT = Path(__file__).parents[2]
Schema = dict[str, Any]
MakeJob = Callable[..., dict[str, Any]]


def walk(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from walk(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], f"{path}[]")


def at(place: str) -> Schema:
    return dict(walk(crd.schema()))[place]


NODES = [
    each for each in walk(crd.schema()) if each[0] not in (".metadata", ".apiVersion", ".kind")
]


def test_nothing_that_is_generated_is_stale() -> None:
    assert generate.stale(ROOT) == []


def test_a_stale_or_missing_file_is_named_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--root", str(tmp_path)]) == 0
    assert generate.main(["--root", str(tmp_path), "--check"]) == 0
    (tmp_path / "docs" / "cptjob.md").write_text("old")
    (tmp_path / "crds" / "training.cptjob.io_cptjobs.yaml").unlink()
    assert generate.main(["--root", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "crds/training.cptjob.io_cptjobs.yaml is stale: run `make generate`",
        "docs/cptjob.md is stale: run `make generate`",
    ]


def test_the_file_is_the_definition() -> None:
    (document,) = documents(crd.text(), "crd.yaml")
    assert document.value == json.loads(json.dumps(crd.definition()))


# What https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources asks of a schema.
@pytest.mark.parametrize(("path", "schema"), NODES, ids=[path or "root" for path, _ in NODES])
def test_the_schema_is_structural_and_bounded(path: str, schema: Schema) -> None:
    forbidden = {"$ref", "$defs", "title", "allOf", "oneOf", "not", "const", "prefixItems", "rule"}
    assert not forbidden & set(schema)
    if schema.get("x-kubernetes-int-or-string"):
        assert schema["anyOf"] == [{"type": "integer"}, {"type": "string"}]
        return
    assert "anyOf" not in schema
    assert schema["type"] in ("object", "array", "string", "integer", "number", "boolean")
    assert not ("properties" in schema and "additionalProperties" in schema)
    if schema["type"] == "object":
        assert "properties" in schema or isinstance(schema["additionalProperties"], dict)
    if schema["type"] == "array":
        assert isinstance(schema["items"], dict)
        assert schema["maxItems"] > 0
        assert schema["x-kubernetes-list-type"] in ("map", "set", "atomic")
    if schema["type"] == "string":
        assert {"maxLength", "enum", "format"} & set(schema)
    for end in ("exclusiveMinimum", "exclusiveMaximum"):
        assert schema.get(end, True) is True


@pytest.mark.parametrize(
    ("path", "schema"),
    [each for each in NODES if each[1].get("x-kubernetes-list-type") == "map"],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_the_key_of_a_list_map_is_always_there(path: str, schema: Schema) -> None:
    (key,) = schema["x-kubernetes-list-map-keys"]
    assert key in schema["items"]["required"]


def test_defaults_are_constants_that_the_types_share(job: MakeJob) -> None:
    for path, schema in walk(crd.structural(CPTJobSpec)):
        if "default" in schema and schema["default"] != {}:
            field = _field(path)
            given = list(field.default) if isinstance(field.default, tuple) else field.default
            assert schema["default"] == given, path


def test_what_depends_on_the_model_or_the_platform_has_no_default() -> None:
    for path in (
        ".training.learningRate",
        ".training.maxLength",
        ".training.batchSizePerDevice",
        ".training.globalBatchSize",
        ".training.epochs",
        ".trainer.image",
        ".trainer.serviceAccountName",
        ".trainer.numProcPerNode",
    ):
        assert "default" not in at(f".spec{path}"), path
        assert "Left out: " in at(f".spec{path}")["description"], path


def _field(path: str) -> Any:
    model: Any = CPTJobSpec
    found = None
    for name in path.strip(".").split("."):
        known = as_model(model)
        assert known is not None
        found = fields(known)[name.removesuffix("[]")]
        model = found.annotation if not name.endswith("[]") else item(found.annotation)
    return found


@pytest.mark.parametrize("model", [CPTJobSpec, CPTJobStatus])
def test_each_field_has_a_sentence_and_a_default_or_a_rule(model: Any) -> None:
    for path, schema in walk(crd.structural(model)):
        name = path.rpartition(".")[2]
        if path and not name.endswith("[]"):
            assert schema["description"].endswith("."), path
    if model is CPTJobSpec:
        for path, schema in walk(crd.structural(model)):
            optional = {*schema.get("properties", {})} - {*schema.get("required", [])}
            for name in optional:
                inner = schema["properties"][name]
                left_out = "Left out: " in inner["description"]
                empty = inner["type"] in ("array", "object")
                assert "default" in inner or left_out or empty, f"{path}.{name}"


def test_a_fresh_object_has_observed_nothing() -> None:
    assert at(".status")["default"] == {"observedGeneration": -1}


def test_names_columns_and_subresources_are_as_promised() -> None:
    spec = crd.definition()["spec"]
    (version,) = spec["versions"]
    assert (spec["names"]["shortNames"], spec["scope"]) == (["cpt"], "Namespaced")
    assert [(c["name"], c.get("priority", 0)) for c in version["additionalPrinterColumns"]] == [
        ("State", 0),
        ("Nodes", 0),
        ("Step", 0),
        ("Progress", 0),
        ("Restarts", 0),
        ("Checkpoint", 0),
        ("ETA", 1),
        ("Pool", 1),
        ("Age", 0),
    ]
    assert set(version["subresources"]) == {"status", "scale"}


def test_columns_and_scale_point_at_fields_that_there_are() -> None:
    known = {path for path, _ in walk(crd.schema())}
    (version,) = crd.definition()["spec"]["versions"]
    paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
    paths += version["subresources"]["scale"].values()
    assert [path for path in paths if path not in known] == [".metadata.creationTimestamp"]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (".spec.datasets", {"maxItems": 64, "x-kubernetes-list-map-keys": ["name"]}),
        (".spec.datasets[].weight", {"minimum": 0, "exclusiveMinimum": True}),
        (".spec.checkpoint.keepLast", {"minimum": 1, "maximum": 5000, "type": "integer"}),
        (".spec.checkpoint.everySteps", {"default": 2000}),
        (".spec.trainer.numNodes", {"minimum": 1, "maximum": 500, "default": 1}),
        (".spec.scheduling.nodeNames", {"x-kubernetes-list-type": "set", "maxItems": 500}),
        (".spec.training.optimizer.betas", {"minItems": 2, "maxItems": 2, "type": "array"}),
        (".spec.training.method", {"enum": ["Full", "LoRA"], "default": "Full"}),
    ],
)
def test_the_promised_bounds_are_in_the_schema(place: str, expected: Schema) -> None:
    assert expected.items() <= at(place).items()


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "examples").glob("*.yaml")), ids=str)
def test_the_examples_are_valid_to_the_schema(path: Path) -> None:
    validator = jsonschema.Draft4Validator(crd.schema())
    for document in load_manifest(path).documents:
        validator.validate(document.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.checkpoint.keepLast", 0),
        ("spec.datasets[0].weight", 0),
        ("spec.training.learningRate", 0),
        ("spec.training.dropout.hidden", 1),
        ("spec.trainer.numNodes", 501),
        ("spec.training.optimizer.betas", [0.9]),
        ("spec.task", "Other"),
        ("spec.datasets[0].name", "Upper"),
    ],
)
def test_bad_values_are_invalid_to_the_schema(place: str, value: Any, job: MakeJob) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(crd.schema()).validate(job({place: value}))


def test_the_reference_has_a_row_for_every_field() -> None:
    text = reference.text()
    for root, model in (("spec", CPTJobSpec), ("status", CPTJobStatus)):
        for path, _ in walk(crd.structural(model), root):
            if path != root and not path.endswith("[]"):
                assert f"| `{path}` |" in text, path


def test_the_reference_says_default_rule_and_bounds() -> None:
    text = reference.text()
    for row in (
        "| `spec.checkpoint.everySteps` | integer | `2000` | ≥ 1; ≤ 100000000 | Steps between two "
        "checkpoints. |",
        "| `spec.training.learningRate` | number | 2e-5 for Full, 1e-4 for LoRA | > 0; ≤ 1 | Peak "
        "learning rate. |",
        "| `spec.data.maxBadLines` | integer | `0` | ≥ 0; ≤ 1000000 | Broken lines in all files "
        "together that are skipped; one more fails the job. |",
    ):
        assert row in text
