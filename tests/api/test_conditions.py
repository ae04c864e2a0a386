"""Phases, conditions and reasons."""

import re

import pytest

from cptjob_api.conditions import PHASES, Condition, Phase, PhaseRow, Reason


@pytest.mark.parametrize("word", [*Phase, *Condition, *Reason], ids=str)
def test_each_word_has_a_sentence(word: Phase | Condition | Reason) -> None:
    assert re.fullmatch(r"[A-Z][A-Za-z]*", word.value)
    assert word.sentence.endswith(".")


# On the way, or as it was asked: nobody has to do anything.
FINE = {
    *(Reason.ACCEPTED, Reason.PREPARING, Reason.PREPARED, Reason.SCHEDULED, Reason.STARTING),
    *(Reason.RUNNING, Reason.DISRUPTED, Reason.CHECKPOINT_SAVED, Reason.SUSPENDING),
    *(Reason.RESUMED, Reason.COMPLETE),
}


@pytest.mark.parametrize("reason", Reason, ids=str)
def test_each_reason_that_is_not_fine_says_what_to_do(reason: Reason) -> None:
    assert bool(reason.action) == (reason not in FINE)
    assert not reason.action or reason.action.endswith(".")


def test_each_phase_has_one_row() -> None:
    assert [row.phase for row in PHASES] == list(Phase)


def _kstatus(row: PhaseRow) -> str:
    """What sigs.k8s.io/cli-utils makes of the conditions."""
    if Condition.STALLED in row.true:
        return "Failed"
    if Condition.RECONCILING in row.true or Condition.READY in row.false:
        return "InProgress"
    return "Current"


@pytest.mark.parametrize("row", PHASES, ids=lambda row: str(row.phase))
def test_the_table_says_what_gitops_tools_conclude(row: PhaseRow) -> None:
    assert row.kstatus == _kstatus(row)
    assert not set(row.true) & set(row.false)


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.SUSPENDED])
def test_a_wait_that_was_asked_for_does_not_block_a_gitops_sync(phase: Phase) -> None:
    (row,) = (row for row in PHASES if row.phase is phase)
    assert row.kstatus == "Current"
