"""What keeps pods from being made or from running: what is said of it, and what to do."""

import pytest

from cptjob_api.conditions import Reason
from cptjob_operator.identity import PodId, Role
from cptjob_operator.observed import Pod, Waiting
from cptjob_operator.plan.waiting import obstacle, refusal


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (
            'pods "p" is forbidden: no PriorityClass with name urgent.v2 was found',
            "make priority class urgent.v2 and the job goes on",
        ),
        (
            'pods "p" is forbidden: error looking up service account team/train: '
            'serviceaccount "train" not found',
            "make service account train and the job goes on",
        ),
        (
            'pods "p" is forbidden: pod rejected: RuntimeClass "gvisor" not found',
            "make runtime class gvisor and the job goes on",
        ),
        ("admission webhook denied the request: not found", "it is tried again"),
    ],
)
def test_a_pod_that_names_what_does_not_exist_is_refused_with_what_to_make(
    message: str, advice: str
) -> None:
    found = refusal({"Pod": message})
    assert found is not None
    assert (found.reason, found.message) == (
        Reason.REFUSED,
        f"Pod refused: {message}; {advice}",
    )


def test_a_quota_is_waited_for_and_not_made() -> None:
    found = refusal({"Pod": 'pods "p" is forbidden: exceeded quota: gpus'})
    assert found is not None
    assert found.reason is Reason.WAITING_FOR_QUOTA
    assert found.message.endswith("exceeded quota: gpus; it is tried again")


@pytest.mark.parametrize(
    ("secrets", "words"),
    [
        ((), "mend the registry or the secret for it, or make a new job with another image or "),
        (("one",), "it is pulled with secret one of namespace team: make it if missing"),
        (("one", "two"), "pulled with secrets one, two of namespace team: make them if missing"),
    ],
)
def test_an_image_that_cannot_be_pulled_names_the_secrets_that_it_is_pulled_with(
    secrets: tuple[str, ...], words: str
) -> None:
    found = obstacle([_waiting(secrets)], None)
    assert found is not None
    assert found.reason is Reason.IMAGE_PULL_FAILED
    assert found.message.startswith("worker: 401 Unauthorized; ")
    assert words in found.message


def _waiting(secrets: tuple[str, ...]) -> Pod:
    """A worker whose image the registry does not give."""
    return Pod(
        id=PodId("uid", 0, Role.WORKER, 0, 0),
        namespace="team",
        name="worker",
        uid="worker",
        version=1,
        phase="Pending",
        created=None,
        ready=False,
        node="node-1",
        address=None,
        deleting=None,
        gated=False,
        unschedulable=None,
        waiting=Waiting("ErrImagePull", "401 Unauthorized"),
        ended=None,
        disruption=None,
        reason="",
        message="",
        image_id=None,
        owner_uid="uid",
        pull_secrets=secrets,
    )
