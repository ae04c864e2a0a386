"""Warnings about a job's data: each where it is due, and nowhere else."""

from typing import Any

import pytest

from cptjob_trainer import advice

SOUND: dict[str, Any] = {
    "packed": True,
    "rows": 1000,
    "batch": 10,
    "steps": 100,
    "never_drawn": (),
    "epochs": 1,
    "domain_tokens": 10**6,
    "unmeasured": (),
    "bad_lines": 0,
}


def test_a_sound_job_gets_no_warning() -> None:
    assert advice.warnings(advice.Counts(**SOUND)) == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"packed": False}, "each row holds one document"),
        ({"rows": 1000, "batch": 300, "steps": 4}, "the last step has 100 rows of 300"),
        ({"never_drawn": ("web", "wiki")}, "the share of web, wiki is less than one row"),
        ({"domain_tokens": 10}, "10 tokens of domain text are little"),
        ({"unmeasured": ("General",)}, "so forgetting will not be measured; set validation."),
        ({"bad_lines": 2}, "2 bad lines were skipped"),
    ],
)
def test_each_rule_warns_of_its_own_matter_only(change: dict[str, Any], warning: str) -> None:
    (said,) = advice.warnings(advice.Counts(**SOUND | change))
    assert warning in said


def test_a_last_step_that_is_never_reached_is_no_matter() -> None:
    assert advice.warnings(advice.Counts(**SOUND | {"batch": 300, "steps": 2})) == []


def test_a_loss_that_is_not_measured_has_its_reason() -> None:
    assert advice.why_not_measured("General", ["Domain"]) == "the job has no General data"
    said = advice.why_not_measured("Domain", ["Domain"])
    assert said.endswith(
        "set validation.splitPercent above 0, or give validation.datasets of role Domain"
    )
