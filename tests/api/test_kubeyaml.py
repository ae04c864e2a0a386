"""YAML as Kubernetes reads it. golden/yaml.jsonl is what kubernetes/readyaml said."""

import json
import pathlib
from typing import Any

import pytest

from cptjob_api.kubeyaml import Document, documents
from cptjob_trainer.errors import ManifestError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "yaml.jsonl"


def read(text: str) -> Document:
    (document,) = documents(text, "a.yaml")
    return document


def golden() -> list[dict[str, Any]]:
    return [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("said", golden(), ids=lambda said: repr(said["in"]))
def test_a_text_means_what_it_means_to_kubernetes(said: dict[str, Any]) -> None:
    if "err" in said:
        with pytest.raises(ManifestError):
            list(documents(said["in"], "a.yaml"))
        return
    found = next((each.value for each in documents(said["in"], "a.yaml")), None)
    # As text, because 1 == True == 1.0 in Python.
    assert json.dumps(found, sort_keys=True) == json.dumps(said["out"], sort_keys=True)


def test_the_golden_file_has_the_traps() -> None:
    traps = {"a: 2e-5", "a: on", "a: y", "a: 12:30:45", "a: 2001-01-01", "a: 017", "a: 1_000"}
    assert traps <= {said["in"] for said in golden()}


def test_each_value_knows_its_line() -> None:
    document = read("a: 1\n\nb:\n  - x\n  - c: 2\n    d: |\n      text\n")
    assert document.line_of(("a",)) == 1
    assert document.line_of(("b",)) == 3
    assert document.line_of(("b", 0)) == 4
    assert document.line_of(("b", 1, "d")) == 6


def test_a_value_that_is_not_written_has_the_line_of_what_holds_it() -> None:
    assert read("a: 1\nb:\n  c: 2\n").line_of(("b", "missing", "deeper")) == 2


def test_lines_count_through_several_documents() -> None:
    first, second = documents("a: 1\n---\n\nb: 2\n", "a.yaml")
    assert (first.line_of(("a",)), second.line_of(("b",))) == (1, 4)


def test_empty_documents_are_passed_over() -> None:
    assert [each.value for each in documents("---\n# words\n---\na: 1\n---\n", "a.yaml")] == [
        {"a": 1}
    ]


def test_all_duplicate_keys_are_refused_with_both_lines() -> None:
    with pytest.raises(ManifestError) as caught:
        read("a: 1\nb: {c: 1, c: 2}\na: 2\n")
    assert str(caught.value).splitlines() == [
        "a.yaml:2: c is given twice, first on line 2",
        "a.yaml:3: a is given twice, first on line 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\n", "a.yaml:2: not YAML: while parsing a flow node"),
        ("a: 1\n\tb: 2\n", "a.yaml:2: not YAML: .*cannot start any token"),
        ("a: *nowhere\n", "a.yaml:1: not YAML: found undefined alias"),
        ("a: &a [*a]\n", "a.yaml:1: an anchor contains itself"),
        ("a: .inf\n", "a.yaml:1: .inf is no number that JSON knows"),
        ("? [a]\n: 1\n", "a.yaml:1: a key must be text"),
        ("a: !!int no\n", "a.yaml:1: 'no' is no int"),
        ("a: \x00\n", "a.yaml: not YAML: "),
        ("[" * 5000, "a.yaml"),
        ("a: 1 # " + "x" * (1 << 20), "a.yaml: larger than 1 MiB"),
        ("<<: 5\n", "a.yaml:1: << needs a mapping"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        list(documents(text, "a.yaml"))


def test_aliases_cannot_multiply_without_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ManifestError, match="more than 100000 values"):
        read("\n".join(lines))


def test_a_merge_brings_fields_in() -> None:
    document = read("base: &base {a: 1, b: 2}\nuse:\n  <<: *base\n  c: 3\n")
    assert document.value["use"] == {"a": 1, "b": 2, "c": 3}
