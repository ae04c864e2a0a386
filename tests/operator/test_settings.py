"""The platform's settings: strict, every fault with its line, every field explained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cptjob_operator.settings import Settings, load, parse
from cptjob_trainer.errors import ManifestError, MissingInputError


def faults(text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse(text, "settings.yaml")
    return [line.removeprefix("settings.yaml:") for line in str(caught.value).splitlines()]


def test_nothing_said_means_all_defaults() -> None:
    assert parse("") == parse("# nothing\n") == Settings()
    assert Settings().default_pool == "default"


def test_what_is_said_is_taken() -> None:
    settings = parse(
        """
        jobs: {image: ours:1, serviceAccountName: trainer, pool: gold, outputUri: pvc://runs/all}
        pools:
          gold:
            gpuProducts: [NVIDIA-H100-80GB-HBM3]
            tolerations: [{key: gpu, operator: Equal, value: "yes", effect: NoSchedule}]
            extraResources: {rdma/hca: 1}
          silver: {labelKey: node-restriction.kubernetes.io/pool, labelValue: ag}
        limits: {maxNodes: 16}
        timing: {backoff: {baseSeconds: 1}}
        watchedNamespaces: [team]
        """
    )
    gold = settings.pools["gold"]
    assert (settings.jobs.image, settings.jobs.pool) == ("ours:1", "gold")
    assert gold.tolerations[0].value == "yes"
    assert gold.extra_resources == {"rdma/hca": "1"}
    assert settings.pools["silver"].label_value == "ag"
    assert (settings.limits.max_nodes, settings.timing.backoff.base_seconds) == (16, 1)


def test_every_fault_is_told_with_its_line_and_the_nearest_word() -> None:
    text = """\
jobs:
  imge: ours:1
  instanceGpus: {p4: many}
pools:
  gold:
    gpuProduct: [x]
    tolerations: [{operator: Exists}]
    security: {profile: privileged}
limits: {maxNodes: 501}
timing:
  writes: {burst: 0}
"""
    assert faults(text) == [
        "2: jobs.imge: unknown field; did you mean image?",
        '3: jobs.instanceGpus.p4: must be a whole number, not "many"',
        "6: pools.gold.gpuProduct: unknown field; did you mean gpuProducts?",
        "7: pools.gold.tolerations[0].key: required: key of the taint",
        '8: pools.gold.security.profile: must be one of restricted, baseline, not "privileged"',
        "9: limits.maxNodes: must be at most 500, not 501",
        "11: timing.writes.burst: must be at least 1, not 0",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("jobs: {pool: gold}", "jobs.pool: there is no pool gold; pools: default"),
        ("jobs: {outputUri: runs}", "jobs.outputUri: write pvc://CLAIM/path"),
        ("jobs: {outputUri: s3://bucket}", "and not s3://bucket; nothing else can be written to"),
        ("pools: {}", "pools: must have at least 1 item"),
        ("pools: {a: {tolerations: [{key: a, value: b}]}}", "value: goes with operator: Equal"),
        ("pools: {a: {extraResources: {rdma/hca: 500m}}}", "rdma/hca: must be a whole number"),
        ("pools: {a: {shmSize: 0}}", "shmSize: must be a number of bytes such as 1536Mi, not 0"),
        ("pools: {a: {scratchSize: 1m}}", "must be a number of bytes such as 1536Mi, not 1m"),
        (
            "pools: {a: {security: {profile: baseline}}}",
            "pools.a.security.namespaces: name those whose jobs get baseline; without any, none",
        ),
        ("leader: {renewSeconds: 10}", "renewSeconds: must be at most half of leaseSeconds"),
        ("timing: {backoff: {capSeconds: 1}}", "capSeconds: must be at least baseSeconds"),
        ("network: {operatorLabels: {}}", "network.operatorLabels: must have at least 1"),
        ("a: 1\n---\nb: 1", "one document is enough"),
        ("- a", "must be a mapping"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, fault: str) -> None:
    (found,) = faults(text)
    assert fault in found


def test_several_pools_and_no_default_mean_that_each_job_names_one() -> None:
    assert parse("pools: {a: {}, b: {}}").default_pool is None
    assert parse("{jobs: {pool: b}, pools: {a: {}, b: {}}}").default_pool == "b"


def test_a_file_is_read_or_its_absence_told(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    with pytest.raises(MissingInputError, match=r"settings.yaml: cannot be read: No such file"):
        load(file)
    file.write_bytes(b"a: \xe9")
    with pytest.raises(ManifestError, match="not UTF-8"):
        load(file)
    file.write_text("limits: {maxNodes: 3}")
    assert load(file).limits.max_nodes == 3


def _fields(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        # A reference has no sentence of its own where the type says the same.
        behind = SCHEMA["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
        yield f"{place}.{name}", behind | field


SCHEMA = Settings.model_json_schema()
FIELDS = [
    each for name, model in {"": SCHEMA, **SCHEMA["$defs"]}.items() for each in _fields(model, name)
]


@pytest.mark.parametrize(("place", "field"), FIELDS, ids=[place for place, _ in FIELDS])
def test_each_field_has_a_sentence_and_bounds(place: str, field: dict[str, Any]) -> None:
    assert field["description"].endswith("."), place
    options = [] if field.get("quantity") else field.get("anyOf", [field])
    for each in options:
        match each.get("type"):
            case "integer" | "number":
                assert {"minimum", "exclusiveMinimum"} & set(each), place
                assert {"maximum", "exclusiveMaximum"} & set(each), place
            case "string":
                assert {"enum", "maxLength", "const"} & set(each), place
            case "array":
                assert "maxItems" in each, place
            case "object" if "properties" not in each:
                assert "maxProperties" in each, place
