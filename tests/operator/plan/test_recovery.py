"""Which of a gang's failures count, which node is to blame, and what is made anew after them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from cptjob_api.conditions import Condition, Phase
from cptjob_operator.identity import Role
from cptjob_operator.observed import Node

MakeWorld = Callable[..., Any]


def _end(job: Any, pod: Any, seconds: float, message: str = "boom") -> None:
    """The launcher of `pod` ends after so many seconds, and says why."""
    job.fail(pod, 70, "RuntimeError", message)
    ended = replace(job.pods[pod.id].ended, finished=job.now + timedelta(seconds=seconds))
    job.change(pod, ended=ended)


def test_a_worker_that_trains_on_a_node_that_falls_silent_is_not_late(world: MakeWorld) -> None:
    job = world(startupDeadlineSeconds=300)
    job.train()
    job.wait(3600)
    job.change(job.workers[0], ready=False)
    job.settle()
    assert (len(job.workers), job.status.restarts) == (2, 0)
    job.get_ready(job.workers[0])
    job.settle()
    assert job.phase is Phase.RUNNING


def test_launchers_that_waited_for_others_in_vain_give_back_and_count_nothing(
    world: MakeWorld,
) -> None:
    job = world(failurePolicy={"maxRestarts": 0})
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    job.settle()
    job.get_ready(job.workers[0])
    job.change(job.workers[1], unschedulable="0/4 nodes are available")
    job.wait(600)
    job.fail(job.workers[0], 75, "GangError", "not all launchers came within 600 s")
    job.settle()
    assert job.phase is Phase.RESTARTING
    assert job.workers == []
    assert job.status.last_failure.reason == "NotStarted"
    assert "0/4 nodes are available" in job.status.last_failure.message
    assert job.status.restarts_count_towards_max == 0
    assert job.status.excluded_nodes == ()
    job.wait(100)
    job.train()


def test_a_launcher_that_ends_by_itself_ends_its_attempt_as_no_other_can_join_it(
    world: MakeWorld,
) -> None:
    job = world(trainer={"numNodes": 3})
    job.train()
    _end(job, job.workers[1], 0)
    job.step()
    assert job.status.attempt == 1
    job.settle()
    assert [(pod.id.attempt, pod.id.incarnation) for pod in job.workers] == [(1, 0)] * 3
    assert (job.status.restarts, job.status.restarts_count_towards_max) == (1, 1)


def test_workers_that_stop_because_one_was_drained_are_not_replaced_one_by_one(
    world: MakeWorld,
) -> None:
    job = world()
    job.train()
    first, second = job.workers
    job.take_away(first)
    job.step()
    job.wait(60)
    for pod in (first, second):
        job.fail(pod, 143, "Stopped", "saved step 40")
    job.settle()
    assert [pod.id.attempt for pod in job.workers] == [1, 1]
    assert job.status.restarts_count_towards_max == 0


def test_only_the_node_of_the_first_failure_is_to_blame(world: MakeWorld) -> None:
    job = world(trainer={"numNodes": 4})
    job.train()
    for pod in job.workers:
        _end(job, pod, 0 if pod.node == "node-2" else 3, "an illegal memory access")
    job.step()
    assert [(each.name, each.failures) for each in job.status.excluded_nodes] == [("node-2", 1)]
    assert job.status.last_failure.node == "node-2"


def test_a_coordinator_that_ends_without_a_word_is_a_failure_and_not_made_anew_for_ever(
    world: MakeWorld,
) -> None:
    job = world(failurePolicy={"maxRestarts": 2})
    job.settle()
    for _ in range(3):
        job.wait(700)
        job.settle()
        job.succeed(job.pod(Role.COORDINATOR))
        job.settle()
    assert job.condition(Condition.FAILED) == ("True", "RestartsExhausted")
    assert "exit code 0" in job.status.condition(Condition.FAILED).message


def test_a_job_that_ran_is_never_on_its_way_to_its_first_gang_again(world: MakeWorld) -> None:
    job = world()
    job.train()
    job.edit(suspend=True)
    job.settle()
    job.edit(suspend=False)
    job.settle()
    job.change(job.pod(Role.COORDINATOR), unschedulable="0/4 nodes are available")
    job.settle()
    assert job.phase is Phase.RESTARTING
    assert job.condition(Condition.READY) == ("False", "Unschedulable")
    assert job.condition(Condition.RECONCILING) is None


def test_a_model_that_was_written_is_complete_though_it_is_seen_after_the_deadline(
    world: MakeWorld,
) -> None:
    job = world(activeDeadlineSeconds=600)
    job.train()
    job.wait(10_000)  # no operator was there
    for pod in job.workers:
        job.succeed(pod)
    job.succeed(job.pod(Role.COORDINATOR), "Complete")
    job.settle()
    assert job.phase is Phase.COMPLETE


def _node(name: str, ready: bool = True) -> Node:
    labels = {"training.cptjob.io/pool": "a100"}
    return Node(name, labels, ready, False, False, {"nvidia.com/gpu": 8})


def _waits_for_a_missing_worker(job: Any) -> None:
    """The other one keeps its node for as long as a gang may take to start, and no longer."""
    job.wait(3600)
    job.vanish(job.workers[0])
    job.settle()
    job.wait(299)
    job.settle()
    assert len(job.workers) == 1
    assert (job.plan().again - job.now).total_seconds() <= 15
    job.wait(1)
    job.settle()
    assert job.workers == []
    assert job.status.last_failure.reason == "NotStarted"


def test_a_gang_that_waits_for_a_named_node_gives_back_the_others_in_time(
    world: MakeWorld,
) -> None:
    named = {"mode": "Manual", "nodeNames": ["node-0", "node-1"]}
    job = world(scheduling=named, startupDeadlineSeconds=300)
    job.nodes = {name: _node(name) for name in ("node-0", "node-1")}
    job.train()
    job.nodes["node-0"] = _node("node-0", ready=False)
    _waits_for_a_missing_worker(job)


def test_a_gang_that_gets_no_new_worker_gives_back_the_others_in_time(world: MakeWorld) -> None:
    job = world(startupDeadlineSeconds=300)
    job.train()
    job.refused = {"Pod": "exceeded quota: gpus"}
    _waits_for_a_missing_worker(job)


def test_gangs_that_did_not_start_never_use_up_what_a_job_may_restart(world: MakeWorld) -> None:
    job = world(startupDeadlineSeconds=60)
    cap = job.settings.limits.max_uncounted_restarts + job.job.spec.failure_policy.max_restarts
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    for _ in range(cap + 1):
        job.settle()
        assert job.workers
        job.wait(61)
        job.settle()
        assert job.status.last_failure.reason == "NotStarted"
        job.wait(3600)
    job.train()
    job.take_away(job.workers[0])
    job.settle()
    assert (job.phase, job.status.restarts) == (Phase.RESTARTING, 1)
