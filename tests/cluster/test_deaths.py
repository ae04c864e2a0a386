"""The operator dies before and after each of its writes, in each stage of a job's life.

Afterwards it must stand where an operator stands that was never killed: no pod twice, none forgotten,
each restart counted once. `make soak` kills at every write, CI at a few that move with the date.
"""

import contextlib
import datetime
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from running import RunningOperator
from world import World

from testplane.plane import ControlPlane
from testplane.proxy import Call, FaultProxy, Trigger

Stage = Callable[["Life"], None]


def _counts(call: Call) -> bool:
    """Leases are written by the clock, and an Event that is lost is lost."""
    return call.resource not in ("leases", "events")


@dataclass
class Life:
    """A job, its operator, and the hand that kills it."""

    world: World
    operator: RunningOperator
    proxy: FaultProxy
    trigger: Trigger | None = None

    def wait(self, happened: Callable[[], object], what: str) -> None:
        """Waits, and starts the operator anew when it was killed meanwhile."""

        def seen() -> object:
            self.revive()
            return happened()

        self.world.wait(seen, what)

    def revive(self) -> None:
        if self.operator.died:
            self.operator.start()

    @property
    def phase(self) -> str:
        return str(self.world.status("job").get("phase"))

    def pods(self, role: str, count: int) -> list[Any]:
        """The pods of that role that shall live on, when there are so many."""

        def living() -> list[Any]:
            return [
                pod
                for pod in self.world.pods(role)
                if pod.metadata.deletion_timestamp is None
                and pod.status.phase not in ("Succeeded", "Failed")
            ]

        self.wait(lambda: len(living()) == count, f"{count} pods, {role}")
        return living()

    def run(self, role: str, count: int) -> None:
        for pod in self.pods(role, count):
            self.world.kubelet.run(self.world.namespace, pod.metadata.name)

    def train(self, workers: int) -> None:
        self.run("coordinator", 1)
        self.run("worker", workers)
        self.wait(lambda: self.phase == "Running", "it to run")

    def finish_what_leaves(self) -> None:
        """Plays the kubelet of pods that were asked to go."""
        for role in ("coordinator", "worker"):
            for pod in self.world.pods(role):
                if pod.metadata.deletion_timestamp is not None:
                    with contextlib.suppress(client.exceptions.NotFoundException):
                        self.world.kubelet.finish(self.world.namespace, pod.metadata.name)

    def edit(self, spec: dict[str, Any]) -> None:
        self.world.patch("job", {"spec": spec})


def is_made(life: Life) -> None:
    life.world.create("job", workers=2)
    life.train(2)


def loses_a_pod(life: Life) -> None:
    is_made(life)
    first = life.pods("worker", 2)[0].metadata.name
    life.world.kubelet.exit(life.world.namespace, first, 1, "boom")
    life.run("worker", 2)
    life.wait(lambda: life.phase == "Running", "it to run again")


def loses_the_coordinator(life: Life) -> None:
    is_made(life)
    name = life.pods("coordinator", 1)[0].metadata.name
    life.world.kubelet.exit(life.world.namespace, name, 137, reason="OOMKilled")
    life.run("coordinator", 1)
    life.wait(lambda: life.phase == "Running", "it to run again")


def begins_anew(life: Life) -> None:
    """All workers fail: a new attempt."""
    is_made(life)
    for pod in life.pods("worker", 2):
        life.world.kubelet.exit(life.world.namespace, pod.metadata.name, 1, "boom")
    life.wait(lambda: life.world.status("job").get("attempt") == 1, "a new attempt")
    life.run("worker", 2)
    life.wait(lambda: life.phase == "Running", "it to run again")


def is_suspended_and_goes_on(life: Life) -> None:
    is_made(life)
    life.edit({"suspend": True})

    def suspended() -> bool:
        life.finish_what_leaves()
        return life.phase == "Suspended"

    life.wait(suspended, "it to be suspended")
    # More workers, as only a suspended job may have.
    life.edit({"suspend": False, "trainer": {"numNodes": 3}})
    life.train(3)


def is_complete_and_goes(life: Life) -> None:
    is_made(life)
    said = '{"exitCode": 0, "reason": "Complete", "message": "{}"}'
    name = life.pods("coordinator", 1)[0].metadata.name
    life.world.kubelet.exit(life.world.namespace, name, 0, said)
    life.wait(lambda: life.phase == "Complete", "it to be complete")
    life.edit({"ttlSecondsAfterFinished": 1})

    def gone() -> bool:
        life.finish_what_leaves()
        return life.world.find("job") is None

    life.wait(gone, "it to go")


STAGES: dict[str, Stage] = {
    stage.__name__: stage
    for stage in (
        is_made,
        loses_a_pod,
        loses_the_coordinator,
        begins_anew,
        is_suspended_and_goes_on,
        is_complete_and_goes,
    )
}


def _picture(world: World) -> dict[str, Any]:
    """Everything about the job that must not depend on whether its operator was killed."""
    job = world.find("job")
    status = (job or {}).get("status", {})
    return {
        "phase": status.get("phase"),
        "attempt": status.get("attempt"),
        "restarts": (status.get("restarts"), status.get("restartsCountTowardsMax")),
        "incarnations": status.get("incarnations"),
        "excluded": status.get("excludedNodes"),
        "conditions": sorted(
            (each["type"], each["status"], each["reason"]) for each in status.get("conditions", [])
        ),
        "resolved": status.get("resolved"),
        "pods": sorted(
            (pod.metadata.name.split("-", 2)[2], pod.status.phase)
            for role in ("coordinator", "worker")
            for pod in world.pods(role)
            if pod.metadata.deletion_timestamp is None
        ),
        "children": len(world.children()),
    }


Live = Callable[..., tuple[dict[str, Any], int, Trigger | None]]


@pytest.fixture(name="live")
def make_live(
    plane: ControlPlane, api: client.ApiClient, new_namespace: Callable[[], str], tmp_path: Path
) -> Iterator[Live]:
    """`live(stage, kill)` goes through a stage; returns the end, the writes, and what killed."""
    running: list[RunningOperator] = []

    def live(
        stage: str, kill: Callable[[FaultProxy, RunningOperator], Trigger] | None = None
    ) -> tuple[dict[str, Any], int, Trigger | None]:
        world = World(plane, api, new_namespace())
        folder = tmp_path / world.namespace
        with FaultProxy(plane, folder / "proxy", counts=_counts) as proxy:
            operator = RunningOperator(
                plane, folder, world.namespace, kubeconfig=proxy.kubeconfig()
            ).start()
            running.append(operator)
            operator.wait_leading()
            life = Life(world, operator, proxy, kill(proxy, operator) if kill else None)
            STAGES[stage](life)
            life.revive()
            operator.wait_quiet()
            end = _picture(world), len(proxy.writes), life.trigger
            operator.kill()
        return end

    yield live
    for each in running:
        each.kill()


def _kill_at(number: int, when: str) -> Callable[[FaultProxy, RunningOperator], Trigger]:
    def arm(proxy: FaultProxy, operator: RunningOperator) -> Trigger:
        place = proxy.kill_before if when == "before" else proxy.kill_after
        return place(number, operator.kill)

    return arm


@pytest.mark.parametrize("stage", ["is_made", "is_suspended_and_goes_on"])
def test_an_operator_that_is_killed_at_some_write_ends_where_it_would_have(
    live: Live, stage: str
) -> None:
    picture, writes, _ = live(stage)
    dice = random.Random(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d} {stage}")
    number, when = dice.randint(1, writes), dice.choice(["before", "after"])
    killed, _, trigger = live(stage, _kill_at(number, when))
    assert trigger is not None
    assert trigger.happened, f"write {number} of {writes} was never made"
    assert killed == picture, f"killed {when} the answer to write {number}"


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_an_operator_that_is_killed_at_any_write_ends_where_it_would_have(
    live: Live, stage: str
) -> None:
    picture, writes, _ = live(stage)
    assert writes >= 6
    for number in range(1, writes + 1):
        for when in ("before", "after"):
            killed, _, trigger = live(stage, _kill_at(number, when))
            # The number of writes moves by one or two with the moment at which events arrive.
            assert trigger is not None
            if trigger.happened:
                assert killed == picture, f"killed {when} the answer to write {number}"
            else:
                assert number > writes - 3, f"write {number} of {writes} was never made"
