"""How many rows of each source are drawn: exact, and nonsense is refused."""

from fractions import Fraction

import pytest

from cptjob_trainer.data.shares import Share, asked, quotas, steps
from cptjob_trainer.errors import ConfigError


def share(name: str, rows: int, weight: float | None = None, *, general: bool = False) -> Share:
    return Share(name, general, rows, weight)


def test_without_general_data_each_row_is_seen_once_an_epoch() -> None:
    assert quotas([share("a", 10), share("b", 7)], epochs=3) == (30, 21)


def test_general_data_makes_up_five_percent_of_all_rows() -> None:
    drawn = quotas([share("a", 950), share("g", 10, general=True), share("h", 30, general=True)], 1)
    assert drawn == (950, 13, 37)
    assert Fraction(sum(drawn[1:]), sum(drawn)) == Fraction(1, 20)


def test_explicit_general_weights_are_shares_of_all_rows() -> None:
    parts = [share("a", 350), share("g", 10, 0.1, general=True), share("h", 9, 0.2, general=True)]
    assert quotas(parts, 2) == (700, 100, 200)


def test_explicit_domain_weights_split_the_domain_rows() -> None:
    assert quotas([share("a", 60, 3.0), share("b", 40, 1.0)], 1) == (75, 25)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([share("a", 9, 0.0)], r"datasets\[a\].weight: 0 would never be drawn"),
        ([share("a", 9), share("g", 9, 0.0, general=True)], r"datasets\[g\].weight: 0"),
        ([share("a", 9, 1.0), share("b", 9)], r"datasets\[b\].weight: missing, while a has one"),
        ([share("a", 9), share("g", 9, 1.0, general=True)], "must sum to less than 1"),
        ([share("g", 9, general=True)], "role Domain is needed"),
    ],
)
def test_weights_that_make_no_sense_are_refused(parts: list[Share], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quotas(parts, 1)


@pytest.mark.parametrize(
    ("rows", "batch", "limit", "expected"),
    [(100, 8, None, 13), (104, 8, None, 13), (100, 8, 5, 5), (100, 8, 50, 13), (1, 8, None, 1)],
)
def test_the_last_step_may_be_short(
    rows: int, batch: int, limit: int | None, expected: int
) -> None:
    assert steps(rows, batch, limit) == expected


def test_the_asked_shares_are_those_of_the_manifest_before_rows_are_rounded() -> None:
    parts = [share("a", 3, 3.0), share("b", 9, 1.0), share("g", 5, 0.2, general=True)]
    assert asked(parts) == (0.6, 0.2, 0.2)
    assert asked([share("a", 1), share("b", 3), share("g", 5, general=True)]) == (
        0.2375,
        0.7125,
        0.05,
    )
