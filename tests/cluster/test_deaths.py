"""The operator dies before and after each of its writes, in each stage of a job's life.

Afterwards it must stand where an operator stands that was never killed: no pod twice, none forgotten,
each restart counted once. `make soak` kills at every write, CI at a few that move with the date.
"""

from functools import partial

import pytest
from draws import dice_of_today, of_today
from lives import NOTHING, STAGES, Life, Live, strikes_everywhere, strikes_near

from testplane.proxy import Call, Trigger

WHEN = ["before", "after"]


class Death:
    """Kills the operator of a life at one of its writes.

    deleted: a person deletes the job while the operator lies dead, and the life is over; or at its
    end, where it did not die.
    """

    def __init__(self, number: int, when: str, *, deleted: bool = False) -> None:
        self._number, self._when, self._deleted = number, when, deleted
        self._trigger = Trigger()

    def __call__(self, life: Life) -> None:
        place = life.proxy.kill_before if self._when == "before" else life.proxy.kill_after
        self._trigger = place(self._number, lambda: self._kill(life))
        if self._deleted:
            life.at_the_end = life.delete

    def _kill(self, life: Life) -> None:
        life.cut_short = self._deleted
        life.operator.kill()
        if self._deleted:
            life.delete()

    @property
    def happened(self) -> bool:
        return self._trigger.happened


def _told_as(when: str) -> str:
    return f"killed {when} the answer"


@pytest.mark.parametrize("turn", range(3))
def test_an_operator_that_is_killed_at_some_write_ends_where_it_would_have(
    live: Live, turn: int
) -> None:
    stage = of_today(STAGES, "deaths", turn, turns=3)
    plain = live(stage)
    dice = dice_of_today(f"deaths {turn}")
    number, when = dice.randint(1, len(plain.writes)), dice.choice(WHEN)
    strikes_near(live, stage, plain, number, lambda n: Death(n, when), _told_as(when))


@pytest.mark.soak
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("stage", STAGES)
def test_an_operator_that_is_killed_at_any_write_ends_where_it_would_have(
    live: Live, stage: str, when: str
) -> None:
    strikes_everywhere(live, stage, live(stage), lambda n: Death(n, when), _told_as(when))


def test_an_operator_that_is_killed_as_it_tells_an_event_ends_where_it_would_have(
    live: Live,
) -> None:
    stage = of_today(STAGES, "events")
    telling = partial(live, counts=_is_event)
    plain = telling(stage)
    dice = dice_of_today("events")
    number, when = dice.randint(1, len(plain.writes)), dice.choice(WHEN)
    strikes_near(
        telling, stage, plain, number, lambda n: Death(n, when), f"{_told_as(when)} (event)"
    )


def _is_event(call: Call) -> bool:
    return call.resource == "events"


def test_a_job_that_is_deleted_while_its_operator_lies_dead_leaves_nothing(live: Live) -> None:
    stage = of_today(STAGES, "deletions")
    plain = live(stage)._replace(picture=NOTHING)
    number = dice_of_today("deletions").randint(1, len(plain.writes))
    strikes_near(live, stage, plain, number, lambda n: Death(n, "before", deleted=True), "deleted")


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_a_job_that_is_deleted_at_any_write_of_its_operator_leaves_nothing(
    live: Live, stage: str
) -> None:
    plain = live(stage)._replace(picture=NOTHING)
    # Whether its operator has had the answer is all one to a job that is no more.
    strikes_everywhere(live, stage, plain, lambda n: Death(n, "before", deleted=True), "deleted")
