"""Any job that can be written can be read again, and means the same to the CRD's schema."""

import json
from typing import Any

import jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cptjob_api import crd
from cptjob_api.job import CPTJob
from cptjob_api.manifest import parse_manifest, read_job

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
URIS = st.builds("pvc://{}/{}".format, NAMES, NAMES)
RATES = st.floats(1e-7, 1e-2, allow_nan=False)
WEIGHTS = st.floats(0.001, 0.015)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda text: text.strip() == text
)


def some(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping in which each field may be left out."""
    return st.fixed_dictionaries({}, optional=optional)


def datasets(weighted: bool) -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.fixed_dictionaries(
        {"name": NAMES, "storageUri": URIS} | ({"weight": WEIGHTS} if weighted else {}),
        optional={"version": TEXT.map(lambda text: text[:20]), "role": st.just("General")},
    )
    domain = st.fixed_dictionaries(
        {"name": st.just("domain-1"), "storageUri": URIS}
        | ({"weight": WEIGHTS} if weighted else {})
    )
    more = st.lists(one, max_size=4, unique_by=lambda each: str(each["name"]))
    return st.tuples(domain, more).map(lambda pair: [pair[0], *pair[1]])


SPECS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"storageUri": URIS}),
        "datasets": st.booleans().flatmap(datasets),
    },
    optional={
        "task": st.sampled_from(["CausalLM", "MaskedLM"]),
        "data": some(maxBadLines=st.integers(0, 9), normalize=st.sampled_from(["None", "NFC"])),
        "training": some(
            method=st.sampled_from(["Full", "LoRA"]),
            learningRate=RATES,
            epochs=st.integers(1, 9),
            systemPrompt=TEXT,
            optimizer=some(
                eps=RATES, betas=st.tuples(st.floats(0, 0.9), st.floats(0, 0.99)).map(list)
            ),
            dropout=some(hidden=st.floats(0, 0.5)),
        ),
        "checkpoint": some(keepLast=st.integers(1, 9), maxBandwidth=st.just("200Mi")),
        "trainer": some(
            numNodes=st.integers(1, 500),
            resourcesPerNode=some(
                limits=st.dictionaries(NAMES, st.sampled_from(["1", "2Gi"]), max_size=3)
            ),
            env=st.lists(
                st.fixed_dictionaries({"name": NAMES}, optional={"value": TEXT}),
                max_size=3,
                unique_by=lambda each: str(each["name"]),
            ),
        ),
        "suspend": st.booleans(),
        "activeDeadlineSeconds": st.integers(1, 1000),
    },
)
JOBS = st.builds(
    lambda name, spec: {
        "apiVersion": "training.cptjob.io/v1alpha1",
        "kind": "CPTJob",
        "metadata": {"name": name},
        "spec": spec,
    },
    NAMES,
    SPECS,
)
SCHEMA = jsonschema.Draft4Validator(crd.schema())
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(JOBS)
def test_a_job_is_read_from_yaml_as_it_was_written(document: dict[str, Any]) -> None:
    job, found = read_job(document)
    assert found == []
    assert job is not None
    assert parse_manifest(job.yaml()).job == job
    assert parse_manifest(json.dumps(job.manifest())).job.manifest() == job.manifest()


@FEW
@given(JOBS)
def test_a_job_keeps_what_was_written_and_adds_nothing(document: dict[str, Any]) -> None:
    job, _ = read_job(document)
    assert job is not None
    assert json.loads(json.dumps(job.manifest())) == document


@FEW
@given(JOBS)
def test_a_sound_job_is_valid_to_the_crd_with_and_without_its_defaults(
    document: dict[str, Any],
) -> None:
    job = CPTJob.from_json(json.dumps(document))
    SCHEMA.validate(document)
    SCHEMA.validate(json.loads(job.model_dump_json(exclude_none=True)))
