"""What the coordinator says becomes status, whatever it says."""

from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cptjob_api.status import CPTJobStatus, LastCheckpoint, ResolvedStatus
from cptjob_operator.observed import Report
from cptjob_operator.plan.reported import read_report

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)

ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "currentStep", "totalSteps", "epoch", "progressPercentage", "tokensPerSecond", "metrics",
        "estimatedRemainingSeconds", "lastUpdatedTime", "lastCheckpoint", "nodes", "resolved",
    ]
)  # fmt: skip


@given(st.dictionaries(FIELDS, ANYTHING))
@settings(max_examples=300, deadline=None)
def test_nonsense_is_left_out_and_the_status_stays_one_that_can_be_read_back(
    said: dict[str, Any],
) -> None:
    before = CPTJobStatus(resolved=ResolvedStatus())
    status = read_report(before, Report(said, NOW))
    text = status.model_dump_json(exclude_none=True)
    assert CPTJobStatus.from_json(text) == status


def test_figures_are_taken_over() -> None:
    said = {
        "currentStep": 40,
        "totalSteps": 100,
        "progressPercentage": 40.4,
        "tokensPerSecond": 1234.5,
        "estimatedRemainingSeconds": 61.7,
        "metrics": {"loss": 2.5, "broken": None},
        "lastCheckpoint": {"step": 40, "time": "2026-03-01T11:59:00Z", "uri": "pvc://r/step-40"},
        "resolved": {"maxLength": 512, "digest": "ab"},
    }
    status = read_report(CPTJobStatus(resolved=ResolvedStatus()), Report(said, NOW))
    trainer = status.trainer_status
    assert trainer is not None
    assert (trainer.current_step, trainer.progress_percentage) == (40, 40)
    assert [(each.name, each.value) for each in trainer.metrics] == [("loss", "2.5")]
    assert status.last_checkpoint is not None
    assert status.last_checkpoint.step == 40
    assert status.resolved is not None
    assert (status.resolved.max_length, status.resolved.digest) == (512, "ab")


def test_a_checkpoint_is_named_as_the_spec_names_its_place() -> None:
    uri = "file:///volumes/results/run/checkpoints/step-40.1"
    said = {"lastCheckpoint": {"step": 40, "time": "2026-03-01T11:59:00Z", "uri": uri}}
    status = read_report(CPTJobStatus(), Report(said, NOW))
    assert status.last_checkpoint is not None
    assert status.last_checkpoint.uri == "pvc://results/run/checkpoints/step-40.1"


def test_what_was_decided_at_acceptance_is_not_changed_by_a_report() -> None:
    before = CPTJobStatus(resolved=ResolvedStatus(max_length=256))
    status = read_report(before, Report({"resolved": {"maxLength": 512}}, NOW))
    assert status.resolved == before.resolved


def test_an_older_checkpoint_does_not_replace_a_newer_one() -> None:
    saved = LastCheckpoint(step=80, time=NOW, uri="pvc://r/step-80")
    said = {"lastCheckpoint": {"step": 40, "time": "2026-03-01T11:00:00Z", "uri": "pvc://r/40"}}
    status = read_report(CPTJobStatus(last_checkpoint=saved), Report(said, NOW))
    assert status.last_checkpoint == saved


def test_what_the_api_server_would_refuse_is_left_out() -> None:
    metrics = {"a" * 128 + "b": 1.0, "a" * 128 + "c": 2.0}
    said = {"metrics": metrics, "nodes": [{"name": "node-0", "ranks": [0, 10**30]}]}
    status = read_report(CPTJobStatus(), Report(said, NOW))
    assert status.trainer_status is not None
    assert [each.name for each in status.trainer_status.metrics] == ["a" * 128]
    assert [each.ranks for each in status.nodes] == [(0,)]
