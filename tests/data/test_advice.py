"""Warnings about a job's data: each where it is due, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cptjob_trainer.config import DatasetInput, ResolvedLora
from cptjob_trainer.data import advice

SOUND: dict[str, Any] = {
    "packed": True,
    "rows": 1000,
    "batch": 10,
    "steps": 100,
    "never_drawn": (),
    "seen": {"law": 4.0},
    "domain_tokens": 10**6,
    "unmeasured": (),
    "split_percent": 0,
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
        ({"domain_tokens": 10}, "the domain text has only 10 tokens, so that"),
        (
            {"seen": {"law": 4.0, "web": 6.25}},
            "datasets: web is seen 6.25 times; beyond about four",
        ),
        ({"unmeasured": ("General",)}, "so forgetting will not be measured; set validation."),
        ({"bad_lines": 2}, "2 bad lines were skipped"),
        ({"bad_lines": 1}, "1 bad line was skipped"),
        ({"rows": 1, "batch": 8, "steps": 1}, "1 row of 8, and there is only 1 step;"),
        (
            {"unmeasured": ("Domain",), "split_percent": 5},
            "will not be measured; of one document none can be spared: add some, or give",
        ),
    ],
)
def test_each_rule_warns_of_its_own_matter_only(change: dict[str, Any], warning: str) -> None:
    (said,) = advice.warnings(advice.Counts(**SOUND | change))
    assert warning in said


def test_a_last_step_that_is_never_reached_is_no_matter() -> None:
    assert advice.warnings(advice.Counts(**SOUND | {"batch": 300, "steps": 2})) == []


def test_a_little_text_that_is_seen_once_at_most_is_no_matter() -> None:
    little = SOUND | {"domain_tokens": 10, "seen": {"law": 0.36, "web": 1.0}}
    assert advice.warnings(advice.Counts(**little)) == []


def test_data_sets_that_share_files_are_told_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "link").symlink_to("a")

    def given(name: str, path: str) -> DatasetInput:
        return DatasetInput(name=name, uri="pvc://data", path=tmp_path / path)

    law, same = given("law", "a"), given("same", "link/x.jsonl")
    held_out = given("check", "a")
    assert list(advice.same_data([law, given("web", "b")], [])) == []
    (twice,) = advice.same_data([law, same], [])
    assert twice.startswith("datasets[same]: has the same data as datasets[law], which so is")
    (heart,) = advice.same_data([law], [held_out, given("other", "b")])
    assert heart.startswith("validation.datasets[check]: has the same data as datasets[law], so")


def test_a_warm_up_that_never_ends_is_told_with_both_numbers() -> None:
    (said,) = advice.long_warmup(500, 48)
    assert "warmupSteps: 500 is more than the job's 48 steps" in said
    assert advice.long_warmup(48, 48) == advice.long_warmup(None, 48) == []


def test_layers_to_adapt_that_the_model_has_not_are_told_with_those_it_has(
    tmp_path: Path,
) -> None:
    names = ["model.layers.0.q_proj.weight", "model.layers.0.v_proj.weight"]
    tensors = {name: torch.zeros(2, 2) for name in names} | {"model.norm.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")

    def told(*targets: str) -> list[str]:
        lora = ResolvedLora(alpha=8.0, target_modules=targets)
        return advice.unmatched_targets(lora, tmp_path)

    assert told("q_proj", "layers.0.v_proj") == told("all-linear") == []
    assert told("q_proj", "proj", "norm") == [
        "training.lora.targetModules: no layer of the model is named proj, norm; it has q_proj, v_proj"
    ]
    assert advice.unmatched_targets(None, tmp_path) == []


def test_a_loss_that_is_not_measured_has_its_reason() -> None:
    assert advice.why_not_measured("General", ["Domain"], 5) == "the job has no General data"
    said = advice.why_not_measured("Domain", ["Domain"], 0)
    assert said.endswith(
        "set validation.splitPercent above 0, or give validation.datasets of role Domain"
    )
    said = advice.why_not_measured("Domain", ["Domain"], 5)
    assert "above 0" not in said
    assert "of one document none can be spared" in said
