"""Events, answers and lists come in any order; what is kept is the newest of each."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from cptjob_operator.edge.cache import Cache, document
from cptjob_operator.identity import JobId, JobKey, PodId, Role

MakeBody = Callable[..., dict[str, Any]]
UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"
KEY = JobKey("team", "job")
JOB = JobId("team", UID)


@pytest.fixture(name="told")
def make_told() -> list[JobKey]:
    return []


@pytest.fixture(name="cache")
def make_cache(told: list[JobKey], job_body: MakeBody) -> Cache:
    """With one job; `told` begins after it."""
    cache = Cache(lambda key, seconds: told.append(key))
    cache.put_job(job_body(1))
    told.clear()
    return cache


def test_the_newest_version_wins_in_any_order(pod_body: MakeBody, job_body: MakeBody) -> None:
    bodies = [pod_body(9, phase="Pending"), pod_body(10), pod_body(11, phase="Failed")]
    for order in itertools.permutations(bodies):
        cache = Cache()
        cache.put_job(job_body(1))
        for body in order:
            cache.put_pod(body)
        (pod,), _ = cache.pods_of(JOB)
        assert (pod.version, pod.phase) == (11, "Failed")


def test_a_pod_is_told_of_only_when_something_changed_that_matters(
    cache: Cache, told: list[JobKey], pod_body: MakeBody
) -> None:
    assert cache.put_pod(pod_body(5))
    assert not cache.put_pod(pod_body(6, qosClass="Guaranteed"))
    assert told == [KEY]
    (pod,), _ = cache.pods_of(JOB)
    assert pod.version == 6


def test_news_of_a_large_gang_waits_for_more_of_it(pod_body: MakeBody, job_body: MakeBody) -> None:
    waits: list[float] = []
    cache = Cache(lambda key, seconds: waits.append(seconds))
    cache.put_job(job_body(1))
    for number in range(500):
        cache.put_pod(pod_body(5 + number, number))
    assert waits[1] < 0.001
    assert 0.05 < waits[-1] < 0.2


def test_an_answer_to_our_own_write_calls_for_no_pass(
    cache: Cache, told: list[JobKey], pod_body: MakeBody, job_body: MakeBody
) -> None:
    cache.put_pod(pod_body(5), own=True)
    cache.put_job(job_body(6), own=True)
    cache.put_pod(pod_body(5))
    cache.put_job(job_body(6))
    assert told == []


def test_a_late_answer_does_not_bring_a_deleted_pod_back(cache: Cache, pod_body: MakeBody) -> None:
    cache.put_pod(pod_body(5))
    cache.drop_pod(pod_body(7))
    assert not cache.put_pod(pod_body(6))
    assert cache.pods_of(JOB)[0] == ()


def test_a_pod_that_went_without_an_end_has_vanished(cache: Cache, pod_body: MakeBody) -> None:
    cache.put_pod(pod_body(5))
    cache.drop_pod(pod_body(7))
    assert cache.pods_of(JOB) == ((), {PodId(UID, 0, Role.WORKER, 0, 0)})


def test_a_pod_that_we_deleted_has_not_vanished(cache: Cache, pod_body: MakeBody) -> None:
    cache.put_pod(pod_body(5))
    cache.asked_to_go("pod-0")
    cache.drop_pod(pod_body(7))
    assert cache.pods_of(JOB) == ((), frozenset())


def test_the_end_of_a_pod_that_went_at_once_is_seen_by_one_pass(
    cache: Cache, pod_body: MakeBody
) -> None:
    cache.put_pod(pod_body(5))
    cache.drop_pod(pod_body(7, phase="Failed"))
    pods, vanished = cache.pods_of(JOB)
    assert [pod.phase for pod in pods] == ["Failed"]
    assert not vanished
    cache.seen(JOB, pods)
    assert cache.pods_of(JOB) == ((), frozenset())


def test_what_a_list_no_longer_holds_has_gone_unless_it_is_newer(
    cache: Cache, told: list[JobKey], pod_body: MakeBody
) -> None:
    for index, version in enumerate((5, 6, 12)):
        cache.put_pod(pod_body(version, index))
    told.clear()
    cache.replace_pods({"pod-0"}, 10)
    pods, vanished = cache.pods_of(JOB)
    assert {pod.uid for pod in pods} == {"pod-0", "pod-2"}
    assert vanished == {PodId(UID, 0, Role.WORKER, 1, 0)}
    assert told == [KEY]


def test_a_job_of_the_same_name_is_another_job(
    cache: Cache, pod_body: MakeBody, job_body: MakeBody
) -> None:
    cache.put_pod(pod_body(5))
    cache.put_job(job_body(9, uid="other"))
    assert cache.pods_of(JOB) == ((), frozenset())
    cache.drop_job(KEY, UID)  # the late event of the first one
    assert cache.jobs[KEY].uid == "other"


def test_jobs_that_a_list_does_not_hold_are_gone(cache: Cache, job_body: MakeBody) -> None:
    cache.put_job(job_body(2, name="newer", uid="b"))
    cache.put_job(job_body(20, name="newest", uid="c"))
    cache.replace_jobs({JobKey("team", "newer"): "b"}, 10)
    assert {key.name for key in cache.jobs} == {"newer", "newest"}
    assert not cache.put_job(job_body(1)), "a late event of what is gone"


def test_the_document_of_a_job_is_what_came(cache: Cache, job_body: MakeBody) -> None:
    assert document(cache.jobs[KEY]) == job_body(1)


def test_a_node_is_told_to_the_jobs_that_are_on_it_when_it_changed(
    cache: Cache, told: list[JobKey], pod_body: MakeBody
) -> None:
    body = pod_body(5)
    body["spec"]["nodeName"] = "node-1"
    cache.put_pod(body)
    told.clear()
    node = {"metadata": {"name": "node-1", "resourceVersion": "6"}}
    cache.put_node(node)
    assert told == [KEY]
    node["metadata"]["resourceVersion"] = "7"
    cache.put_node(node)
    cache.put_node({"metadata": {"name": "node-2", "resourceVersion": "8"}})
    assert told == [KEY]


def _config_map(version: int, name: str = f"job-{UID[:5]}", **more: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-of-{name}",
            "resourceVersion": str(version),
            "labels": {"training.cptjob.io/job-name": "job", "training.cptjob.io/job-uid": UID},
            "ownerReferences": [{"controller": True, "uid": UID}],
        },
        "data": {"profile.json": "{}"},
    } | more


def test_the_frozen_profile_comes_from_the_jobs_own_config_map(cache: Cache) -> None:
    cache.put_child("ConfigMap", _config_map(4, name="of-somebody-with-our-labels"))
    assert cache.profile_of(JOB) is None
    cache.put_child("ConfigMap", _config_map(5))
    assert cache.profile_of(JOB) == "{}"
    cache.replace_children("ConfigMap", (), 6)
    assert cache.profile_of(JOB) is None
    assert cache.children_of(JOB) == ()


def test_of_two_children_of_a_kind_one_may_go(cache: Cache, told: list[JobKey]) -> None:
    common, shown = f"job-{UID[:5]}", "job-tensorboard"
    for name in (common, shown):
        cache.put_child("Service", _config_map(5, name=name))
        cache.put_child("ConfigMap", _config_map(5, name=name))
    assert {(each.kind, each.name) for each in cache.children_of(JOB)} == {
        ("ConfigMap", common),
        ("Service", common),
        ("Service", shown),
    }
    cache.replace_children("Service", [f"uid-of-{common}"], 6)
    assert {each.name for each in cache.children_of(JOB)} == {common}
    assert told == [KEY], "a pass makes it anew"


def test_what_another_namespace_says_of_a_job_is_not_about_it(
    cache: Cache, told: list[JobKey], pod_body: MakeBody
) -> None:
    cache.put_child("ConfigMap", _config_map(5))
    for forged in (_config_map(9, data={"profile.json": "forged"}), pod_body(9)):
        forged["metadata"] |= {"namespace": "other", "uid": "forged"}
        cache.put_child("ConfigMap", forged)
        cache.put_pod(forged)
    assert cache.profile_of(JOB) == "{}"
    assert cache.pods_of(JOB) == ((), frozenset())
    assert told == []


def test_nothing_of_a_job_that_is_gone_is_kept(cache: Cache, pod_body: MakeBody) -> None:
    cache.put_pod(pod_body(5))
    cache.put_child("ConfigMap", _config_map(5))
    cache.drop_job(KEY, UID)
    cache.put_pod(pod_body(6, phase="Failed"))  # the garbage collector is at work
    cache.drop_pod(pod_body(7, phase="Failed"))
    assert cache.pods_of(JOB) == ((), frozenset())
    assert cache.children_of(JOB) == ()
    assert list(cache.all_pods()) == []
