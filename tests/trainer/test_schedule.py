"""Learning rates, step by step."""

import itertools

import pytest

from cptjob_trainer.training.schedule import default_warmup, learning_rate

KINDS = ["Constant", "Linear", "Cosine", "WSD"]


def rates(kind: str, total: int = 100, warmup: int = 10, **settings: int) -> list[float]:
    return [
        learning_rate(kind, step, total, peak=1.0, floor=0.1, warmup_steps=warmup, **settings)
        for step in range(total)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_warms_up_linearly_to_the_peak(kind: str) -> None:
    assert rates(kind)[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])


@pytest.mark.parametrize("kind", ["Linear", "Cosine", "WSD"])
def test_every_decay_ends_at_the_floor_exactly_and_never_rises(kind: str) -> None:
    values = rates(kind)[10:]
    assert values[-1] == pytest.approx(0.1)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values))


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert set(rates("Constant")[10:]) == {1.0}


@pytest.mark.parametrize("kind", ["Linear", "Cosine"])
def test_constant_steps_hold_the_peak_after_the_warm_up(kind: str) -> None:
    values = rates(kind, constant_steps=20)
    assert set(values[10:30]) == {1.0}
    assert values[30] < 1.0


def test_wsd_decays_in_the_last_tenth_only() -> None:
    values = rates("WSD")
    assert set(values[10:90]) == {1.0}
    assert values[90] < 1.0


def test_cosine_is_half_way_down_half_way_through() -> None:
    assert rates("Cosine", total=101, warmup=1)[50] == pytest.approx(0.55)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 5), (3, 3), (2, 0)])
def test_runs_of_a_few_steps_get_rates_between_floor_and_peak(
    kind: str, total: int, warmup: int
) -> None:
    assert all(0.0 < value <= 1.0 for value in rates(kind, total, warmup))


def test_the_warm_up_that_nobody_asked_for_is_a_hundredth_of_the_run() -> None:
    assert [default_warmup(steps) for steps in (10, 1000, 10**6)] == [1, 10, 2000]
