"""What the operator tells Prometheus, against what became of a job, and against its status."""

import datetime
from collections.abc import Callable
from typing import Any

from running import RunningOperator
from world import World

from testplane.nodes import GPU, Nodes

Start = Callable[..., RunningOperator]

GPUS = 8
WHOLE = {"spec.trainer.resourcesPerNode": {"limits": {GPU: GPUS}}}
SOON: dict[str, Any] = {"timing": {"backoff": {"baseSeconds": 0.1, "capSeconds": 1}}}
WATCH_AGE = 'cptjob_watch_age_seconds{{kind="{}"}}'


def test_the_figures_of_a_job_that_fails_on_a_node_leaves_it_and_completes(
    world: World, start: Start, nodes: Nodes
) -> None:
    nodes.add(1, prefix="anywhere", pool=None)
    nodes.add(2)
    operator = start(settings=SOON).wait_leading()
    created = _time(world.create("job", 2, WHOLE)["metadata"]["creationTimestamp"])
    world.prepare("job")
    _run(world)
    running = _time(world.condition("job", "Running")["lastTransitionTime"])
    assert _moved(operator) == {}
    nodes.add(1, prefix="spare")
    world.wait(lambda: _seconds_between(running, _now()) > 3, "some GPU time to lose")
    bad = world.living("job")[0]
    world.kubelet.exit(world.namespace, bad.metadata.name, 1, "boom")
    world.wait(lambda: world.status("job")["restarts"] == 1, "the failure to be seen")
    _run(world)
    failed = _time(world.status("job")["lastFailure"]["time"])
    assert [each["name"] for each in world.status("job")["excludedNodes"]] == [bad.spec.node_name]
    assert {pod.spec.node_name for pod in world.living("job")} == {
        *("node-0", "node-1", "spare-0"),
    } - {bad.spec.node_name}
    assert _moved(operator) == {
        'cptjob_restarts_total{cause="Exited"}': 1,
        "cptjob_excluded_nodes": 1,
    }

    world.complete("job")
    world.wait(lambda: world.status("job")["phase"] == "Complete", "it to complete")
    world.wait(lambda: world.finish_what_leaves("job"), "its pods to go")
    operator.wait_quiet()
    status = world.status("job")
    held = status["nodeSeconds"]
    least = 2 * _seconds_between(running, failed)
    assert least <= held <= 2 * _seconds_between(created, _time(status["accountedTime"]))
    assert status["gpuSeconds"] == GPUS * held
    assert GPUS * least <= status["lostGpuSeconds"] <= GPUS * held
    world.wait(
        lambda: operator.figure("cptjob_gpu_seconds_total") == world.status("job")["gpuSeconds"],
        "all of it to be counted",
    )
    assert operator.figure("cptjob_lost_gpu_seconds_total") == status["lostGpuSeconds"]
    assert operator.figure("cptjob_excluded_nodes") == 0, "a job that has ended avoids nothing"
    _watch_ages(world, operator)


def _watch_ages(world: World, operator: RunningOperator) -> None:
    """The age of a watch grows while nothing comes, and is that of the last event."""
    known = {WATCH_AGE.format(kind) for kind in ("CPTJob", "Pod", "Node")}
    assert known == {name for name in operator.figures() if "watch_age" in name}
    age = WATCH_AGE.format("CPTJob")
    world.wait(lambda: (operator.figure(age) or 0) > 3, "a silence")
    world.patch("job", {"metadata": {"labels": {"news": "any"}}})
    world.wait(lambda: (operator.figure(age) or 9) < 3, "it to hear of that")


def _moved(operator: RunningOperator) -> dict[str, float]:
    """Restarts by cause and nodes that are avoided, where there are any."""
    names = ("cptjob_restarts_total", "cptjob_excluded_nodes")
    figures = operator.figures().items()
    return {name: value for name, value in figures if name.startswith(names) and value}


def _run(world: World) -> None:
    """Both workers run, on nodes that the scheduler chose."""
    world.wait(
        lambda: [bool(pod.spec.node_name) for pod in world.living("job")] == [True] * 2, "nodes"
    )
    world.run("job", 2)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _seconds_between(first: datetime.datetime, last: datetime.datetime) -> float:
    return (last - first).total_seconds()
