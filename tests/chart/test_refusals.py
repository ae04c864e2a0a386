"""What the operator refuses at its start is refused by helm before anything is installed."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from cptjob_api.faults import explain
from cptjob_operator import settings
from cptjob_operator.settings import Settings
from cptjob_trainer.errors import CPTJobError
from helmchart import Helm, HelmError

Schema = dict[str, Any]
Place = tuple[str | int, ...]

# --- rules over several fields, and over what a pattern alone says badly --------------------------

ONE = {"a": {}}
#: By each rule of the operator: settings that break it, those that just do not, and the place.
BROKEN: dict[str, list[tuple[Schema, Schema | None, str]]] = {
    "_default_pool": [
        ({"jobs": {"pool": "b"}}, {"jobs": {"pool": "default"}}, "jobs.pool"),
        ({"jobs": {"pool": "b"}, "pools": ONE}, {"jobs": {"pool": "a"}, "pools": ONE}, "jobs.pool"),
        ({"jobs": {"pool": "default"}, "pools": ONE}, None, "jobs.pool"),
    ],
    "_default_output": [
        ({"jobs": {"outputUri": bad}}, {"jobs": {"outputUri": good}}, "jobs.outputUri")
        for bad, good in (
            ("results", "pvc://results"),
            ("s3://results/all", "pvc://results/all"),
            ("pvc:/results", "pvc://results/"),
            ("pvc://results/../other", "pvc://results/..other/.a/./a..b/..."),
            ("pvc://results/..", "pvc://results/a b"),
            ("pvc://Results", "pvc://my.results"),
        )
    ],
    "_values_of_tolerations": [
        (
            {"pools": {"a": {"tolerations": [{"key": "one"}, {"key": "two", "value": "on"}]}}},
            {"pools": {"a": {"tolerations": [{"key": "two", "operator": "Equal", "value": "on"}]}}},
            "pools.a.tolerations[1].value",
        )
    ],
    "_extra_resources": [
        (
            {"pools": {"a": {"extraResources": {"rdma/hca": bad}}}},
            {"pools": {"a": {"extraResources": {"rdma/hca": good}}}},
            "pools.a.extraResources.rdma/hca",
        )
        for bad, good in (("500m", 0), (-1, "1"), (0.5, 1_000_000))
    ],
    "_sizes": [
        ({"pools": {"a": {field: bad}}}, {"pools": {"a": {field: good}}}, f"pools.a.{field}")
        for field in ("shmSize", "scratchSize")
        for bad, good in (
            ("1.5Gi", "1536Mi"),
            (0, 1),
            (-1, 1_073_741_824),
            ("1m", "1k"),
            ("9999999Ti", "999999Ti"),
        )
    ],
    "_security": [
        (
            {"pools": {"a": {"security": {"profile": "baseline"}}}},
            {"pools": {"a": {"security": {"profile": "baseline", "namespaces": ["team"]}}}},
            "pools.a.security.namespaces",
        )
    ],
    "_lease": [
        ({"leader": bad}, {"leader": good}, "leader.renewSeconds")
        for bad, good in (
            ({"leaseSeconds": 9}, {"leaseSeconds": 10}),
            ({"renewSeconds": 7.6}, {"renewSeconds": 7.5}),
            ({"leaseSeconds": 3, "renewSeconds": 2}, {"leaseSeconds": 4, "renewSeconds": 2}),
        )
    ],
    "_backoff": [
        ({"timing": {"backoff": bad}}, {"timing": {"backoff": good}}, "timing.backoff.capSeconds")
        for bad, good in (
            ({"capSeconds": 9.5}, {"capSeconds": 10}),
            ({"baseSeconds": 601}, {"baseSeconds": 600}),
            ({"baseSeconds": 2, "capSeconds": 1}, {"baseSeconds": 1, "capSeconds": 1}),
        )
    ],
}
CASES = [(name, *case) for name, cases in BROKEN.items() for case in cases]


def test_every_rule_of_the_operator_is_tried_here() -> None:
    assert [rule.__name__ for rule in settings.RULES] == list(BROKEN)


@pytest.mark.parametrize(("rule", "bad", "good", "place"), CASES, ids=str)
def test_what_breaks_a_rule_is_refused_by_both_and_what_does_not_is_taken_by_both(
    rule: str, bad: Schema, good: Schema | None, place: str, helm: Helm
) -> None:
    with pytest.raises(CPTJobError) as caught:
        settings.parse(json.dumps(bad))
    (line,) = str(caught.value).splitlines()
    assert f": {place}: " in line
    with pytest.raises(HelmError) as refused:
        helm.template({"settings": bad})
    # A rule of the schema is told by the place, one of the chart by the operator's own words.
    pointer = re.sub(r"\[(\d+)\]", r".\1", place.replace("/", "~1")).replace(".", "/")
    words = line.partition(f": {place}: ")[2]
    said = str(refused.value)
    assert f"at '/settings/{pointer}': " in said or f"settings.{place}: {words}" in said
    if good is not None:
        settings.parse(helm.template({"settings": good}).settings())


# --- every bound of every field -------------------------------------------------------------------


class Bad(NamedTuple):
    """A value that the types refuse. told: where helm says it."""

    place: Place
    value: Any
    told: Place


def _resolved(schema: Schema, root: Schema) -> Schema:
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema and not schema.get("quantity"):
        (inner,) = (each for each in schema["anyOf"] if each.get("type") != "null")
        return _resolved(inner, root)
    return schema


def _sample(schema: Schema, root: Schema) -> Any:
    """The least that is taken."""
    schema = _resolved(schema, root)
    match schema.get("type"):
        case "object":
            return {
                name: _sample(schema["properties"][name], root)
                for name in schema.get("required", ())
            }
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "array":
            return []
        case _:
            return schema.get("enum", ["1"])[0]


def _spoilt(schema: Schema, root: Schema, at: Place = ()) -> Iterator[Bad]:
    """Every way to break each bound."""
    schema = _resolved(schema, root)
    if schema.get("quantity"):
        yield from (Bad(at, each, at) for each in ("many", True, "1" * 33))
        return
    match schema["type"]:
        case "object":
            yield Bad(at, 5, at)
            yield from _spoilt_mapping(schema, root, at)
        case "array":
            yield Bad(at, "one", at)
            if most := schema.get("maxItems"):
                item = _sample(schema["items"], root)
                yield Bad(at, [f"a{n}" if item == "1" else item for n in range(most + 1)], at)
            yield from _spoilt(schema["items"], root, (*at, 0))
        case "string":
            yield Bad(at, 5, at)
            yield from (Bad(at, each, at) for each in _spoilt_text(schema))
        case "integer" | "number":
            yield Bad(at, "five", at)
            yield from (Bad(at, each, at) for each in _spoilt_number(schema))


def _spoilt_mapping(schema: Schema, root: Schema, at: Place) -> Iterator[Bad]:
    if "properties" in schema:
        yield Bad((*at, "unheardOf"), 1, at)
        if schema.get("required"):
            yield Bad(at, {}, at)
        for name, field in schema["properties"].items():
            yield from _spoilt(field, root, (*at, name))
        return
    ((_, inner),) = schema.get(
        "patternProperties", {"": schema.get("additionalProperties")}
    ).items()
    if "patternProperties" in schema:
        yield Bad((*at, "?"), _sample(inner, root), at)
    yield Bad((*at, "a" * 318), _sample(inner, root), at)
    yield Bad(at, {f"a{n}": _sample(inner, root) for n in range(schema["maxProperties"] + 1)}, at)
    if schema.get("minProperties"):
        yield Bad(at, {}, at)
    yield from _spoilt(inner, root, (*at, "a"))


def _spoilt_text(schema: Schema) -> Iterator[str]:
    if "enum" in schema:
        yield "nothing"
    if schema.get("minLength"):
        yield ""
    if "maxLength" in schema:
        yield "a" * (schema["maxLength"] + 1)
    if "pattern" in schema:
        yield "?"


def _spoilt_number(schema: Schema) -> Iterator[float]:
    if "minimum" in schema:
        yield schema["minimum"] - 1
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"]
    if "maximum" in schema:
        yield schema["maximum"] + 1
    if schema["type"] == "integer":
        yield schema.get("minimum", 1) + 0.5


def _put(document: Any, place: Place, value: Any) -> None:
    for part, after in pairwise(place):
        if isinstance(document, list) and not document:
            document.append([] if isinstance(after, int) else {})
        empty: Any = [] if isinstance(after, int) else {}
        document = (
            document[part] if isinstance(document, list) else document.setdefault(part, empty)
        )
    if isinstance(document, list):
        document.append(value)
    else:
        document[place[-1]] = value


def _documents(bad: list[Bad]) -> Iterator[tuple[Schema, list[Bad]]]:
    """Few documents that together have all: what lies within something else goes into another."""
    left = bad
    while left:
        document: Schema = {}
        taken: list[Bad] = []
        rest: list[Bad] = []
        for each in left:
            if any(_overlap(each.place, other.place) for other in taken):
                rest.append(each)
            else:
                _put(document, each.place, each.value)
                taken.append(each)
        yield document, taken
        left = rest


def _overlap(one: Place, other: Place) -> bool:
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _read(document: Schema) -> list[Place]:
    """Where the operator finds faults."""
    try:
        Settings.from_json(json.dumps(document))
    except ValidationError as error:
        return [each.path for each in explain(error, Settings)]
    return []


ROOT = Settings.model_json_schema(by_alias=True)
ALL = [each for each in _spoilt(ROOT, ROOT) if each.place]
DOCUMENTS = list(_documents(ALL))


def test_every_field_has_bounds_that_are_tried() -> None:
    assert len(ALL) > 250
    assert len(DOCUMENTS) < 30


@pytest.mark.parametrize(("document", "faults"), DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_what_the_types_refuse_helm_refuses_at_the_same_place(
    document: Schema, faults: list[Bad], helm: Helm
) -> None:
    read = _read(document)
    with pytest.raises(HelmError) as refused:
        helm.template({"settings": document})
    told = set(re.findall(r"^ *- at '([^']*)'", str(refused.value), re.MULTILINE))
    for each in faults:
        assert any(_overlap(place, each.place) for place in read), f"{each} is taken"
        pointer = "".join(f"/{part}" for part in ("settings", *each.told))
        below = [place for place in told if place == pointer or place.startswith(f"{pointer}/")]
        assert below, f"helm takes {each}"


# --- what only the operator can judge -------------------------------------------------------------


def test_only_the_operator_sees_a_file_that_the_chart_did_not_write(tmp_path: Path) -> None:
    # One that is missing, is no text, holds no mapping or two documents: the chart writes none of
    # these.
    file = tmp_path / "settings.yaml"
    for text in (None, b"\xe9", b"- a", b"a: 1\n---\nb: 1"):
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(CPTJobError):
            settings.load(file)
