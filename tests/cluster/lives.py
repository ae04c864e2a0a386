"""Lives of a job under the real operator, stage by stage, with a proxy in between that does harm.

However a life is disturbed, it must end as an undisturbed one does: see `picture`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kubernetes import client
from running import RunningOperator
from world import SHOWN, World

from testplane.plane import ControlPlane
from testplane.proxy import Call, FaultProxy

Stage = Callable[["Life"], None]


def counts(call: Call) -> bool:
    """Leases are written by the clock, and an Event that is lost is lost."""
    return call.resource not in ("leases", "events")


@dataclass
class Life:
    """A job, its operator, and who disturbs it.

    rival: another operator, which does not go through the proxy.
    meanwhile: is called again and again while the life goes on. at_the_end: once after it.
    """

    world: World
    operator: RunningOperator
    proxy: FaultProxy
    rival: RunningOperator
    meanwhile: Callable[[], object] = lambda: None
    at_the_end: Callable[[], object] = lambda: None

    def wait(self, happened: Callable[[], object], what: str) -> None:
        """Waits, and starts the operator anew when it was killed meanwhile."""

        def seen() -> object:
            self.meanwhile()
            self.revive()
            return happened()

        self.world.wait(seen, what)

    def revive(self) -> None:
        for each in (self.operator, self.rival):
            if each.died:
                each.start()

    def wait_quiet(self) -> None:
        """Returns when nothing is left to do for whoever leads."""

        def quiet() -> bool:
            self.revive()  # the write at which it is killed may be its last one
            leads = self.rival if self.rival.figure("cptjob_leader") == 1 else self.operator
            return leads.quiet

        self.world.wait(quiet, "whoever leads to be done")

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
    """No worker is left: a new attempt."""
    life.world.create("job", workers=1)
    life.train(1)
    (pod,) = life.pods("worker", 1)
    life.world.kubelet.exit(life.world.namespace, pod.metadata.name, 1, "boom")
    life.wait(lambda: life.world.status("job").get("attempt") == 1, "a new attempt")
    life.run("worker", 1)
    life.wait(lambda: life.phase == "Running", "it to run again")


def is_suspended_and_goes_on(life: Life) -> None:
    is_made(life)
    life.edit({"suspend": True})

    def suspended() -> bool:
        life.world.finish_what_leaves()
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
        life.world.finish_what_leaves()
        return life.world.find("job") is None

    life.wait(gone, "it to go")


def is_shown_to_its_end(life: Life) -> None:
    life.world.create("job", workers=1, changes=SHOWN)
    life.train(1)
    said = '{"exitCode": 0, "reason": "Complete", "message": "{}"}'
    name = life.pods("coordinator", 1)[0].metadata.name
    life.world.kubelet.exit(life.world.namespace, name, 0, said)
    life.wait(lambda: life.phase == "Complete", "it to be complete")
    life.wait(lambda: len(life.world.shown("job")) == 3, "its TensorBoard")


STAGES: dict[str, Stage] = {
    stage.__name__: stage
    for stage in (
        is_made,
        loses_a_pod,
        loses_the_coordinator,
        begins_anew,
        is_suspended_and_goes_on,
        is_complete_and_goes,
        is_shown_to_its_end,
    )
}


def picture(world: World) -> dict[str, Any]:
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


class Live(Protocol):
    """`live(stage, disturb)` goes through a stage.

    disturb: is told of the life before it begins, and may set its traps. Returns the picture of the
    end and the number of writes.
    """

    def __call__(
        self, stage: str, disturb: Callable[[Life], object] = ...
    ) -> tuple[dict[str, Any], int]: ...


@contextmanager
def living(
    plane: ControlPlane, api: client.ApiClient, new_namespace: Callable[[], str], folder: Path
) -> Iterator[Live]:
    """Each life has a namespace, a proxy and an operator of its own; all are killed in the end."""
    running: list[RunningOperator] = []

    def live(
        stage: str, disturb: Callable[[Life], object] = lambda life: None
    ) -> tuple[dict[str, Any], int]:
        world = World(plane, api, new_namespace())
        here = folder / world.namespace
        with FaultProxy(plane, here / "proxy", counts=counts) as proxy:
            operator = RunningOperator(
                plane, here, world.namespace, kubeconfig=proxy.kubeconfig()
            ).start()
            rival = RunningOperator(plane, here, world.namespace, identity="rival")
            running.extend((operator, rival))
            operator.wait_leading()
            life = Life(world, operator, proxy, rival)
            disturb(life)
            STAGES[stage](life)
            life.at_the_end()
            life.wait_quiet()
            end = picture(world), len(proxy.writes)
            operator.kill()
            rival.kill()
        return end

    try:
        yield live
    finally:
        for each in running:
            each.kill()
