"""The API server refuses, is away, forgets, or answers too late, in each stage of a job's life.

Afterwards everything stands where it stands without that. `make soak` does it at every write; CI at
a few that move with the date.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
from draws import dice_of_today, of_today
from kubernetes import client
from lives import STAGES, Life, Live, stand, strikes_everywhere, strikes_near
from running import RunningOperator
from world import World

from testplane.nodes import Nodes
from testplane.plane import ControlPlane
from testplane.proxy import FaultProxy, Trigger

Start = Callable[..., RunningOperator]

#: More writes than any stage makes, retries included.
MANY = 200
#: Answers to a write that was not done, and those that say nothing of whether it was.
CODES = (409, 422, 429, 500, 503, 504)
UNCERTAIN = (500, 503, 504)
ANSWERS = [*((code, False) for code in CODES), *((code, True) for code in UNCERTAIN)]


class Failures:
    """These writes of a life are answered with `code`. reaches: though they are done."""

    def __init__(self, numbers: range | list[int], code: int, *, reaches: bool = False) -> None:
        self._numbers, self._code, self._reaches = numbers, code, reaches
        self.triggers: dict[int, Trigger] = {}

    def __call__(self, life: Life) -> None:
        self.triggers = {
            number: life.proxy.fail(number, self._code, reaches=self._reaches)
            for number in self._numbers
        }

    @property
    def happened(self) -> int:
        return sum(each.happened for each in self.triggers.values())


@pytest.mark.parametrize("reaches", [False, True], ids=["undone", "done"])
def test_every_second_write_that_fails_changes_nothing_in_the_end(
    live: Live, reaches: bool
) -> None:
    stage = of_today(STAGES, "half", reaches, turns=2)
    plain = live(stage)
    # A refusal (422) that was carried out all the same is nothing that an API server does.
    code = of_today(UNCERTAIN if reaches else [409, 429, 503], "half")
    failures = Failures(range(1, MANY, 2), code, reaches=reaches)
    disturbed = live(stage, failures, like=plain.picture)
    assert failures.happened >= len(plain.writes) // 2
    assert disturbed.picture == plain.picture, f"{stage}, every second write answered with {code}"


def test_a_write_that_fails_once_changes_nothing_in_the_end(live: Live) -> None:
    stage, code = of_today(STAGES, "once"), of_today(CODES, "once")
    plain = live(stage)
    number = dice_of_today("once").randint(1, len(plain.writes))
    strikes_near(live, stage, plain, number, lambda n: Failures([n], code), f"answered with {code}")


@pytest.mark.soak
@pytest.mark.parametrize(("code", "reaches"), ANSWERS)
@pytest.mark.parametrize("stage", STAGES)
def test_any_write_that_fails_changes_nothing_in_the_end(
    live: Live, stage: str, code: int, reaches: bool
) -> None:
    plain, what = live(stage), f"answered with {code}, {reaches=}"
    strikes_everywhere(live, stage, plain, lambda n: Failures([n], code, reaches=reaches), what)


def test_a_restart_is_told_and_counted_though_its_pod_is_not_made_at_once(live: Live) -> None:
    plain = live("loses_a_pod")
    number = len(plain.writes) - plain.writes[::-1].index("POST pods")
    failures = Failures([number], 500)

    def harm(life: Life) -> None:
        failures(life)
        life.at_the_end = lambda: told(life)

    def told(life: Life) -> None:
        life.world.wait(lambda: life.world.told("job", "Restarting"), "the event")
        figures = life.operator.figures().items()
        restarts = [value for name, value in figures if name.startswith("cptjob_restarts_total")]
        assert sum(restarts) == 1

    disturbed = live("loses_a_pod", harm, like=plain.picture)
    assert failures.happened
    assert disturbed.picture == plain.picture


# --- of two operators, one is late ---


class LateLeader:
    """The leader is frozen with a write under way, which arrives when another has long led on."""

    def __init__(self, number: int) -> None:
        self._number, self.happened = number, False
        self.trigger = Trigger()

    def __call__(self, life: Life) -> None:
        life.rival.start().wait_ready()
        self.trigger = life.proxy.hold(self._number)
        life.meanwhile = lambda: self._freeze(life)
        life.at_the_end = lambda: self._thaw(life)

    def _freeze(self, life: Life) -> None:
        if self.trigger.happened and not self.happened:
            life.operator.freeze()
            self.happened = True

    def _thaw(self, life: Life) -> None:
        stand(life)  # the last writes of a stage come when it is over
        if not self.happened:
            return
        life.rival.wait_leading()
        before = len(life.proxy.writes)
        self.trigger.release()
        life.operator.thaw()
        life.world.wait(
            lambda: life.operator.figure("cptjob_leader") == 0, "it to see that it lost"
        )
        life.rival.wait_quiet()
        assert len(life.proxy.writes) == before, "the loser wrote"


def test_a_write_that_arrives_when_another_leads_changes_nothing_in_the_end(live: Live) -> None:
    stage = of_today(STAGES, "late")
    plain = live(stage)
    number = dice_of_today("late").randint(1, len(plain.writes))
    strikes_near(live, stage, plain, number, LateLeader, "late")


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_any_write_that_arrives_when_another_leads_changes_nothing_in_the_end(
    live: Live, stage: str
) -> None:
    strikes_everywhere(live, stage, live(stage), LateLeader, "late")


# --- watches and the API server itself ---


def test_everything_that_goes_while_no_watch_holds_is_noticed(
    world: World, start: Start, proxy: FaultProxy, nodes: Nodes
) -> None:
    for name in nodes.add(2):
        nodes.cordon(name)  # a pod without a node is gone at once when it is deleted
    operator = start(kubeconfig=proxy.kubeconfig()).wait_leading()
    for name in ("stays", "goes", "again"):
        world.create(name, 2)
    world.prepare("stays", "goes", "again")
    for name in ("stays", "goes", "again"):
        world.run(name, 2)
    world.wait(lambda: proxy.open_watches >= 3, "the watches")
    before = _pods(world, "again")
    with proxy.no_watches(expire=True):
        world.kubelet.finish(world.namespace, world.living("stays")[0].metadata.name)
        world.delete("goes")
        world.delete("again")
        world.create("again", 1)
        nodes.remove("node-1")
        (service,) = [each for each in world.children() if _is_service(each, "stays")]
        world.core.delete_namespaced_service(service.metadata.name, world.namespace)
    world.run("stays", 2)
    world.wait(lambda: any(_is_service(each, "stays") for each in world.children()), "the service")
    world.wait(lambda: not world.pods(job="goes"), "the pods of the deleted job to go")
    world.wait(lambda: not before & _pods(world, "again"), "the pods of the one before it to go")
    world.prepare("again")
    world.run("again", 1)
    world.wait(lambda: operator.figures()['cptjob_jobs{phase="Running"}'] == 2, "the count of jobs")
    named = {"mode": "Manual", "nodeNames": ["node-0", "node-1"]}
    world.create("named", 2, {"spec.scheduling": named})
    world.prepare("named")
    world.wait(
        lambda: world.says("named", "WaitingForNode", "node node-1 does not exist"), "the node"
    )


def _pods(world: World, name: str) -> set[str]:
    """Names of all pods of a job."""
    both = [*world.pods("coordinator", name), *world.pods("worker", name)]
    return {pod.metadata.name for pod in both}


def _is_service(child: Any, job: str) -> bool:
    labels = child.metadata.labels
    return isinstance(child, client.V1Service) and labels["training.cptjob.io/job-name"] == job


@pytest.mark.soak
def test_a_minute_without_an_api_server_changes_nothing(
    world: World, start: Start, plane: ControlPlane
) -> None:
    operator = start().wait_leading()
    for name in ("runs", "starts"):
        world.create(name, 2)
    world.prepare("runs", "starts")
    world.run("runs", 2)
    world.wait(lambda: len(world.living("starts")) == 2, "the workers")
    before = {pod.metadata.uid for role in ("worker", "coordinator") for pod in world.pods(role)}
    with plane.apiserver_down():
        end = time.monotonic() + 60
        plane.wait(lambda: time.monotonic() > end, "a minute")
        assert operator.get("healthz")[0] == 200
    world.run("starts", 2)
    after = {pod.metadata.uid for role in ("worker", "coordinator") for pod in world.pods(role)}
    assert after == before
    assert [world.status(name)["restarts"] for name in ("runs", "starts")] == [0, 0]
    world.kubelet.exit(world.namespace, world.living("runs")[0].metadata.name, 1, "boom")
    world.run("runs", 2)
    assert operator.stop() == 0, "the same process all along"
