"""The operator dies before and after each of its writes, in each stage of a job's life.

Afterwards it must stand where an operator stands that was never killed: no pod twice, none forgotten,
each restart counted once. `make soak` kills at every write, CI at a few that move with the date.
"""

import datetime
import random

import pytest
from lives import STAGES, Life, Live

from testplane.proxy import Trigger


class _Death:
    """Kills the operator of a life at one of its writes."""

    def __init__(self, number: int, when: str) -> None:
        self._number, self._when = number, when
        self.trigger = Trigger()

    def __call__(self, life: Life) -> None:
        place = life.proxy.kill_before if self._when == "before" else life.proxy.kill_after
        self.trigger = place(self._number, life.operator.kill)


@pytest.mark.parametrize("stage", ["is_made", "is_suspended_and_goes_on", "is_shown_to_its_end"])
def test_an_operator_that_is_killed_at_some_write_ends_where_it_would_have(
    live: Live, stage: str
) -> None:
    picture, writes = live(stage)
    dice = random.Random(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d} {stage}")
    number, when = dice.randint(1, writes), dice.choice(["before", "after"])
    death = _Death(number, when)
    killed, _ = live(stage, death)
    assert death.trigger.happened, f"write {number} of {writes} was never made"
    assert killed == picture, f"killed {when} the answer to write {number}"


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_an_operator_that_is_killed_at_any_write_ends_where_it_would_have(
    live: Live, stage: str
) -> None:
    picture, writes = live(stage)
    assert writes >= 6
    for number in range(1, writes + 1):
        for when in ("before", "after"):
            death = _Death(number, when)
            killed, _ = live(stage, death)
            # The number of writes moves by one or two with the moment at which events arrive.
            if death.trigger.happened:
                assert killed == picture, f"killed {when} the answer to write {number}"
            else:
                assert number > writes - 3, f"write {number} of {writes} was never made"
