"""Jobs and settings to accept and render."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from cptjob_api.job import CPTJob
from cptjob_operator.plan.accept import Accepted, accept
from cptjob_operator.settings import Settings
from job_cases import sound_job

UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"

Changes = dict[str, Any]
MakeJob = Callable[..., CPTJob]
Accept = Callable[..., Accepted]


@pytest.fixture(name="make_job")
def job_maker() -> MakeJob:
    """`make_job({"spec.training.seed": 3})`: a sound job of namespace team with these changes."""

    def make(changes: Changes | None = None) -> CPTJob:
        document = sound_job({"spec.output.storageUri": "pvc://results/runs"} | (changes or {}))
        document["metadata"] |= {"namespace": "team", "uid": UID}
        return CPTJob.from_json(json.dumps(document))

    return make


@pytest.fixture(name="accepted")
def acceptor(make_job: MakeJob) -> Accept:
    """`accepted(changes, settings)`: what was decided for a job that nothing is wrong with."""

    def run(changes: Changes | None = None, settings: Settings | None = None) -> Accepted:
        answer = accept(make_job(changes), settings or Settings())
        assert isinstance(answer, Accepted), answer
        return answer

    return run
