"""The numbers behind the plots."""

import numpy as np
import pytest

from cptjob_trainer.results.plots import scientific, short, smooth, thin
from cptjob_trainer.results.report import duration


def test_a_short_line_is_drawn_as_it_is() -> None:
    x = np.arange(1500.0)
    assert all(a is b for a, b in zip(thin(x, x), (x, x), strict=True))


def test_a_thinned_line_keeps_both_ends_and_every_spike() -> None:
    x = np.arange(1.0, 100_001.0)
    y = np.sin(x)
    y[[4_321, 70_007]] = [50.0, -50.0]
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 1500
    assert (thin_x[0], thin_x[-1]) == (1.0, 100_000.0)
    assert (np.diff(thin_x) > 0).all()
    assert dict(zip(thin_x, thin_y, strict=True))[4_322.0] == 50.0
    assert thin_y.min() == -50.0


def test_a_thinned_line_keeps_its_gaps() -> None:
    y = np.ones(10_000)
    y[2_000:8_000] = np.nan
    assert np.isnan(thin(np.arange(10_000.0), y)[1]).any()


def test_smoothing_takes_the_mean_around_a_point_and_leaves_unknown_values_out() -> None:
    y = np.array([*range(10), np.nan, *range(11, 30)], dtype=np.float64)
    assert smooth(y)[15] == 15.0
    assert smooth(y)[10] == 10.0
    assert smooth(y)[0] == 1.0


def test_smoothing_a_stretch_of_unknown_values_gives_unknown_values() -> None:
    y = np.ones(100)
    y[40:60] = np.nan
    assert np.isnan(smooth(y)[50])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (9500, "9500"), (12_000, "12k"), (3_400_000, "3.4M"), (2e9, "2G")],
)
def test_large_numbers_are_written_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2e-5, "2e-5"), (1.5e-10, "1.5e-10"), (0.003, "0.003"), (0, "0")]
)
def test_small_numbers_are_written_without_padding(value: float, text: str) -> None:
    assert scientific(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5 s"),
        (59.99, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7_800, "2 h 10 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_a_duration_is_written_as_a_person_says_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
