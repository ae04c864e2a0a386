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
        ({"domain_tokens": 10}, "the domain text has 10 tokens, which is little"),
        ({"unmeasured": ("General",)}, "so forgetting will not be measured; set validation."),
        ({"bad_lines": 2}, "2 bad lines were skipped"),
        ({"bad_lines": 1}, "1 bad line was skipped"),
        ({"rows": 1, "batch": 8, "steps": 1}, "1 row of 8, and there is only 1 step;"),
        (
            {"domain_tokens": 1},
            "the domain text has 1 token, which is little to learn from, and 1 epoch",
        ),
    ],
)
def test_each_rule_warns_of_its_own_matter_only(change: dict[str, Any], warning: str) -> None:
    (said,) = advice.warnings(advice.Counts(**SOUND | change))
    assert warning in said


def test_a_last_step_that_is_never_reached_is_no_matter() -> None:
    assert advice.warnings(advice.Counts(**SOUND | {"batch": 300, "steps": 2})) == []


def test_a_warm_up_that_never_ends_is_told_with_both_numbers() -> None:
    (said,) = advice.long_warmup(500, 48)
    assert "warmupSteps: 500 is more than the job's 48 steps" in said
    assert advice.long_warmup(48, 48) == advice.long_warmup(None, 48) == []


def test_a_loss_that_is_not_measured_has_its_reason() -> None:
    assert advice.why_not_measured("General", ["Domain"]) == "the job has no General data"
    said = advice.why_not_measured("Domain", ["Domain"])
    assert said.endswith(
        "set validation.splitPercent above 0, or give validation.datasets of role Domain"
    )
