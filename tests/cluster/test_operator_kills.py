"""An operator that dies at any of its writes leaves nothing double, nothing behind, nothing undone."""

from collections import Counter
from collections.abc import Callable

import pytest
from running import RunningOperator
from world import OURS, World

from testplane.proxy import FaultProxy

#: Writes from a job's creation to its workers: status, three children, a pod, an event, status, pods.
WRITES = 10


def _until_started(
    world: World, proxy: FaultProxy, operator: RunningOperator, number: int, kill: str
) -> None:
    """Creates and prepares a job with 3 workers; the operator dies at its write `number`."""
    arm = proxy.kill_before if kill == "before" else proxy.kill_after
    proxy.reset()
    killed = arm(number, operator.kill)
    uid = world.create("job", workers=3)["metadata"]["uid"]
    world.wait(lambda: operator.ended or world.pods("coordinator"), "the coordinator or the death")
    _again(operator)
    world.prepare("job")
    world.wait(lambda: operator.ended or len(world.pods()) == 3, "the workers or the death")
    _again(operator)
    world.wait(lambda: operator.ended or len(world.pods()) == 3, "the workers")
    _again(operator)
    assert killed.wait(), "the operator died"
    world.wait(lambda: len(world.pods()) == 3, "the workers")
    _again(operator)
    operator.wait_quiet()
    names = Counter(pod.metadata.name for pod in [*world.pods(), *world.pods("coordinator")])
    assert len(names) == 4
    assert {name.rsplit("-", 1)[-1] for name in names} == {"0"}, "no pod was made twice"
    for listed in (
        world.core.list_namespaced_config_map(world.namespace, label_selector=OURS),
        world.core.list_namespaced_service(world.namespace, label_selector=OURS),
    ):
        assert [each.metadata.owner_references[0].uid for each in listed.items] == [uid]
    # What is only told may be written a moment later than what is done.
    world.wait(lambda: world.status("job")["phase"] == "Starting", "the status")
    status = world.status("job")
    assert (status["attempt"], status["restarts"]) == (0, 0)


def _again(operator: RunningOperator) -> None:
    if operator.ended:
        operator.start()


@pytest.mark.parametrize("kill", ["before", "after"])
@pytest.mark.parametrize("number", [1, 5])
def test_a_job_starts_all_the_same(
    world: World,
    proxy: FaultProxy,
    start: Callable[..., RunningOperator],
    number: int,
    kill: str,
) -> None:
    operator = start(kubeconfig=proxy.kubeconfig()).wait_leading()
    _until_started(world, proxy, operator, number, kill)


@pytest.mark.soak
@pytest.mark.parametrize("kill", ["before", "after"])
@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_a_job_starts_all_the_same_whichever_write_it_is(
    world: World,
    proxy: FaultProxy,
    start: Callable[..., RunningOperator],
    number: int,
    kill: str,
) -> None:
    operator = start(kubeconfig=proxy.kubeconfig()).wait_leading()
    _until_started(world, proxy, operator, number, kill)
