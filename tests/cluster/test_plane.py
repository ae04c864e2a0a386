"""The control plane that every other test here stands on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from testplane.binaries import ASSETS, GROUPS
from testplane.daemon import Daemon, DaemonError
from testplane.kubelet import EXIT_CODE, MESSAGE, Kubelet
from testplane.nodes import GPU, INSTANCE_TYPE, POOL, PRODUCT, Nodes, is_ready
from testplane.plane import ControlPlane, KubectlError
from testplane.ports import free_ports

HERE = Path(__file__).parent


def pod(name: str, *, gpus: int = 0, **more: Any) -> dict[str, Any]:
    limits = {"limits": {GPU: str(gpus)}} if gpus else {}
    return {
        "metadata": {"name": name, **more.pop("metadata", {})},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "main", "image": "test.invalid/main", "resources": limits}],
            **more,
        },
    }


def test_the_programs_are_of_the_version_that_is_pinned_or_given(plane: ControlPlane) -> None:
    told = json.loads(plane.kubectl("version", "-o", "json"))
    versions = {told[side]["gitVersion"] for side in ("serverVersion", "clientVersion")}
    if ASSETS in os.environ:
        assert int(told["serverVersion"]["minor"]) >= 32
    else:
        assert versions == {GROUPS["kubernetes"].version}


def test_a_node_has_gpus_and_the_labels_of_its_pool(nodes: Nodes) -> None:
    names = nodes.add(2, pool="big", gpus=4, product="NVIDIA-A100", instance_type="a100.4x")
    assert names == ["node-0", "node-1"]
    node = nodes.get("node-1")
    assert is_ready(node)
    assert node.status.allocatable[GPU] == "4"
    labels = {key: node.metadata.labels[key] for key in (POOL, PRODUCT, INSTANCE_TYPE)}
    assert labels == {POOL: "big", PRODUCT: "NVIDIA-A100", INSTANCE_TYPE: "a100.4x"}


def test_a_pod_gets_a_node_and_is_ready_by_itself(
    plane: ControlPlane, core: client.CoreV1Api, namespace: str, nodes: Nodes
) -> None:
    nodes.add(1)
    core.create_namespaced_pod(namespace, pod("one", gpus=1))
    plane.kubectl("wait", "--for=condition=Ready", "pod/one", "-n", namespace, "--timeout=60s")
    assert core.read_namespaced_pod("one", namespace).status.pod_ip


def test_the_scheduler_says_why_a_pod_has_no_node(
    plane: ControlPlane, core: client.CoreV1Api, namespace: str, nodes: Nodes
) -> None:
    nodes.add(1, gpus=8)
    core.create_namespaced_pod(namespace, pod("greedy", gpus=9))
    wanted = "--for=condition=PodScheduled=False"
    plane.kubectl("wait", wanted, "pod/greedy", "-n", namespace, "--timeout=60s")
    (condition,) = core.read_namespaced_pod("greedy", namespace).status.conditions
    assert condition.reason == "Unschedulable"
    assert f"Insufficient {GPU}" in condition.message


def test_an_annotation_ends_a_pod_with_its_exit_code_and_message(
    plane: ControlPlane, core: client.CoreV1Api, namespace: str, nodes: Nodes
) -> None:
    nodes.add(1)
    core.create_namespaced_pod(namespace, pod("one"))
    plane.kubectl("wait", "--for=condition=Ready", "pod/one", "-n", namespace, "--timeout=60s")
    said = '{"error": "it\'s: bad"}\nsecond line'
    annotations = {EXIT_CODE: "65", MESSAGE: said}
    core.patch_namespaced_pod("one", namespace, {"metadata": {"annotations": annotations}})
    wanted = "--for=jsonpath={.status.phase}=Failed"
    plane.kubectl("wait", wanted, "pod/one", "-n", namespace, "--timeout=60s")
    (container,) = core.read_namespaced_pod("one", namespace).status.container_statuses
    assert container.state.terminated.exit_code == 65
    assert container.state.terminated.message == said


@pytest.mark.parametrize("how", ["namespace", "annotation"])
def test_a_pod_can_be_left_to_the_test(
    how: str,
    plane: ControlPlane,
    core: client.CoreV1Api,
    namespace: str,
    manual_namespace: str,
    nodes: Nodes,
    kubelet: Kubelet,
) -> None:
    nodes.add(1)
    where = manual_namespace if how == "namespace" else namespace
    annotations = {"testplane/kubelet": "manual"} if how == "annotation" else {}
    core.create_namespaced_pod(where, pod("one", metadata={"annotations": annotations}))
    # One that KWOK runs, made later: when it runs, KWOK has seen the first and left it alone.
    core.create_namespaced_pod(namespace, pod("other"))
    plane.kubectl("wait", "--for=condition=Ready", "pod/other", "-n", namespace, "--timeout=60s")

    def status() -> Any:
        return core.read_namespaced_pod("one", where).status

    assert status().phase == "Pending"
    kubelet.wait_for(where, "one", "ImagePullBackOff", "no such image")
    assert status().container_statuses[0].state.waiting.reason == "ImagePullBackOff"
    kubelet.run(where, "one", ready=False)
    assert status().phase == "Running"
    assert {each.type: each.status for each in status().conditions}["Ready"] == "False"
    kubelet.run(where, "one")
    assert {each.type: each.status for each in status().conditions}["Ready"] == "True"
    kubelet.exit(where, "one", 137, "out of memory", reason="OOMKilled")
    assert status().phase == "Failed"
    assert status().container_statuses[0].state.terminated.reason == "OOMKilled"


def test_a_deleted_pod_that_is_left_to_the_test_stays_until_it_is_finished(
    core: client.CoreV1Api, manual_namespace: str, nodes: Nodes, kubelet: Kubelet
) -> None:
    (node,) = nodes.add(1)
    core.create_namespaced_pod(manual_namespace, pod("one", nodeName=node))
    core.delete_namespaced_pod("one", manual_namespace)
    left = core.read_namespaced_pod("one", manual_namespace)
    assert left.metadata.deletion_timestamp is not None
    kubelet.finish(manual_namespace, "one")
    assert core.list_namespaced_pod(manual_namespace).items == []


def test_a_lost_node_becomes_not_ready_and_its_pods_cannot_end(
    plane: ControlPlane, core: client.CoreV1Api, namespace: str, nodes: Nodes
) -> None:
    lost, _ = nodes.add(2)
    core.create_namespaced_pod(namespace, pod("one", nodeName=lost))
    plane.kubectl("wait", "--for=condition=Ready", "pod/one", "-n", namespace, "--timeout=60s")
    nodes.lose(lost)
    nodes.wait([lost], lambda node: not is_ready(node), "not to be Ready")
    core.delete_namespaced_pod("one", namespace)
    assert core.read_namespaced_pod("one", namespace).metadata.deletion_timestamp is not None
    nodes.find_again(lost)
    plane.kubectl("wait", "--for=delete", "pod/one", "-n", namespace, "--timeout=60s")


def test_the_api_server_can_go_and_come_back(plane: ControlPlane, namespace: str) -> None:
    with plane.apiserver_down(), pytest.raises(KubectlError, match="refused"):
        plane.kubectl("get", "namespace", namespace)
    plane.kubectl("get", "namespace", namespace)


def test_a_service_account_has_no_rights_until_it_is_given_some(
    plane: ControlPlane, namespace: str
) -> None:
    path = plane.write_kubeconfig(plane.folder / "nobody", plane.token_of(namespace, "default"))
    done = plane.try_kubectl("--kubeconfig", str(path), "get", "pods", "-n", namespace)
    assert f"system:serviceaccount:{namespace}:default" in done.stderr
    assert "forbidden" in done.stderr


def test_the_memory_of_each_program_is_told(plane: ControlPlane) -> None:
    assert set(plane.memory()) == set(plane.daemons)
    assert all(size > 1_000_000 for size in plane.memory().values())


def test_free_ports_are_not_those_of_outgoing_connections() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert max(ports) < first


# --- daemons --------------------------------------------------------------------------------------


def test_a_program_that_ends_is_told_with_its_last_lines(tmp_path: Path) -> None:
    daemon = Daemon("greeter", ["sh", "-c", "echo hello; exit 3"], tmp_path / "log")
    daemon.start()
    while daemon.running:
        pass
    with pytest.raises(DaemonError, match=r"greeter ended \(3\); .*\nhello"):
        daemon.check()


def test_a_program_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal\n"
        "from testplane.daemon import Daemon\n"
        f"daemon = Daemon('sleeper', ['sleep', '600'], pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "daemon.start()\n"
        "print(daemon.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    while _runs(pid):
        pass


def _runs(pid: int) -> bool:
    """Whether it is there and more than an exit code that nobody has asked for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"
