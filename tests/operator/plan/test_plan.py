"""What becomes of a job, pass by pass."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_operator.identity import Role
from cptjob_operator.observed import Claim
from cptjob_operator.plan.endings import LAST_WORD_SECONDS
from cptjob_operator.settings import Settings

MakeWorld = Callable[..., Any]


def test_an_accepted_job_gets_its_objects_and_a_coordinator_and_no_worker(world: MakeWorld) -> None:
    job = world()
    wanted = job.step()
    assert [each["kind"] for each in wanted.objects] == [
        "ConfigMap", "Service", "NetworkPolicy", "Pod",
    ]  # fmt: skip
    assert job.phase is Phase.PREPARING
    assert job.status.resolved.learning_rate == 2e-5
    assert job.condition(Condition.RECONCILING) == ("True", "Preparing")
    assert [identity.role for identity in job.made] == [Role.COORDINATOR]


def test_a_second_pass_over_the_same_wants_nothing(world: MakeWorld) -> None:
    job = world()
    job.step()
    job.wait(30)
    wanted = job.plan()
    assert (wanted.status, wanted.objects, wanted.deletions, wanted.events) == (None, (), (), ())


def test_workers_are_made_when_the_coordinator_is_ready(world: MakeWorld) -> None:
    job = world(trainer={"numNodes": 3})
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    wanted = job.step()
    assert [each["kind"] for each in wanted.objects] == ["Pod"] * 3
    assert job.phase is Phase.STARTING
    assert job.condition(Condition.PREPARED) == ("True", "Prepared")


def test_a_job_runs_when_every_worker_is_ready(world: MakeWorld) -> None:
    job = world()
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    job.settle()
    job.get_ready(job.workers[0])
    job.settle()
    assert job.phase is Phase.STARTING
    job.get_ready(job.workers[1])
    job.settle()
    assert job.phase is Phase.RUNNING
    assert job.condition(Condition.RECONCILING) is None
    assert job.condition(Condition.READY) == ("True", "Running")
    assert (job.status.replicas, job.status.pods.ready) == (2, 2)


def test_what_is_decided_is_written_at_once_and_what_is_only_told_may_wait(
    world: MakeWorld,
) -> None:
    job = world()
    assert job.step().urgent, "what the job leaves out is decided"
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    assert not job.step().urgent, "it starts"
    for worker in job.workers:
        job.get_ready(worker)
    assert not job.step().urgent, "it runs"
    job.fail(job.workers[0], 1)
    assert job.step().urgent, "a restart is counted"
    job.edit(suspend=True)
    while job.phase is not Phase.SUSPENDED:
        for pod in [each for each in job.pods.values() if each.deleting]:
            del job.pods[pod.id]
        last = job.step()
    assert last.urgent, "somebody waits for it"


def test_a_job_that_runs_tells_which_image_was_pulled_and_keeps_the_first(
    world: MakeWorld,
) -> None:
    job = world()
    job.settle()
    job.change(job.pod(Role.COORDINATOR), image_id="registry.example/trainer@sha256:1")
    job.train()
    assert job.status.resolved.image_id == "registry.example/trainer@sha256:1"
    job.change(job.pod(Role.COORDINATOR), image_id="registry.example/trainer@sha256:2")
    job.settle()
    assert job.status.resolved.image_id == "registry.example/trainer@sha256:1"


def test_a_job_is_complete_when_the_coordinator_is(world: MakeWorld) -> None:
    job = world()
    job.train()
    job.succeed(job.pod(Role.COORDINATOR), "Complete")
    for pod in job.workers:
        job.succeed(pod)
    job.settle()
    assert job.phase is Phase.COMPLETE
    assert job.status.result.model_uri == "pvc://results/job/model"
    assert job.status.completion_time == job.now


def test_a_job_is_complete_when_every_worker_is_though_the_coordinator_is_lost(
    world: MakeWorld,
) -> None:
    job = world()
    job.train()
    for pod in job.workers:
        job.succeed(pod)
    job.vanish(job.pod(Role.COORDINATOR))
    job.settle()
    assert job.phase is Phase.COMPLETE


def test_the_last_figures_are_waited_for_when_workers_end_before_the_coordinator(
    world: MakeWorld,
) -> None:
    job = world()
    job.train()
    for pod in job.workers:
        job.succeed(pod)
    job.settle()
    assert job.phase is Phase.RUNNING
    assert job.pod(Role.COORDINATOR).deleting is None
    job.wait(LAST_WORD_SECONDS)
    job.settle()
    assert job.phase is Phase.COMPLETE


def test_a_container_that_has_ended_in_a_pod_that_has_not_is_no_restart(world: MakeWorld) -> None:
    job = world()
    job.train()
    for pod in (job.pod(Role.COORDINATOR), *job.workers):
        job.succeed(pod, "Complete")
        job.change(pod, phase="Running")  # as a kubelet has it for a moment
        job.step()
        assert job.phase is Phase.RUNNING
    job.change(job.pod(Role.COORDINATOR), phase="Succeeded")
    job.settle()
    assert job.phase is Phase.COMPLETE


def test_an_output_that_is_complete_ends_the_job_without_a_worker(world: MakeWorld) -> None:
    job = world()
    job.settle()
    job.succeed(job.pod(Role.COORDINATOR), "AlreadyComplete")
    job.settle()
    assert job.condition(Condition.COMPLETE) == ("True", "AlreadyComplete")
    assert [identity.role for identity in job.made] == [Role.COORDINATOR]


def test_broken_data_fails_the_job_with_its_words_and_no_worker_ever_exists(
    world: MakeWorld,
) -> None:
    job = world()
    job.settle()
    job.fail(job.pod(Role.COORDINATOR), 65, "DataError", "a.jsonl:7: not JSON")
    job.settle()
    assert job.phase is Phase.FAILED
    assert job.condition(Condition.FAILED) == ("True", "DataInvalid")
    assert job.status.condition(Condition.FAILED).message == "a.jsonl:7: not JSON"
    assert [identity.role for identity in job.made] == [Role.COORDINATOR]


def test_a_model_that_is_not_there_is_told_apart_from_data(world: MakeWorld) -> None:
    job = world()
    job.settle()
    message = "/volumes/models/llama: no model directory"
    job.fail(job.pod(Role.COORDINATOR), 66, "MissingInputError", message)
    job.settle()
    assert job.condition(Condition.FAILED) == ("True", "ModelMissing")


def test_a_job_of_another_controller_is_left_alone(world: MakeWorld) -> None:
    job = world(managedBy="somebody.example/else")
    wanted = job.step()
    assert wanted.status is None
    assert not job.children


def test_a_finished_job_goes_when_its_time_is_over(world: MakeWorld) -> None:
    job = world(ttlSecondsAfterFinished=60)
    job.settle()
    job.succeed(job.pod(Role.COORDINATOR), "AlreadyComplete")
    job.settle()
    job.wait(59)
    assert job.plan().again is not None
    job.settle()
    assert not job.gone
    job.wait(1)
    job.step()
    assert job.gone


def test_the_time_that_a_job_may_hold_pods_ends_while_it_prepares_too(world: MakeWorld) -> None:
    job = world(activeDeadlineSeconds=600)
    job.settle()
    again = job.plan().again
    job.wait(600)
    assert again == job.now
    job.settle()
    assert job.condition(Condition.FAILED) == ("True", "DeadlineExceeded")


def test_an_obstacle_is_told_once_each_time_that_it_reads_otherwise(world: MakeWorld) -> None:
    job = world()
    job.settle()
    for message in ("no nodes", "no nodes", "one node"):
        job.change(job.pod(Role.COORDINATOR), unschedulable=message)
        job.settle()
    told = [message for reason, message in job.events if reason == "Unschedulable"]
    assert [message.rsplit(": ", 1)[-1] for message in told] == ["no nodes", "one node"]


def _said(job: Any) -> str:
    return str(job.status.condition(Condition.READY).message)


_NO_ROOM = (
    "0/{} nodes are available: {} Insufficient cpu, {} node(s) had untolerated taint {{a: b}}."
)
_NO_ROOM_IN_ANOTHER_ORDER = (
    "0/9 nodes are available: 1 node(s) had untolerated taint {a: b}, 8 Insufficient cpu."
)


def test_of_several_workers_without_a_node_it_is_always_the_first_that_speaks(
    world: MakeWorld,
) -> None:
    job = world(trainer={"numNodes": 3})
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    job.settle()
    for pod in reversed(job.workers):
        job.change(pod, unschedulable=_NO_ROOM.format(3, 2, 1))
    job.pods = dict(reversed(job.pods.items()))
    job.settle()
    assert _said(job).startswith(job.workers[0].name)


def test_gpus_that_others_hold_are_counted_again_while_the_scheduler_finds_no_node(
    world: MakeWorld,
) -> None:
    job = world()
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    job.settle()
    job.used_gpus = {"node-0": 8}
    later = job.plan().again
    assert later is not None, "the deadline for the start"
    job.change(job.workers[0], unschedulable=_NO_ROOM.format(3, 2, 1))
    soon = job.plan().again
    assert soon is not None
    assert (soon - job.now).total_seconds() == 30.0
    assert soon < later


def test_counts_of_nodes_that_move_are_no_event_and_written_now_and_then_only(
    world: MakeWorld,
) -> None:
    job = world()
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    job.settle()
    first, second = job.workers
    job.change(first, unschedulable=_NO_ROOM.format(3, 2, 1))
    job.settle()
    begun, told, writes = job.now, len(job.events), job.writes
    for number in range(4, 18):
        job.wait(1)
        job.change(first, unschedulable=_NO_ROOM.format(number, number - 1, 1))
        wanted = job.step()
    assert (len(job.events), job.writes) == (told, writes)
    assert (wanted.again - begun).total_seconds() == 15
    job.wait(1)
    job.change(first, unschedulable=_NO_ROOM_IN_ANOTHER_ORDER)
    job.settle()
    assert (len(job.events), job.writes) == (told, writes + 1)
    assert _NO_ROOM_IN_ANOTHER_ORDER in _said(job)
    job.get_ready(first)
    job.change(second, unschedulable="0/9 nodes are available: 9 Too many pods.")
    job.settle()
    assert "Too many pods" in job.events[-1][1], "another obstacle is told at once"


def test_a_job_that_held_pods_for_too_long_fails(world: MakeWorld) -> None:
    job = world(activeDeadlineSeconds=600)
    job.train()
    again = job.plan().again
    job.wait(599)
    job.settle()
    assert job.phase is Phase.RUNNING
    job.wait(1)
    assert again == job.now
    job.settle()
    assert job.condition(Condition.FAILED) == ("True", "DeadlineExceeded")
    assert not job.workers


class TestSuspension:
    def test_workers_leave_before_the_coordinator(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        job.edit(suspend=True)
        wanted = job.step()
        assert [each.name.split("-")[-2] for each in wanted.deletions] == ["w0", "w1"]
        assert job.condition(Condition.SUSPENDED) == ("False", "Suspending")
        job.settle()
        assert not job.pods
        assert job.phase is Phase.SUSPENDED
        assert job.condition(Condition.READY) == ("True", "Suspended")

    def test_time_stands_still(self, world: MakeWorld) -> None:
        job = world(activeDeadlineSeconds=600)
        job.train()
        job.edit(suspend=True)
        job.settle()
        job.wait(10_000)
        job.edit(suspend=False)
        job.settle()
        assert job.phase is Phase.RESTARTING
        assert job.condition(Condition.RECONCILING) is None

    def test_it_goes_on_with_new_pods_and_without_counting_a_restart(
        self, world: MakeWorld
    ) -> None:
        job = world()
        job.train()
        before = set(job.made)
        job.edit(suspend=True)
        job.settle()
        job.edit(suspend=False)
        job.train()
        assert len(set(job.made) - before) == 3
        assert (job.status.attempt, job.status.restarts) == (1, 0)

    def test_a_job_that_is_made_suspended_holds_no_pod_but_what_was_decided(
        self, world: MakeWorld
    ) -> None:
        job = world(suspend=True)
        job.settle()
        assert job.phase is Phase.SUSPENDED
        assert not job.pods
        assert job.profile is not None

    def test_workers_may_be_more_when_it_goes_on(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        job.edit(suspend=True)
        job.settle()
        job.edit(suspend=False, trainer={"numNodes": 3})
        job.train()
        assert len(job.workers) == 3


class TestScale:
    @pytest.mark.parametrize("size", [1, 3])
    def test_workers_of_another_number_are_all_made_anew_as_launchers_wait_for_a_number(
        self, world: MakeWorld, size: int
    ) -> None:
        job = world()
        job.train()
        job.edit(trainer={"numNodes": size})
        job.settle()
        assert [(pod.id.attempt, pod.id.index) for pod in job.workers] == [
            (1, index) for index in range(size)
        ]
        assert job.phase is Phase.RESTARTING
        job.get_ready(*job.workers)
        job.settle()
        assert (job.phase, job.status.restarts) == (Phase.RUNNING, 0)

    def test_workers_that_leave_for_a_suspension_that_was_taken_back_are_no_failure(
        self, world: MakeWorld
    ) -> None:
        job = world()
        job.train()
        job.edit(suspend=True, trainer={"numNodes": 3})
        job.step()
        job.edit(suspend=False)
        job.train()
        assert len(job.workers) == 3
        assert job.status.restarts == 0


class TestRestarts:
    def test_a_failed_worker_is_replaced_at_once_and_the_others_stay(
        self, world: MakeWorld
    ) -> None:
        job = world()
        job.train()
        stays = job.workers[1]
        job.fail(job.workers[0])
        wanted = job.step()
        assert [each["metadata"]["name"].split("-")[-2:] for each in wanted.objects] == [
            ["w0", "1"]
        ]
        assert stays in job.workers
        assert (job.status.restarts, job.status.restarts_count_towards_max) == (1, 1)
        assert job.phase is Phase.RESTARTING

    def test_one_failure_is_counted_once(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        job.fail(job.workers[0])
        job.settle()
        job.wait(60)
        job.settle()
        assert job.status.restarts == 1

    def test_the_peers_of_a_dead_rank_are_part_of_its_failure(self, world: MakeWorld) -> None:
        job = world(trainer={"numNodes": 4})
        job.train()
        first, second, *_ = job.workers
        job.fail(first, 70, "RuntimeError", "cuda")
        assert job.step().restarts == ("Exited",)
        job.wait(3)
        job.fail(second, 70, "RuntimeError", "connection closed")
        assert job.step().restarts == ()
        assert job.status.restarts_count_towards_max == 1
        assert job.status.last_failure.message == "cuda"

    def test_a_second_failure_without_a_checkpoint_makes_all_anew_after_a_while(
        self, world: MakeWorld
    ) -> None:
        job = world()
        job.train()
        for _ in range(2):
            job.wait(30)
            job.fail(job.workers[0])
            job.settle()
            job.get_ready(*job.workers)
            job.settle()
        assert job.status.attempt == 1
        assert job.phase is Phase.RESTARTING
        assert job.workers == []
        assert 8 <= (job.status.retry_time - job.now).total_seconds() <= 12
        job.wait(12)
        job.train()
        assert job.status.retry_time is None

    def test_a_checkpoint_gives_the_restarts_back(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        for step in (10, 20, 30):
            job.wait(30)
            job.checkpoint(step)
            job.settle()
            job.wait(30)
            job.fail(job.workers[0])
            job.settle()
            job.get_ready(*job.workers)
            job.settle()
        assert job.status.attempt == 0
        assert (job.status.restarts, job.status.restarts_count_towards_max) == (3, 1)

    def test_the_budget_ends(self, world: MakeWorld) -> None:
        job = world(failurePolicy={"maxRestarts": 2})
        job.train()
        for _ in range(3):
            job.wait(700)
            job.settle()
            job.get_ready(*job.workers)
            job.fail(job.workers[0], 1, "RuntimeError", "boom")
            job.settle()
        assert job.condition(Condition.FAILED) == ("True", "RestartsExhausted")
        assert "boom" in job.status.condition(Condition.FAILED).message

    def test_death_at_one_step_again_and_again_names_the_step(self, world: MakeWorld) -> None:
        job = world(failurePolicy={"maxRestarts": 100})
        job.train()
        job.checkpoint(40)
        job.settle()
        for _ in range(6):
            job.wait(700)
            job.settle()
            if job.phase is Phase.FAILED:
                break
            job.get_ready(*job.workers)
            job.fail(job.workers[0], 70, "RuntimeError", "boom")
            job.settle()
        assert job.condition(Condition.FAILED) == ("True", "FailsAtStep")
        assert "at step 40" in job.status.condition(Condition.FAILED).message

    @pytest.mark.parametrize("how", ["drain", "delete", "vanish"])
    def test_what_is_done_to_the_job_is_made_good(self, world: MakeWorld, how: str) -> None:
        job = world()
        job.train()
        victim = job.workers[0]
        if how == "drain":
            job.take_away(victim)
        elif how == "delete":
            job.change(victim, deleting=job.now)
        else:
            job.vanish(victim)
        wanted = job.step()
        assert [each["kind"] for each in wanted.objects] == ["Pod"]
        assert job.status.restarts == 1
        counted = 1 if how == "vanish" else 0
        assert job.status.restarts_count_towards_max == counted

    def test_a_worker_that_ends_with_bad_data_fails_the_job(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        job.fail(job.workers[1], 78, "ConfigError", "maxLength: too long")
        job.settle()
        assert job.condition(Condition.FAILED) == ("True", "InvalidSpec")

    def test_a_pod_on_a_node_that_is_gone_blocks_nothing(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        job.nodes = {"node-1": None}  # node-0 is not among them
        victim = job.workers[0]
        job.change(victim, deleting=job.now)
        wanted = job.step()
        assert [(each.name, each.grace_seconds) for each in wanted.deletions] == [(victim.name, 0)]
        assert [each["kind"] for each in wanted.objects] == ["Pod"]

    def test_the_coordinator_is_replaced_and_the_workers_stay(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        workers = job.workers
        job.fail(job.pod(Role.COORDINATOR), 137)
        job.step()
        assert job.workers == workers
        assert job.pod(Role.COORDINATOR).id.incarnation == 1
        assert job.status.restarts == 1

    def test_a_node_where_workers_fail_twice_is_closed_to_the_job(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        for failures in (1, 2):
            job.wait(700)
            job.settle()
            job.get_ready(*job.workers)
            job.fail(job.workers[0])
            job.settle()
            assert [(each.name, each.failures) for each in job.status.excluded_nodes] == [
                ("node-0", failures)
            ]

    def test_gpu_time_is_counted_and_what_is_lost_apart(self, world: MakeWorld) -> None:
        job = world()
        job.train()
        job.wait(100)
        job.checkpoint(10)
        job.settle()
        job.wait(50)
        job.fail(job.workers[0])
        job.step()
        assert job.status.gpu_seconds == 150 * 2 * 8
        assert job.status.lost_gpu_seconds == 50 * 2 * 8


class TestGangsThatCannotStart:
    def _begin(self, world: MakeWorld, **changes: Any) -> Any:
        job = world(**changes)
        job.settle()
        job.get_ready(job.pod(Role.COORDINATOR))
        job.settle()
        return job

    def test_half_a_gang_gives_back_what_it_holds(self, world: MakeWorld) -> None:
        job = self._begin(world, startupDeadlineSeconds=300)
        job.get_ready(job.workers[0])
        job.change(job.workers[1], unschedulable="0/4 nodes are available")
        job.settle()
        assert job.condition(Condition.SCHEDULED) == ("False", "Unschedulable")
        job.wait(299)
        job.settle()
        assert len(job.workers) == 2
        job.wait(1)
        job.settle()
        assert job.workers == []
        assert job.status.last_failure.reason == "NotStarted"
        assert job.status.restarts_count_towards_max == 0
        job.wait(100)
        job.settle()
        assert len(job.workers) == 2

    def test_an_obstacle_that_is_seen_when_the_time_is_over_is_told_too(
        self, world: MakeWorld
    ) -> None:
        job = self._begin(world)
        job.wait(130)
        job.hold_up(job.workers[1], "ImagePullBackOff", "no such image")
        job.step()
        assert [reason for reason, _ in job.events[-2:]] == [
            "ImagePullFailed",
            "StartupDeadlineExceeded",
        ]

    def test_an_image_that_cannot_be_pulled_is_given_two_minutes(self, world: MakeWorld) -> None:
        job = self._begin(world)
        for pod in job.workers:
            job.hold_up(pod, "ImagePullBackOff", "no such image")
        job.settle()
        assert job.condition(Condition.READY) == ("False", "ImagePullFailed")
        job.wait(120)
        job.settle()
        assert job.workers == []

    def test_a_quota_that_allows_some_pods_is_told_and_tried_again(self, world: MakeWorld) -> None:
        job = self._begin(world, trainer={"numNodes": 3})
        lost = job.workers[2]
        del job.pods[lost.id]
        job.refused = {"Pod": "exceeded quota: gpus"}
        job.step()
        assert job.condition(Condition.READY) == ("False", "WaitingForQuota")
        assert job.plan().again is not None
        job.refused = {}
        job.step()
        assert len(job.workers) == 3

    def test_a_queue_stops_the_clock(self, world: MakeWorld) -> None:
        job = self._begin(world, activeDeadlineSeconds=600)
        for pod in job.workers:
            job.change(pod, gated=True)
        job.settle()
        assert job.phase is Phase.QUEUED
        assert job.condition(Condition.READY) == ("True", "Queued")
        assert job.plan().again is None
        job.wait(100_000)
        job.settle()
        assert len(job.workers) == 2
        assert job.status.active_seconds == 0


def test_what_is_missing_is_said_in_words(world: MakeWorld) -> None:
    job = world()
    job.settle()
    pod = job.pod(Role.COORDINATOR)
    job.change(pod, unschedulable='0/3 nodes are available: persistentvolumeclaim "data" not found')
    job.settle()
    assert job.condition(Condition.READY) == ("False", "WaitingForClaim")
    assert "claim data does not exist" in job.status.condition(Condition.READY).message
    job.change(pod, unschedulable=None)
    job.hold_up(pod, "CreateContainerConfigError", 'secret "s3" not found')
    job.settle()
    assert job.condition(Condition.READY) == ("False", "WaitingForSecret")


def test_conditions_keep_the_time_of_their_last_change(world: MakeWorld) -> None:
    job = world()
    job.train()
    before = job.status.condition(Condition.READY).last_transition_time
    job.wait(100)
    job.edit(failurePolicy={"maxRestarts": 5})
    job.settle()
    after = job.status.condition(Condition.READY)
    assert after.last_transition_time == before
    assert (after.observed_generation, job.status.observed_generation) == (2, 2)
    assert Reason(after.reason) is Reason.RUNNING


def test_a_coordinator_that_left_with_failed_workers_does_not_make_the_job_complete(
    world: MakeWorld,
) -> None:
    job = world()
    job.train()
    for pod in job.workers:
        job.fail(pod, 70, "RuntimeError", "boom")
    job.succeed(job.pod(Role.COORDINATOR), "Ended")
    job.settle()
    assert job.phase is Phase.RESTARTING
    assert job.status.restarts_count_towards_max == 1
    job.get_ready(job.pod(Role.COORDINATOR))
    job.wait(700)
    job.settle()
    job.get_ready(*job.workers)
    job.settle()
    assert job.phase is Phase.RUNNING


def test_workers_that_lost_the_coordinator_count_nothing_against_the_job(world: MakeWorld) -> None:
    job = world()
    job.train()
    for pod in job.workers:
        job.fail(pod, 75, "CoordinatorLostError", "the coordinator is gone")
    job.take_away(job.pod(Role.COORDINATOR))
    job.settle()
    assert job.status.restarts_count_towards_max == 0


class TestClaims:
    def test_a_claim_for_one_node_is_refused_by_name_for_several(self, world: MakeWorld) -> None:
        job = world()
        job.claims = {
            "models": Claim("models", ("ReadOnlyMany",)),
            "data": Claim("data", ("ReadWriteOnce",)),
            "results": Claim("results", ("ReadWriteMany",)),
        }
        job.settle()
        assert job.condition(Condition.FAILED) == ("True", "ClaimNotShared")
        assert "claim data (ReadWriteOnce)" in job.status.condition(Condition.FAILED).message

    def test_a_job_that_grew_beyond_its_claim_waits_to_be_made_small_again(
        self, world: MakeWorld
    ) -> None:
        job = world(trainer={"numNodes": 1})
        job.claims = {
            name: Claim(name, ("ReadWriteOnce",)) for name in ("models", "data", "results")
        }
        job.train()
        job.edit(suspend=True)
        job.settle()
        job.edit(suspend=False, trainer={"numNodes": 2})
        job.settle()
        assert job.condition(Condition.READY) == ("False", "ClaimNotShared")
        assert job.events[-1][0] == "ClaimNotShared"
        assert not any(pod.active for pod in job.pods.values())
        job.edit(trainer={"numNodes": 1})
        job.train()

    def test_a_claim_that_is_only_read_may_be_read_only(self, world: MakeWorld) -> None:
        job = world()
        job.claims = {
            "models": Claim("models", ("ReadOnlyMany",)),
            "data": Claim("data", ("ReadOnlyMany",)),
            "results": Claim("results", ("ReadWriteMany",)),
        }
        job.train()

    def test_a_claim_that_is_missing_is_waited_for(self, world: MakeWorld) -> None:
        job = world()
        shared = ("ReadWriteMany",)
        job.claims = {name: Claim(name, shared) for name in ("models", "data")}
        job.settle()
        assert job.condition(Condition.READY) == ("False", "WaitingForClaim")
        job.claims["results"] = Claim("results", shared)
        job.train()

    def test_claims_that_have_no_volume_are_named(self, world: MakeWorld) -> None:
        job = world()
        shared = ("ReadWriteMany",)
        slow = Claim("models", shared, "Pending", "slow")
        job.claims = {"models": slow, "data": Claim("data", shared), "results": slow}
        job.claims["results"] = Claim("results", shared, "Pending")
        job.settle()
        words = "0/9 nodes are available: pod has unbound immediate PersistentVolumeClaims. no"
        job.change(job.pod(Role.COORDINATOR), unschedulable=words)
        job.settle()
        assert job.condition(Condition.READY) == ("False", "WaitingForClaim")
        assert job.status.condition(Condition.READY).message == (
            "no volume is bound to volume claim models (storage class slow) and results (it has no "
            "storage class, so somebody has to make a volume for it); kubectl describe pvc models "
            "results -n team says why, and the job goes on once it is bound"
        )
        job.claims = dict.fromkeys(job.claims, Claim("data", shared))
        job.settle()
        # They were bound just now, and the scheduler has not looked again.
        assert job.condition(Condition.READY) == ("False", "Unschedulable")


# --- a worker and its coordinator that share a node ---

OF_ONE_NODE = {name: Claim(name, ("ReadWriteOnce",)) for name in ("models", "data", "results")}


def _made(wanted: Any) -> dict[str, Any]:
    """The pods that are wanted, by role."""
    pods = [each for each in wanted.objects if each["kind"] == "Pod"]
    return {each["metadata"]["labels"]["training.cptjob.io/role"]: each for each in pods}


def _node(pod: Any) -> str | None:
    """The node that a coordinator must be on."""
    node: str | None = pod["metadata"].get("annotations", {}).get("training.cptjob.io/node")
    return node


def _preferred(pod: Any) -> list[Any]:
    affinity = pod["spec"]["affinity"]["nodeAffinity"]
    terms = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return [field for term in terms for field in term["preference"].get("matchFields", [])]


@pytest.fixture
def together(world: MakeWorld) -> Any:
    """A job of one worker whose claims one node only can mount."""
    job = world(trainer={"numNodes": 1})
    job.claims = OF_ONE_NODE
    return job


def test_a_worker_prefers_the_node_of_its_coordinator(together: Any) -> None:
    together.settle()
    together.change(together.pod(Role.COORDINATOR), node="here")
    together.get_ready(together.pod(Role.COORDINATOR))
    worker = _made(together.step())["worker"]
    assert _preferred(worker) == [{"key": "metadata.name", "operator": "In", "values": ["here"]}]


def test_a_coordinator_follows_its_worker_that_found_room_elsewhere(together: Any) -> None:
    together.settle()
    first = together.pod(Role.COORDINATOR)
    together.change(first, node="full")
    together.get_ready(first)
    together.settle()
    together.change(together.workers[0], node="free")
    wanted = together.step()
    assert [each.name for each in wanted.deletions] == [first.name]
    assert _node(_made(wanted)["coordinator"]) == "free"
    together.settle()
    assert together.pod(Role.COORDINATOR).bound_to == "free"
    assert together.status.restarts == 0


def test_claims_that_several_nodes_can_mount_keep_nobody_together(world: MakeWorld) -> None:
    job = world(trainer={"numNodes": 1})
    job.train()
    assert job.pod(Role.COORDINATOR).node != "elsewhere"
    job.change(job.workers[0], node="elsewhere")
    assert _made(job.step()) == {}


def test_the_coordinator_of_a_single_worker_waits_until_its_claims_are_read(
    world: MakeWorld,
) -> None:
    job = world(trainer={"numNodes": 1})
    wanted = job.step()
    assert _made(wanted) == {}
    assert wanted.again == job.now
    again = job.step()
    assert list(_made(again)) == ["coordinator"]
    assert again.status is None, "one write is enough"


def test_a_single_worker_without_its_configuration_is_not_looked_at_again_and_again(
    world: MakeWorld,
) -> None:
    job = world(trainer={"numNodes": 1})
    job.commit(job.plan())
    wanted = job.plan()
    assert wanted.again - job.now >= timedelta(seconds=10)
    job.refused = {"ConfigMap": "there is another"}
    job.commit(job.plan())
    assert job.condition(Condition.READY) == ("False", "Refused")
    assert job.plan().again - job.now >= timedelta(seconds=10)


def test_a_claim_for_one_pod_is_refused_by_name(world: MakeWorld) -> None:
    job = world(trainer={"numNodes": 1})
    job.claims = OF_ONE_NODE | {"data": Claim("data", ("ReadWriteOncePod",))}
    job.settle()
    assert job.condition(Condition.FAILED) == ("True", "ClaimNotShared")
    assert "claim data (ReadWriteOncePod)" in job.status.condition(Condition.FAILED).message


def test_the_pods_of_a_lost_node_do_not_hold_those_that_come_after_them(together: Any) -> None:
    together.settle()
    together.change(together.pod(Role.COORDINATOR), node="lost")
    together.get_ready(together.pod(Role.COORDINATOR))
    together.settle()
    together.change(together.workers[0], node="lost")
    together.get_ready(together.workers[0])
    together.settle()
    # Asked to go one after the other; the node does not answer, so they stay.
    together.change(together.pod(Role.COORDINATOR), deleting=together.now)
    first = _made(together.step())
    assert _node(first["coordinator"]) == "lost", "it follows the worker, which still trains"
    together.change(together.workers[0], deleting=together.now)
    second = _made(together.step())
    assert _node(second["coordinator"]) is None
    assert together.status.incarnations[0].incarnation == 2


def test_a_gang_whose_new_coordinator_does_not_start_gives_back_what_it_holds(
    world: MakeWorld,
) -> None:
    job = world(startupDeadlineSeconds=300)
    job.train()
    job.vanish(job.pod(Role.COORDINATOR))
    job.settle()
    job.change(job.pod(Role.COORDINATOR), unschedulable="0/3 nodes are available: 3 Too many pods.")
    job.step()
    assert job.plan().again <= job.now + timedelta(seconds=300)
    job.wait(301)
    job.settle()
    assert job.workers == []
    assert job.condition(Condition.READY)[1] == "Unschedulable"
    assert any(reason == "StartupDeadlineExceeded" for reason, _ in job.events)


def test_a_job_that_is_scaled_beyond_the_limit_holds_still_until_it_is_scaled_back(
    world: MakeWorld,
) -> None:
    job = world({"limits": {"maxNodes": 3}}, activeDeadlineSeconds=3600)
    job.train()
    job.edit(suspend=True)
    job.settle()
    job.edit(suspend=False, trainer={"numNodes": 4})
    job.settle()
    assert job.condition(Condition.READY) == ("False", "LimitExceeded")
    assert "spec.trainer.numNodes: 4 nodes are more" in job.status.conditions[0].message
    assert [reason for reason, _ in job.events].count("LimitExceeded") == 1
    job.wait(7200)  # it holds nothing, so its own time stands still
    job.settle()
    assert (job.phase, job.pods) == (Phase.RESTARTING, {})
    job.edit(trainer={"numNodes": 3})
    job.settle()
    job.get_ready(job.pod(Role.COORDINATOR))
    job.settle()
    assert len(job.workers) == 3


def test_a_gang_that_trains_is_left_alone_by_a_number_beyond_the_limit(world: MakeWorld) -> None:
    job = world({"limits": {"maxNodes": 3}}, elasticPolicy={"maxRestarts": 5})
    job.train()
    before = job.workers
    job.edit(trainer={"numNodes": 4})
    job.settle()
    assert job.condition(Condition.READY) == ("False", "LimitExceeded")
    assert job.workers == before
    job.edit(trainer={"numNodes": 2})
    job.settle()
    assert (job.phase, job.workers) == (Phase.RUNNING, before)


def test_a_lower_limit_does_not_hold_a_job_that_was_accepted_before_it(world: MakeWorld) -> None:
    job = world()
    job.train()
    limited = {"pools": {"a100": {}}, "limits": {"maxNodes": 1}}
    job.settings = Settings.from_json(json.dumps(limited))
    for pod in job.workers:
        job.fail(pod, 1, "RuntimeError", "boom")
    job.settle()
    job.wait(700)
    job.settle()
    assert [pod.id.attempt for pod in job.workers] == [1, 1]


def _changed(**limits: int) -> Settings:
    """Settings in which everything is otherwise than when the job was accepted."""
    jobs = {"image": "cptjob/trainer:2", "serviceAccountName": "other", "pool": "h100"}
    pools = {"a100": {}, "h100": {}}
    return Settings.from_json(json.dumps({"pools": pools, "jobs": jobs, "limits": limits}))


def _lose_configuration(job: Any) -> None:
    del job.children["ConfigMap"]
    job.profile = job.config = None


def test_a_lost_configuration_is_made_again_as_it_was_decided(world: MakeWorld) -> None:
    job = world(scheduling={"pool": None}, checkpoint={"keepLast": 9})
    job.train()
    before, config, events = job.profile, job.config, len(job.events)
    _lose_configuration(job)
    job.settings = _changed(maxNodes=1, maxCheckpoints=1)
    job.settle()
    assert job.profile == before
    assert job.config == config
    assert job.phase is Phase.RUNNING
    told = [reason for reason, _ in job.events[events:]]
    assert told == ["ConfigLost"]


def test_news_of_a_lost_configuration_does_not_wait_for_a_status_that_may(
    world: MakeWorld,
) -> None:
    job = world()
    job.train()
    job.change(job.workers[0], ready=False)
    assert not job.plan().urgent
    _lose_configuration(job)
    assert job.plan().urgent  # an Event beside a status that waits would be left out


def test_a_configuration_that_is_refused_again_and_again_is_told_as_refused(
    world: MakeWorld,
) -> None:
    job = world()
    job.train()
    _lose_configuration(job)
    job.refused = {"ConfigMap": "exceeded quota"}
    assert "ConfigLost" not in [each.reason for each in job.plan().events]


def test_a_lost_configuration_whose_pool_is_gone_waits_for_it_and_touches_no_pod(
    world: MakeWorld,
) -> None:
    job = world()
    job.train()
    pods = dict(job.pods)
    _lose_configuration(job)
    before, job.settings = job.settings, Settings()
    job.settle()
    assert job.condition(Condition.READY) == ("False", "WaitingForPool")
    assert (job.pods, job.profile) == (pods, None)
    job.settings = before
    job.settle()
    assert job.phase is Phase.RUNNING


def test_checkpoints_to_keep_that_were_accepted_are_no_fault_under_a_new_limit(
    world: MakeWorld,
) -> None:
    job = world(checkpoint={"keepLast": 9})
    job.settle()
    job.settings = _changed(maxCheckpoints=1)
    job.get_ready(job.pod(Role.COORDINATOR))
    job.settle()
    assert job.phase is Phase.STARTING


def test_a_job_that_is_refused_waits_untouched_and_goes_on_once_its_spec_is_mended(
    world: MakeWorld,
) -> None:
    job = world(scheduling={"pool": "unknown"})
    job.settle()
    assert job.phase is Phase.PENDING
    assert job.condition(Condition.STALLED) == ("True", "InvalidSpec")
    assert job.condition(Condition.READY) == ("False", "InvalidSpec")
    assert job.condition(Condition.RECONCILING) is None
    assert job.condition(Condition.FAILED) is None
    assert (job.made, job.children, job.status.start_time) == ([], {}, None)
    assert [reason for reason, _ in job.events] == ["InvalidSpec"]
    job.wait(3600)
    assert job.step().status is None, "it is said once"
    job.edit(scheduling={"pool": "a100"})
    job.train()
    assert job.condition(Condition.STALLED) is None
    assert job.condition(Condition.READY) == ("True", "Running")


def test_a_job_that_the_platform_refuses_goes_on_once_the_platform_allows_it(
    world: MakeWorld,
) -> None:
    job = world(settings={"limits": {"maxNodes": 1}})
    job.settle()
    assert job.condition(Condition.STALLED) == ("True", "LimitExceeded")
    assert "and it goes on" in job.status.condition(Condition.READY).message
    job.settings = world().settings
    job.train()
    assert job.condition(Condition.STALLED) is None


def test_a_change_of_a_job_that_has_ended_is_answered_once(world: MakeWorld) -> None:
    job = world()
    job.train()
    job.succeed(job.pod(Role.COORDINATOR), "Complete")
    job.settle()
    assert job.phase is Phase.COMPLETE
    job.events.clear()
    job.edit(activeDeadlineSeconds=99)
    job.settle()
    assert [reason for reason, _ in job.events] == ["AlreadyEnded"]
    assert job.condition(Condition.COMPLETE) == ("True", "Complete")
    assert job.status.observed_generation == job.generation


@pytest.mark.parametrize(("processes", "told"), [(1, True), (None, False)])
def test_gpus_that_no_process_uses_are_told_at_acceptance(
    processes: int | None, told: bool, world: MakeWorld
) -> None:
    limits = {"nvidia.com/gpu": "8"}
    job = world(trainer={"numProcPerNode": processes, "resourcesPerNode": {"limits": limits}})
    job.settle()
    warnings = [message for reason, message in job.events if "numProcPerNode" in message]
    assert bool(warnings) == told


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ((), "volume claims data, models, results do not exist in namespace team; make them and"),
        (("data", "models"), "volume claim results does not exist in namespace team; make it and"),
    ],
)
def test_every_claim_that_is_missing_is_named(
    there: tuple[str, ...], said: str, world: MakeWorld
) -> None:
    job = world()
    job.claims = {name: Claim(name, ("ReadWriteMany",)) for name in there}
    job.settle()
    assert job.status.condition(Condition.READY).message == f"{said} the job goes on"


# --- TensorBoard ---

SHOWN = {"tensorBoard": True}
OF_TENSORBOARD = {f"{kind} job-tensorboard" for kind in ("Service", "NetworkPolicy", "Deployment")}


def _extras(wanted: Any) -> set[str]:
    return {f"{each['kind']} {each['metadata']['name']}" for each in wanted.extras}


def test_tensorboard_comes_with_the_workers_and_stays_with_the_job(world: MakeWorld) -> None:
    job = world(tracking=SHOWN)
    job.settle()
    assert not OF_TENSORBOARD & job.children.keys(), "nothing is held before the data is prepared"
    job.get_ready(job.pod(Role.COORDINATOR))
    wanted = job.step()
    assert _extras(wanted) == OF_TENSORBOARD
    assert "worker" in _made(wanted)
    job.settle()
    job.get_ready(*job.workers)
    job.settle()
    job.edit(suspend=True)
    job.settle()
    assert job.phase is Phase.SUSPENDED
    job.edit(suspend=False)
    job.settle()
    job.succeed(job.pod(Role.COORDINATOR), "Complete")
    job.settle()
    assert job.phase is Phase.COMPLETE
    assert job.children.keys() >= OF_TENSORBOARD
    assert _extras(job.step()) == set()


def test_what_of_tensorboard_is_not_there_is_made_also_after_the_end(world: MakeWorld) -> None:
    """Its operator died, or somebody has deleted it, or it is refused: then it comes again."""
    job = world(tracking=SHOWN)
    job.settle()
    job.succeed(job.pod(Role.COORDINATOR), "AlreadyComplete")
    job.settle()
    del job.children["Service job-tensorboard"]
    wanted = job.plan()
    assert _extras(wanted) == {"Service job-tensorboard"}
    assert wanted.again - job.now == timedelta(seconds=15)
    job.apply(wanted)
    assert job.plan().again is None


def test_a_job_that_could_not_be_prepared_shows_nothing(world: MakeWorld) -> None:
    job = world(tracking=SHOWN)
    job.settle()
    job.fail(job.pod(Role.COORDINATOR), 65, "DataError", "a broken line")
    job.settle()
    assert job.phase is Phase.FAILED
    assert not OF_TENSORBOARD & job.children.keys()


def test_tensorboard_is_for_jobs_that_ask_for_it_when_they_are_accepted(world: MakeWorld) -> None:
    """One that an older operator accepted has the field from an older definition's default."""
    job = world()
    job.train()
    job.edit(tracking=SHOWN)
    assert job.plan().extras == ()


def test_a_claim_of_one_node_is_refused_where_tensorboard_would_hold_it(together: Any) -> None:
    together.edit(tracking=SHOWN)
    together.settle()
    assert together.condition(Condition.FAILED) == ("True", "ClaimNotShared")
    message = together.status.condition(Condition.FAILED).message
    assert "claim results (ReadWriteOnce)" in message
    assert "leave spec.tracking.tensorBoard out" in message
    assert together.made == []


def test_claims_that_a_job_only_reads_may_be_of_one_node_beside_tensorboard(
    world: MakeWorld,
) -> None:
    job = world(trainer={"numNodes": 1}, tracking=SHOWN)
    job.claims = OF_ONE_NODE | {"results": Claim("results", ("ReadWriteMany",))}
    job.train()
    assert job.children.keys() >= OF_TENSORBOARD
