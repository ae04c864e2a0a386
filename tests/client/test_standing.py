"""What `cptjob status NAME` says of one job."""

import json
from typing import Any

import pytest

from cptjob.standing import page
from cptjob_api.job import CPTJob
from job_cases import sound_job


def job(phase: str, prepared: str | None, *, shown: bool = True) -> CPTJob:
    document = sound_job({"spec.tracking.tensorBoard": shown})
    document["metadata"] |= {"name": "story", "namespace": "team"}
    status: dict[str, Any] = {"phase": phase}
    if prepared is not None:
        about = {"reason": "Prepared", "lastTransitionTime": "2030-01-01T00:00:00Z", "message": ""}
        status["conditions"] = [{"type": "Prepared", "status": prepared} | about]
    return CPTJob.from_json(json.dumps(document | {"status": status}))


@pytest.mark.parametrize(
    ("phase", "prepared"), [("Running", "True"), ("Suspended", "True"), ("Complete", None)]
)
def test_the_page_says_how_to_open_tensorboard(phase: str, prepared: str | None) -> None:
    line = (
        "  TensorBoard:  http://localhost:6006 after kubectl port-forward -n team "
        "svc/story-tensorboard 6006"
    )
    assert line in page(job(phase, prepared)).splitlines()


@pytest.mark.parametrize(
    "made",
    [
        job("Running", "True", shown=False),
        job("Preparing", "False"),
        job("Failed", "False"),
        job("Pending", None),
    ],
    ids=["not asked for", "preparing", "never prepared", "pending"],
)
def test_the_page_does_not_speak_of_a_tensorboard_that_is_not_there(made: CPTJob) -> None:
    assert "TensorBoard" not in page(made)
