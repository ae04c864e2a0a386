"""A small sound job, and ways to change it."""

from collections.abc import Callable
from typing import Any

import pytest

from job_cases import sound_job

MakeJob = Callable[..., dict[str, Any]]


@pytest.fixture(name="job")
def make_job() -> MakeJob:
    """`job({"spec.training.seed": 3})`: a sound job's document with these fields changed."""
    return sound_job
