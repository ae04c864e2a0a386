"""Any job that the schema of the CRD takes and no static rule refuses, for hypothesis.

A sound job gets a few fields with any value that their schema allows. So new fields are tried from
the day that they are in the types.
"""

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from cptjob_api import crd
from cptjob_api.fields import Path
from cptjob_api.job import CPTJob
from cptjob_api.manifest import read_job
from cptjob_api.spec import CPTJobSpec
from job_cases import put, sound_job

Schema = dict[str, Any]

#: What a generated text may hold at most, whatever its field allows.
LONGEST = 40
MOST_ITEMS = 4
UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"

_TEXT = st.text(st.characters(codec="utf-8"), max_size=LONGEST)
_CLAIMS = st.from_regex(
    r"pvc://[a-z0-9]([-a-z0-9.]{0,9}[a-z0-9])?(/[a-z0-9 é]{1,5}){0,2}", fullmatch=True
)
_URIS = st.one_of(_CLAIMS, st.sampled_from(["s3://bucket/x", "hf://org/name", "pvc://a"]))


def _value(schema: Schema) -> st.SearchStrategy[Any]:
    """Any value that a structural schema allows."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return st.one_of(st.integers(-1, 9), _pattern(schema))
    kind = schema["type"]
    if kind == "object":
        return _object(schema)
    if kind == "array":
        low, high = schema.get("minItems", 0), min(schema.get("maxItems", MOST_ITEMS), MOST_ITEMS)
        return st.lists(_value(schema["items"]), min_size=low, max_size=high)
    if kind == "boolean":
        return st.booleans()
    if kind == "string":
        return _pattern(schema) if "pattern" in schema else _text(schema)
    return _number(schema)


def _object(schema: Schema) -> st.SearchStrategy[Any]:
    if "additionalProperties" in schema:
        keys = st.one_of(
            st.sampled_from(["cpu", "memory", "nvidia.com/gpu", "hugepages-2Mi"]), _TEXT
        )
        return st.dictionaries(keys, _value(schema["additionalProperties"]), max_size=3)
    inner = {name: _named(name, each) for name, each in schema["properties"].items()}
    needed = {name: inner.pop(name) for name in schema.get("required", [])}
    return st.fixed_dictionaries(needed, optional=inner)


def _named(name: str, schema: Schema) -> st.SearchStrategy[Any]:
    return _URIS if name == "storageUri" else _value(schema)


def _pattern(schema: Schema) -> st.SearchStrategy[str]:
    longest = min(schema.get("maxLength", LONGEST), LONGEST)
    drawn = st.from_regex(schema["pattern"], fullmatch=True)
    return drawn.filter(lambda text: len(text) <= longest and not text.endswith("\n"))


def _text(schema: Schema) -> st.SearchStrategy[str]:
    low = schema.get("minLength", 0)
    return st.text(
        st.characters(codec="utf-8"),
        min_size=low,
        max_size=min(schema.get("maxLength", LONGEST), LONGEST),
    )


def _number(schema: Schema) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", 0), schema.get("maximum", 1000)
    if schema["type"] == "integer":
        return st.one_of(st.integers(low, high), st.sampled_from([low, high]))
    return st.floats(
        low,
        high,
        exclude_min=schema.get("exclusiveMinimum", False),
        exclude_max=schema.get("exclusiveMaximum", False),
    )


def _places(
    schema: Schema, above: Path = ("spec",), depth: int = 3
) -> Iterator[tuple[Path, Schema]]:
    """Every field down to a depth, with its schema."""
    for name, each in schema["properties"].items():
        yield (*above, name), each
        # A part that needs certain fields is drawn as a whole.
        if depth > 1 and "properties" in each and "required" not in each:
            yield from _places(each, (*above, name), depth - 1)


PLACES = [
    (path, _named(str(path[-1]), schema)) for path, schema in _places(crd.structural(CPTJobSpec))
]


@st.composite
def documents(draw: st.DrawFn, most: int = 5) -> dict[str, Any]:
    """A job's document with up to `most` fields of any value; a static rule may refuse it."""
    document = sound_job({"spec.output.storageUri": "pvc://results"})
    document["metadata"] |= {"namespace": "team", "uid": UID}
    for path, values in draw(st.lists(st.sampled_from(PLACES), max_size=most)):
        put(document, path, draw(values))
    return document


def jobs(most: int = 5) -> st.SearchStrategy[CPTJob]:
    """Jobs that keep the static rules."""

    def read(document: dict[str, Any]) -> CPTJob | None:
        job, found = read_job(document)
        return None if found else job

    return documents(most).map(read).filter(lambda job: job is not None)  # type: ignore[return-value]
