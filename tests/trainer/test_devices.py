"""What devices can do, and what a token costs."""

import pytest

from cptjob_trainer.devices import flops_per_token, peak_flops


def test_flops_count_parameters_and_causal_attention() -> None:
    assert flops_per_token(100, layers=2, width=8, length=16) == 6 * 100 + 6 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("Tesla V100-SXM2", 125e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_the_devices_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_frozen_weights_need_no_gradients_of_their_own() -> None:
    assert (
        flops_per_token(100, layers=2, width=8, length=16, frozen=True) == 4 * 100 + 6 * 2 * 8 * 16
    )
