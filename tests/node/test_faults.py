"""Whatever is lost on the way, the job comes to its end with all its steps, from the last checkpoint."""

import time
from collections.abc import Callable

import pytest
from team import LONG, Team

from helmchart import NAME, NAMESPACE
from testnodes.cluster import Cluster

pytestmark = pytest.mark.soak

Fault = Callable[[Team], None]


def _kill_a_process(team: Team) -> None:
    """The training process of one node; the forkserver's newest child."""
    for node in team.cluster.nodes.values():
        processes = node.processes("multiprocessing.forkserver")
        if len(processes) > 1:
            node.machine.run("kill", "-KILL", processes[-1])
            return
    raise AssertionError("no node has a training process")


def _delete(index: int) -> Fault:
    def fault(team: Team) -> None:
        name = team.living("job")[index]["metadata"]["name"]
        team.kubectl("delete", "pod", name, "--wait=false")

    return fault


def _delete_coordinator(team: Team) -> None:
    (pod,) = team.pods("job", "coordinator")
    team.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")


def _drain(team: Team) -> None:
    node = team.living("job")[0]["spec"]["nodeName"]
    team.cluster.plane.kubectl(
        "drain",
        node,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--force",
        "--pod-selector=training.cptjob.io/job-name=job",
    )
    team.cluster.plane.kubectl("uncordon", node)


FAULTS: dict[str, Fault] = {
    "a process is killed": _kill_a_process,
    "worker 0 is deleted": _delete(0),
    "worker 1 is deleted": _delete(1),
    "the coordinator is deleted": _delete_coordinator,
    "a node is drained": _drain,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_training_goes_on_from_the_last_checkpoint(team: Team, fault: Fault) -> None:
    team.apply("job", LONG)
    team.wait_for("job", "Running")
    saved = team.wait_for_checkpoint("job", 40)
    fault(team)
    team.wait_for("job", "Complete")
    team.check_that_it_went_on("job", saved)


def test_a_node_is_lost_and_comes_back(team: Team, cluster: Cluster) -> None:
    team.apply("job", LONG)
    team.wait_for("job", "Running")
    saved = team.wait_for_checkpoint("job", 40)
    (coordinator,) = team.pods("job", "coordinator")
    keeps = coordinator["spec"]["nodeName"]
    (lost,) = set(cluster.nodes) - {keeps}
    cluster.nodes[lost].lose()
    team.wait(lambda: lost not in cluster.ready(), f"{lost} to be NotReady")
    team.wait(lambda: team.status("job")["phase"] != "Running", "the job to notice")
    cluster.nodes[lost].start()
    team.wait_for("job", "Complete")
    team.check_that_it_went_on("job", saved)


def test_training_does_not_notice_that_the_operator_is_gone(team: Team, cluster: Cluster) -> None:
    team.apply("job", LONG)
    team.wait_for("job", "Running")
    scale = ["-n", NAMESPACE, "scale", f"deployment/{NAME}"]
    cluster.plane.kubectl(*scale, "--replicas=0")
    try:
        before = len(team.steps("job"))
        team.wait(lambda: len(team.steps("job")) > before + 60, "steps without an operator")
        workers = [pod["metadata"]["uid"] for pod in team.living("job")]
        time.sleep(20)
    finally:
        cluster.plane.kubectl(*scale, "--replicas=2")
    team.wait_for("job", "Complete")
    assert team.status("job")["restarts"] == 0
    assert {pod["metadata"]["uid"] for pod in team.pods("job")} >= set(workers)
