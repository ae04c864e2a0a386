"""Lives of a job under the real operator, stage by stage, with a proxy in between that does harm.

However a life is disturbed, it must end as an undisturbed one does: see `picture`.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from inventory import Inventory
from kubernetes import client
from running import RunningOperator
from world import SHOWN, World

from cptjob_operator.identity import base
from testplane.nodes import Nodes
from testplane.plane import ControlPlane
from testplane.proxy import Call, FaultProxy

Stage = Callable[["Life"], None]
Picture = dict[str, Any]

#: Nothing moves any more when nothing did for so long: more than a status is held back.
STEADY_SECONDS = 2.5
#: A disturbed life gets this long to come to where another ended: a limit for a loaded machine, no measure.
PATIENCE_SECONDS = 60.0
#: Of the last writes of a life, so many may not be made in another: see `strikes_everywhere`.
SPARE_WRITES = 3


def counts(call: Call) -> bool:
    """Leases are written by the clock, and an Event that is lost is lost."""
    return call.resource not in ("leases", "events")


@dataclass
class Life:
    """A job, its operator, and who disturbs it.

    rival: another operator, which does not go through the proxy.
    meanwhile: is called again and again until the end. at_the_end: once after the stage.
    cut_short: whoever disturbs it sets this when the stage is not to go on.
    """

    world: World
    operator: RunningOperator
    proxy: FaultProxy
    rival: RunningOperator
    inventory: Inventory
    meanwhile: Callable[[], object] = lambda: None
    at_the_end: Callable[[], object] = lambda: None
    cut_short: bool = False

    def go(self, stage: Stage) -> None:
        try:
            stage(self)
        except (CutShort, client.ApiException):
            if not self.cut_short:
                raise
        self.at_the_end()

    def wait(self, happened: Callable[[], object], what: str) -> None:
        """Waits, and starts the operator anew when it was killed meanwhile."""

        def seen() -> object:
            self.meanwhile()
            self.revive()
            if self.cut_short:
                raise CutShort
            return happened()

        self.world.wait(seen, what)

    def revive(self) -> None:
        for each in (self.operator, self.rival):
            if each.died:
                each.start()

    def wait_quiet(self) -> None:
        """Returns when nothing is left to do for whoever leads."""

        def quiet() -> bool:
            self.meanwhile()
            self.revive()  # the write at which it is killed may be its last one
            leads = self.rival if self.rival.figure("cptjob_leader") == 1 else self.operator
            # Without a job there is no pass; started anew, it has never made one.
            return leads.quiet or (leads.figure("cptjob_leader") == 1 and not self.job)

        self.world.wait(quiet, "whoever leads to be done")

    def wait_gone(self) -> None:
        """Returns when neither the job nor anything of it is left."""

        def gone() -> bool:
            self.finish_what_leaves()
            return not self.inventory.things()

        self.wait(gone, "everything to go")

    def finish_what_leaves(self) -> None:
        """Plays the kubelet of pods that were asked to go."""
        for pod in self.world.core.list_namespaced_pod(self.world.namespace).items:
            if pod.metadata.deletion_timestamp is not None:
                self._finish(pod)

    def clear(self) -> None:
        """Leaves the node to the next life. What remains goes with the namespace."""
        self.delete()
        for pod in self.world.core.list_namespaced_pod(self.world.namespace).items:
            self._finish(pod)

    def delete(self) -> None:
        """A person deletes the job, if it is still there."""
        with suppress(client.exceptions.NotFoundException):
            self.world.delete("job")

    def _finish(self, pod: Any) -> None:
        with suppress(client.exceptions.NotFoundException):
            self.world.kubelet.finish(self.world.namespace, pod.metadata.name)

    @property
    def job(self) -> dict[str, Any] | None:
        return self.world.find("job")

    @property
    def phase(self) -> str:
        return str(self.world.status("job").get("phase"))

    def pods(self, role: str, count: int) -> list[Any]:
        """The pods of that role that shall live on, when so many have a node."""

        def living() -> list[Any]:
            return [
                pod
                for pod in self.world.pods(role)
                if pod.metadata.deletion_timestamp is None
                and pod.spec.node_name
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


class CutShort(Exception):
    """Whoever disturbs a life wants no more of its stage."""


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
    life.wait_gone()


def is_deleted(life: Life) -> None:
    """As `kubectl delete` does it: at once, and its running pods leave after it."""
    is_made(life)
    _delete(life, "background")


def is_deleted_after_its_pods(life: Life) -> None:
    """As GitOps tools do it: the job is there until the last of its running pods has left."""
    is_made(life)
    _delete(life, "foreground")


def _delete(life: Life, cascade: str) -> None:
    """A person deletes it. Garbage collection does it all: the operator asks for nothing more, and
    makes nothing anew while the pods leave one after another.
    """
    life.wait_quiet()
    before = len(life.proxy.writes)
    name = ("cptjob/job", "--namespace", life.world.namespace)
    options = (f"--cascade={cascade}", "--wait=false", "--ignore-not-found")
    life.world.plane.kubectl("delete", *name, *options)
    life.wait_gone()
    life.wait_quiet()
    since = life.proxy.writes[before:]
    # Counts in the status are told with a delay, so one may be on its way.
    assert not [each for each in since if each.resource != "cptjobs/status"], "it still wrote"


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
        is_deleted,
        is_deleted_after_its_pods,
        is_shown_to_its_end,
    )
}


#: The picture when nothing is left.
NOTHING: Picture = {"objects": [], "pods": []}


def picture(life: Life) -> Picture:
    """Everything about the job that must not depend on whether its operator was disturbed."""
    job, world = life.job, life.world
    found: Picture = {
        "objects": _objects(life.inventory),
        "pods": sorted(
            (pod.metadata.name.split("-", 2)[2], pod.status.phase)
            for role in ("coordinator", "worker")
            for pod in world.pods(role)
        ),
    }
    if job is None:
        return found
    status = job.get("status", {})
    return found | {
        "phase": status.get("phase"),
        "attempt": status.get("attempt"),
        "restarts": (status.get("restarts"), status.get("restartsCountTowardsMax")),
        "incarnations": status.get("incarnations"),
        "excluded": [
            (each["name"], each["failures"], each["reason"])
            for each in status.get("excludedNodes", [])
        ],
        "conditions": sorted(
            (each["type"], each["status"], each["reason"]) for each in status.get("conditions", [])
        ),
        "resolved": status.get("resolved"),
    }


def _objects(inventory: Inventory) -> list[tuple[str, str, list[str]]]:
    """Kind, name without what differs from job to job, and kinds of the owners that are there."""
    things = inventory.things()
    kinds = {each.uid: each.kind for each in things}
    bases = {each.uid: base(each.name, each.uid) for each in things if each.kind == "CPTJob"}

    def shorten(name: str, owners: Iterable[str]) -> str:
        ours = [bases[uid] for uid in owners if uid in bases]
        if owners and not ours:
            return "generated"
        return name.removeprefix(ours[0]) if ours else name

    return sorted(
        (
            each.kind,
            shorten(each.name, each.owners),
            sorted(kinds.get(uid, "gone") for uid in each.owners),
        )
        for each in things
    )


class End(NamedTuple):
    """How a life ended. writes: all that have a number."""

    picture: Picture
    writes: list[str]


class Harm(Protocol):
    """Is told of a life before it begins, and may set its traps."""

    @property
    def happened(self) -> object: ...

    def __call__(self, life: Life) -> object: ...


class Live(Protocol):
    """`live(stage, harm)` goes through a stage.

    like: the picture that it shall come to. counts: which writes have a number.
    """

    def __call__(
        self,
        stage: str,
        harm: Callable[[Life], object] = ...,
        *,
        like: Picture | None = ...,
        counts: Callable[[Call], bool] = ...,
    ) -> End: ...


def strikes(live: Live, stage: str, plain: End, harm: Callable[[], Harm], what: str) -> bool:
    """Goes through a stage with that harm, again when it did not happen; False when it never did.

    However that is, the stage must end as without harm.
    """
    for _ in range(2):
        each = harm()
        end = live(stage, each, like=plain.picture)
        assert end.picture == plain.picture, f"{stage}: {what}"
        if each.happened:
            return True
    return False


def strikes_near(
    live: Live, stage: str, plain: End, number: int, harm: Callable[[int], Harm], what: str
) -> None:
    """The harm at that write; at one before it, where it is among the last and is not made."""
    while not strikes(live, stage, plain, partial(harm, number), f"{what} at write {number}"):
        number -= 1
        lowest = max(1, len(plain.writes) - SPARE_WRITES + 1)
        assert number >= lowest, f"write {number + 1} was never made"


def strikes_everywhere(
    live: Live, stage: str, plain: End, harm: Callable[[int], Harm], what: str
) -> None:
    """The harm at each write. Says which were never made.

    The operator writes a status for what it has seen so far: where two events come close together,
    one write tells of both. So another life may make a write or two less, in all; then only the
    last numbers are never reached.
    """
    assert len(plain.writes) >= 6
    numbers = range(1, len(plain.writes) + 1)
    never = [
        number
        for number in numbers
        if not strikes(live, stage, plain, partial(harm, number), f"{what} at write {number}")
    ]
    last = [*numbers][len(numbers) - len(never) :]
    assert never == last, f"{stage}, {what}: never made were {never} of {len(numbers)}"
    assert len(never) < SPARE_WRITES, f"{stage}, {what}: never made were {never}"
    if never:
        names = ", ".join(f"{number} ({plain.writes[number - 1]})" for number in never)
        warnings.warn(
            f"{stage}, {what}: of {len(numbers)} writes these were not made again, as another "
            f"write told of two events: {names}",
            stacklevel=2,
        )


def stand(life: Life, like: Picture | None = None) -> Picture:
    """The picture when it is as `like`, or else when nothing moves any more."""
    seen: Picture = {}
    since = begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_SECONDS:
        life.finish_what_leaves()
        life.wait_quiet()
        now = picture(life)
        if now != seen:
            seen, since = now, time.monotonic()
        if seen == like or (like is None and time.monotonic() - since > STEADY_SECONDS):
            break
        time.sleep(0.05)
    return seen


@contextmanager
def living(
    plane: ControlPlane, api: client.ApiClient, new_namespace: Callable[[], str], folder: Path
) -> Iterator[Live]:
    """Each life has a namespace, a proxy and an operator of its own; all are killed in the end."""
    running: list[RunningOperator] = []
    nodes = Nodes(plane, api)

    def live(
        stage: str,
        harm: Callable[[Life], object] = lambda life: None,
        *,
        like: Picture | None = None,
        counts: Callable[[Call], bool] = counts,
    ) -> End:
        world = World(plane, api, new_namespace())
        here = folder / world.namespace
        with FaultProxy(plane, here / "proxy", counts=counts) as proxy:
            operator = RunningOperator(
                plane, here, world.namespace, kubeconfig=proxy.kubeconfig()
            ).start()
            rival = RunningOperator(plane, here, world.namespace, identity="rival")
            running.extend((operator, rival))
            operator.wait_leading()
            life = Life(world, operator, proxy, rival, Inventory(api, world.namespace))
            harm(life)
            life.go(STAGES[stage])
            end = stand(life, like)
            if like is not None and not getattr(harm, "happened", True):
                stand(life)  # a status that is held back may be the write at which it strikes
                end = stand(life, like)
            writes = [f"{each.method} {each.resource}" for each in proxy.writes]
            operator.kill()
            rival.kill()
            life.clear()
        return End(end, writes)

    try:
        nodes.add(1, prefix="life")
        yield live
    finally:
        for each in running:
            each.kill()
        nodes.clear()
