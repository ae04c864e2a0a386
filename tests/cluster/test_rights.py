"""The operator with the rights that the chart gives it, and with all of them but one.

A life in parts uses every right. Without one of them, the part that needs it does not get done, and
it does once the right is given back: so the rights are enough, and none is too many.
"""

import datetime
import json
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from lives import counts
from rights import FINALIZERS, Audit, Grant, Right
from running import RunningOperator
from world import SHOWN, World

from helmchart import Helm
from testplane import binaries
from testplane.plane import ControlPlane
from testplane.proxy import FaultProxy


@dataclass
class Place:
    """A namespace with its operator, and the rights that it has."""

    world: World
    grant: Grant
    operator: RunningOperator
    proxy: FaultProxy

    def wait(self, done: Callable[[], object], what: str) -> None:
        """As a kubelet does, it starts an operator anew that has ended."""

        def seen() -> object:
            if self.operator.died:
                self.operator.start()
            return done()

        self.world.wait(seen, what)

    def runs(self, name: str) -> None:
        self.world.create(name)
        self.world.prepare(name)
        self.world.run(name, 1)

    def has_all(self, name: str) -> bool:
        """The job has its three objects and its coordinator."""
        uid = self.world.job(name)["metadata"]["uid"]
        own = [each for each in self.world.children() if each.metadata.name.endswith(uid[:5])]
        return len(own) == 3 and len(self.world.pods("coordinator", name)) == 1


# --- the parts of a life --------------------------------------------------------------------------

#: First everything before the part, with all rights; then its beginning, which yields what tells
#: that the part is done; then what is to be undone.
Part = Callable[[Place], Generator[Callable[[], object] | None]]


def starts(place: Place) -> Generator[Callable[[], object] | None]:
    yield None
    place.operator.start()
    leases = client.CoordinationV1Api(place.world.core.api_client)

    def leads_for_a_while() -> bool:
        if place.operator.get("readyz")[0] != 200 or place.operator.figure("cptjob_leader") != 1:
            return False
        lease = leases.read_namespaced_lease("cptjob-operator", place.world.namespace).spec
        return bool(lease.renew_time > lease.acquire_time)

    yield leads_for_a_while


def makes_a_job(place: Place) -> Generator[Callable[[], object] | None]:
    yield None
    place.world.create("made")
    yield lambda: place.has_all("made")


def tells_events(place: Place) -> Generator[Callable[[], object] | None]:
    yield None
    jobs = [place.world.create("told-0")["metadata"]["name"]]

    def told() -> bool:
        if any(place.world.told(name, "Accepted") for name in jobs):
            return True
        if place.world.status(jobs[-1]).get("resolved"):
            # An Event that is lost is lost; but a new job has a new one.
            jobs.append(place.world.create(f"told-{len(jobs)}")["metadata"]["name"])
        return False

    yield told


def makes_several_workers(place: Place) -> Generator[Callable[[], object] | None]:
    yield None
    place.world.create("several", 2)

    def are_there() -> bool:
        for pod in place.world.pods("coordinator", "several"):
            place.world.kubelet.run(place.world.namespace, pod.metadata.name)
        return len(place.world.living("several")) == 2

    yield are_there


def finds_a_name_taken(kind: str, version: str, content: dict[str, Any]) -> Part:
    def part(place: Place) -> Generator[Callable[[], object] | None]:
        name = f"taken-{kind.lower()}"
        place.operator.freeze()
        try:
            job = place.world.create(name)["metadata"]
            base = f"{name}-{job['uid'][:5]}" + ("-0-c0-0" if kind == "Pod" else "")
            theirs = {"apiVersion": version, "kind": kind, "metadata": {"name": base}} | content
            place.world.plane.kubectl(
                *("create", "-n", place.world.namespace, "-f", "-"), stdin=json.dumps(theirs)
            )
            yield None
        finally:
            place.operator.thaw()
        yield lambda: "does not belong" in place.world.condition(name, "Ready").get("message", "")

    part.__name__ += f" of a {kind}"
    return part


def finds_its_object_changed(kind: str, change: dict[str, Any]) -> Part:
    def part(place: Place) -> Generator[Callable[[], object] | None]:
        name = f"changed-{kind.lower()}"
        place.world.create(name, changes=SHOWN)
        place.wait(lambda: place.has_all(name), "what belongs to the job")
        base = f"{name}-{place.world.job(name)['metadata']['uid'][:5]}"
        if kind == "Deployment":
            base = f"{name}-tensorboard"
            place.world.prepare(name)
            place.wait(lambda: len(place.world.shown(name)) == 3, "what shows its curves")
        place.operator.stop()
        about = {"annotations": {"training.cptjob.io/hash": "of another version"}}
        where = (kind, base, "-n", place.world.namespace)
        text = json.dumps(change | {"metadata": about})
        place.world.plane.kubectl("patch", *where, "--type=merge", f"-p={text}")
        yield None
        place.operator.start()
        yield (
            lambda: (
                "of another version" not in place.world.plane.kubectl("get", *where, "-o", "json")
            )
        )

    part.__name__ += f" changes a {kind} back"
    return part


def is_shown(place: Place) -> Generator[Callable[[], object] | None]:
    place.world.create("shown", changes=SHOWN)
    place.wait(lambda: place.has_all("shown"), "what belongs to the job")
    yield None
    place.world.prepare("shown")
    yield lambda: len(place.world.shown("shown")) == 3


def finds_the_name_of_its_tensorboard_taken(
    place: Place,
) -> Generator[Callable[[], object] | None]:
    labels = {"app": "theirs"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    theirs = {
        "metadata": {"name": "other-tensorboard"},
        "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": pod},
    }
    world = place.world
    client.AppsV1Api(world.core.api_client).create_namespaced_deployment(world.namespace, theirs)
    world.create("other", changes=SHOWN)
    place.wait(lambda: place.has_all("other"), "what belongs to the job")
    yield None
    world.prepare("other")
    yield lambda: world.told("other", "Refused", "Deployment other-tensorboard", "not belong")


def is_overtaken(place: Place) -> Generator[Callable[[], object] | None]:
    """Its write of a status finds a newer job, of which no watch has told."""
    place.world.create("overtaken")
    place.wait(lambda: place.has_all("overtaken"), "what belongs to the job")
    place.operator.wait_quiet()
    place.proxy.reset()
    held = place.proxy.hold(1)
    yield None
    with ExitStack() as undo:
        place.world.patch("overtaken", {"spec": {"activeDeadlineSeconds": 1000}})
        place.wait(lambda: held.happened, "the write of the status")
        undo.enter_context(place.proxy.no_watches())
        place.world.patch("overtaken", {"spec": {"activeDeadlineSeconds": 2000}})
        held.release()

        def has_seen_it() -> bool:
            job = place.world.job("overtaken")
            return bool(job["status"]["observedGeneration"] == job["metadata"]["generation"])

        yield has_seen_it


def suspends(place: Place) -> Generator[Callable[[], object] | None]:
    place.runs("held")
    yield None
    place.world.patch("held", {"spec": {"suspend": True}})

    def holds_still() -> bool:
        gone = place.world.finish_what_leaves("held")
        return gone and place.world.status("held")["phase"] == "Suspended"

    yield holds_still
    place.world.suspend("held", on=False)
    place.world.prepare("held")
    place.world.run("held", 1)


def expires(place: Place) -> Generator[Callable[[], object] | None]:
    place.runs("old")
    place.world.complete("old")
    place.wait(lambda: place.world.status("old")["phase"] == "Complete", "it to be complete")
    yield None
    place.world.patch("old", {"spec": {"ttlSecondsAfterFinished": 1}})
    yield lambda: place.world.find("old") is None


def replaces_a_pod_when_the_quota_lets_it(
    place: Place,
) -> Generator[Callable[[], object] | None]:
    """Needs no right that the others do not."""
    world = place.world
    place.runs("failing")
    yield None
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/pods": "0"}}}
    world.core.create_namespaced_resource_quota(world.namespace, quota)

    def is_known() -> object:
        return world.core.read_namespaced_resource_quota("none", world.namespace).status.used

    world.wait(is_known, "the quota")
    (worker,) = world.living("failing")
    world.kubelet.exit(world.namespace, worker.metadata.name, 1, "boom")
    place.wait(lambda: world.says("failing", "WaitingForQuota", "exceeded quota"), "the quota told")
    world.core.delete_namespaced_resource_quota("none", world.namespace)
    yield lambda: len(world.living("failing")) == 1


TAKEN: dict[str, Part] = {
    "pods": finds_a_name_taken(
        "Pod", "v1", {"spec": {"containers": [{"name": "a", "image": "test.invalid/a"}]}}
    ),
    "configmaps": finds_a_name_taken("ConfigMap", "v1", {}),
    "services": finds_a_name_taken(
        "Service", "v1", {"spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
    ),
    "networkpolicies": finds_a_name_taken(
        "NetworkPolicy", "networking.k8s.io/v1", {"spec": {"podSelector": {}}}
    ),
}
CHANGED: dict[str, Part] = {
    "services": finds_its_object_changed("Service", {"spec": {"publishNotReadyAddresses": False}}),
    "networkpolicies": finds_its_object_changed("NetworkPolicy", {"spec": {"ingress": []}}),
    "deployments": finds_its_object_changed("Deployment", {"spec": {"replicas": 0}}),
}
NEEDED_BY: dict[Right, Part] = {
    **{Right(name, "list"): starts for name in ("cptjobs", "deployments", "pods", "nodes", *TAKEN)},
    **{Right(name, "watch"): starts for name in ("cptjobs", "pods", "nodes")},
    **{Right("leases", verb): starts for verb in ("get", "create", "update")},
    **{Right(name, "create"): makes_a_job for name in TAKEN},
    Right("deployments", "create"): is_shown,
    Right("deployments", "get"): finds_the_name_of_its_tensorboard_taken,
    Right("cptjobs/status", "patch"): makes_a_job,
    FINALIZERS: makes_a_job,
    Right("events", "create"): tells_events,
    Right("persistentvolumeclaims", "get"): makes_several_workers,
    Right("pods", "delete"): suspends,
    Right("cptjobs", "delete"): expires,
    Right("cptjobs", "get"): is_overtaken,
    **{Right(name, "get"): part for name, part in TAKEN.items()},
    **{Right(name, "patch"): part for name, part in CHANGED.items()},
}


# --- with all rights, and with all but one --------------------------------------------------------

MakePlace = Callable[..., Place]


@pytest.fixture(scope="module", name="helm")
def make_helm(tmp_path_factory: pytest.TempPathFactory, report: binaries.Report) -> Helm:
    return Helm(binaries.find(["helm"], report)["helm"], tmp_path_factory.mktemp("helm"))


@pytest.fixture(name="make_place")
def make_places(
    plane: ControlPlane, helm: Helm, world: World, tmp_path: Path
) -> Iterator[MakePlace]:
    with ExitStack() as undo:

        def make(*, everywhere: bool = False, and_watched: Sequence[str] = ()) -> Place:
            grant = Grant(plane, helm, world.namespace, everywhere=everywhere)
            undo.callback(grant.take_away)
            proxy = undo.enter_context(FaultProxy(plane, tmp_path / "proxy", counts=counts))
            operator = RunningOperator(
                plane,
                tmp_path,
                world.namespace,
                kubeconfig=proxy.kubeconfig(grant.token()),
                settings={
                    "watchedNamespaces": [] if everywhere else [*and_watched, world.namespace]
                },
            )
            undo.callback(operator.kill)
            return Place(world, grant, operator, proxy)

        yield make


@pytest.mark.parametrize("everywhere", [False, True], ids=["one namespace", "all namespaces"])
def test_the_rights_are_enough_for_a_whole_life_and_all_are_used(
    make_place: MakePlace, audit: Audit, everywhere: bool
) -> None:
    place = make_place(everywhere=everywhere)
    parts = list(dict.fromkeys(NEEDED_BY.values()))
    if not everywhere:
        parts.append(replaces_a_pod_when_the_quota_lets_it)
    for part in parts:
        steps = part(place)
        next(steps)
        done = next(steps)
        assert done is not None
        place.wait(done, f"a part of the life: {part.__name__}")
        next(steps, None)
    assert audit.refused(place.world.namespace) == set()
    assert audit.used(place.world.namespace) | {FINALIZERS} == place.grant.rights


def test_a_namespace_that_is_gone_with_its_rights_holds_up_no_other(make_place: MakePlace) -> None:
    place = make_place(and_watched=["gone"])
    place.operator.start().wait_leading()
    steps = makes_a_job(place)
    next(steps)
    done = next(steps)
    assert done is not None
    place.wait(done, "a job of the other namespace")


def lives_without(right: Right, place: Place, audit: Audit) -> None:
    """Raises unless the part that needs the right waits for it."""
    part = NEEDED_BY[right]
    if part is not starts:
        place.operator.start().wait_leading()
    steps = part(place)
    next(steps)
    place.grant.give(without=right)
    done = next(steps)
    assert done is not None
    place.wait(lambda: audit.refused(place.world.namespace), "the API server to refuse")
    assert audit.refused(place.world.namespace) == {right}
    assert not done()
    place.grant.give()
    place.wait(done, "the part to be done with the right")
    next(steps, None)


def test_each_right_is_needed_by_a_part_of_a_life(make_place: MakePlace, audit: Audit) -> None:
    place = make_place()
    assert NEEDED_BY.keys() == place.grant.rights


# One of each fifth, others every day.
DICE = random.Random(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
SAMPLE = [DICE.choice(sorted(NEEDED_BY)[start::5]) for start in range(5)]


@pytest.mark.parametrize("number", range(len(SAMPLE)))
def test_without_some_right_a_part_of_a_life_does_not_get_done(
    make_place: MakePlace, audit: Audit, number: int
) -> None:
    lives_without(SAMPLE[number], make_place(), audit)


@pytest.mark.soak
@pytest.mark.parametrize("right", sorted(NEEDED_BY), ids=" ".join)
def test_without_any_right_a_part_of_a_life_does_not_get_done(
    make_place: MakePlace, audit: Audit, right: Right
) -> None:
    lives_without(right, make_place(), audit)
