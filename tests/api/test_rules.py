"""The rules over several fields: each says the same in Python and in CEL."""

import json
from collections.abc import Callable
from typing import Any

import cel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cptjob_api.fields import annotation_at, fields, instances, parts, show
from cptjob_api.job import CPTJob
from cptjob_api.manifest import read_job
from cptjob_api.rules import (
    MUTABLE,
    RULES,
    TRANSITIONS,
    Rule,
    forbidden_changes,
    transition_cel,
)
from cptjob_api.spec import CPTJobSpec
from job_cases import ACCEPTED_STATUS, BROKEN, BY_SCHEMA, OTHER, SOUND

MakeJob = Callable[..., dict[str, Any]]


def says(rule: str, **variables: Any) -> bool:
    """What CEL makes of a rule. `sum` is Kubernetes' own addition to the language."""
    context = cel.Context()
    context.add_function("sum", lambda numbers: float(sum(numbers)))
    for name, value in variables.items():
        context.add_variable(name, value)
    answer = cel.evaluate(rule, context)
    assert isinstance(answer, bool), rule
    return answer


def defaulted(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the schema's defaults, as the API server would have it; no rule is asked."""
    spec = CPTJobSpec.from_json(json.dumps(document["spec"]))
    plain: dict[str, Any] = json.loads(spec.model_dump_json(exclude_none=True))
    return document | {"spec": plain}


def in_cel(document: dict[str, Any]) -> set[tuple[str, str]]:
    """Field and message of each rule that is broken to the API server."""
    document = defaulted(document)
    broken = set()
    for rule in RULES:
        at = "" if rule.at == "metadata" else rule.at
        for path, value in instances(document, parts(at)):
            if rule.cel is not None and not says(rule.cel, self=value):
                place = ("metadata", "name") if rule.at == "metadata" else parts(rule.field)
                broken.add((show((*path, *place)), rule.message))
    return broken


def in_python(document: dict[str, Any]) -> set[tuple[str, str]]:
    _, found = read_job(document)
    return {(show(each.path), each.message) for each in found}


@pytest.mark.parametrize("changes", SOUND, ids=str)
def test_a_sound_job_keeps_every_rule_in_both_forms(changes: dict[str, Any], job: MakeJob) -> None:
    assert in_python(job(changes)) == in_cel(job(changes)) == set()


@pytest.mark.parametrize(("changes", "place", "message"), BROKEN, ids=str)
def test_a_broken_rule_is_told_alike_in_both_forms(
    changes: dict[str, Any], place: str, message: str, job: MakeJob
) -> None:
    found = in_python(job(changes))
    assert found == in_cel(job(changes))
    assert [(at, said[: len(message)]) for at, said in found] == [(place, message)]


@pytest.mark.parametrize(("changes", "place", "message"), BY_SCHEMA, ids=str)
def test_what_a_list_type_says_in_the_crd_is_a_rule_in_python(
    changes: dict[str, Any], place: str, message: str, job: MakeJob
) -> None:
    assert in_python(job(changes)) == {(place, message)}
    assert in_cel(job(changes)) == set()


@pytest.mark.parametrize("place", ["model", "output", "checkpoint"])
def test_local_files_are_for_local_runs_only(place: str, job: MakeJob) -> None:
    changed = job({f"spec.{place}.storageUri": "file:///data"})
    assert in_python(changed) == set()
    assert [at for at, _ in in_cel(changed)] == [f"spec.{place}.storageUri"]


def test_each_rule_is_broken_by_a_case_above(job: MakeJob) -> None:
    told = {said for changes, _, _ in BROKEN + BY_SCHEMA for _, said in in_python(job(changes))}
    assert {rule.message for rule in RULES if rule.check is not None} == told


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.at} {rule.message[:30]}")
def test_a_rule_stands_at_a_field_that_there_is(rule: Rule) -> None:
    at = tuple(0 if part == -1 else part for part in parts(rule.at))
    assert annotation_at(CPTJob, (*at, *parts(rule.field))) is not None
    assert rule.cel is not None or rule.check is not None


SMALL = st.integers(1, 4)
SHARE = st.sampled_from([0.25, 0.5, 1.0])
ANY_SPEC = st.fixed_dictionaries(
    {"model": st.just({"storageUri": "pvc://m"})},
    optional={
        "task": st.sampled_from(["CausalLM", "MaskedLM", "ImageClassification"]),
        "datasets": st.lists(
            st.fixed_dictionaries(
                {"storageUri": st.just("pvc://d")},
                optional={"role": st.sampled_from(["Domain", "General"]), "weight": SHARE},
            ),
            max_size=4,
        ).map(lambda many: [{"name": f"d{n}"} | each for n, each in enumerate(many)]),
        "validation": st.lists(st.integers(0, 9), max_size=2, unique=True).map(
            lambda many: {"datasets": [{"name": f"d{n}", "storageUri": "pvc://v"} for n in many]}
        ),
        "trainer": st.fixed_dictionaries({}, optional={"numNodes": SMALL}),
        "elasticPolicy": st.fixed_dictionaries({}, optional={"minNodes": SMALL, "maxNodes": SMALL}),
        "scheduling": st.fixed_dictionaries(
            {},
            optional={
                "mode": st.sampled_from(["Auto", "Manual"]),
                "nodeNames": st.integers(0, 4).map(lambda n: [f"node-{i}" for i in range(n)]),
            },
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "method": st.sampled_from(["Full", "LoRA"]),
                "lora": st.just({}),
                "learningRate": SHARE,
                "schedule": st.fixed_dictionaries({}, optional={"minLearningRate": st.just(0.25)}),
                "sifting": st.fixed_dictionaries(
                    {},
                    optional={"mode": st.sampled_from(["None", "Unbiased"]), "betaValue": SHARE},
                ),
            },
        ),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANY_SPEC)
def test_both_forms_agree_on_any_job(spec: dict[str, Any]) -> None:
    document = {
        "apiVersion": "training.cptjob.io/v1alpha1",
        "kind": "CPTJob",
        "metadata": {"name": "any"},
        "spec": spec,
    }
    assert in_python(document) == in_cel(document)


# --- changes to an accepted job -------------------------------------------------------------------


def refused(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Fields of refused changes; both forms must agree."""
    old, new = defaulted(before), defaulted(after)
    by_cel = {each.field for each in TRANSITIONS if not says(each.cel, self=new, oldSelf=old)}
    assert says(transition_cel()[0], self=new, oldSelf=old) == (not by_cel)
    if "status" in before:
        jobs = [CPTJob.from_json(json.dumps(each)) for each in (before, after)]
        assert {show(each.path) for each in forbidden_changes(*jobs)} == by_cel
    return by_cel


def test_each_field_has_another_value_here() -> None:
    trainer = {f"trainer.{name}" for name in fields(fields_of_trainer())}
    assert set(OTHER) == (set(fields(CPTJobSpec)) - {"trainer"}) | trainer


def fields_of_trainer() -> Any:
    return annotation_at(CPTJob, ("spec", "trainer"))


@pytest.mark.parametrize("name", OTHER)
def test_an_accepted_job_may_change_only_what_is_mutable(name: str, job: MakeJob) -> None:
    before = job({"status": ACCEPTED_STATUS})
    after = job({"status": ACCEPTED_STATUS, f"spec.{name}": OTHER[name]})
    assert refused(before, after) == (set() if name in MUTABLE else {f"spec.{name}"})
    assert refused(after, before) == (set() if name in MUTABLE else {f"spec.{name}"})


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("status", [None, {"observedGeneration": -1}], ids=["none", "fresh"])
def test_a_job_that_is_not_accepted_yet_may_change_anything(
    name: str, status: Any, job: MakeJob
) -> None:
    before = job({"status": status} if status else {})
    after = job({f"spec.{name}": OTHER[name]} | ({"status": status} if status else {}))
    assert says(transition_cel()[0], self=defaulted(after), oldSelf=defaulted(before))


@pytest.mark.parametrize(
    ("both", "before", "after", "fine"),
    [
        ({}, {}, {}, False),
        ({"spec.elasticPolicy": {}}, {}, {}, True),
        ({"spec.suspend": True}, {}, {}, True),
        ({}, {"spec.suspend": True}, {}, True),
        ({}, {}, {"spec.suspend": True}, True),
    ],
    ids=["running", "elastic", "suspended", "resumed with it", "suspended with it"],
)
def test_the_number_of_nodes_changes_when_elastic_or_suspended(
    both: dict[str, Any], before: dict[str, Any], after: dict[str, Any], fine: bool, job: MakeJob
) -> None:
    both = {"status": ACCEPTED_STATUS} | both
    found = refused(job(both | before), job(both | after | {"spec.trainer.numNodes": 3}))
    assert found == (set() if fine else {"spec.trainer.numNodes"})
