"""Fake nodes with GPUs, and what an administrator or an accident does to them."""

from collections.abc import Callable, Mapping
from typing import Any

from kubernetes import client

from testplane.plane import KUBELET_LABEL, ControlPlane

POOL = "training.cptjob.io/pool"
PRODUCT = "nvidia.com/gpu.product"
INSTANCE_TYPE = "node.kubernetes.io/instance-type"
GPU = "nvidia.com/gpu"


class Nodes:
    """The nodes of a control plane. KWOK is their kubelet."""

    def __init__(self, plane: ControlPlane, api: client.ApiClient) -> None:
        self._plane = plane
        self._core = client.CoreV1Api(api)
        self._added: list[str] = []

    def add(
        self,
        count: int,
        *,
        pool: str | None = "pool-a",
        gpus: int = 8,
        product: str | None = "NVIDIA-H100-80GB-HBM3",
        instance_type: str | None = "gpu.8x",
        prefix: str = "node",
        labels: Mapping[str, str] | None = None,
        capacity: Mapping[str, str] | None = None,
        taints: tuple[Mapping[str, str], ...] = (),
    ) -> list[str]:
        """Names of that many new nodes, `<prefix>-0` and so on; returns when all are Ready."""
        known = {POOL: pool, PRODUCT: product, INSTANCE_TYPE: instance_type, KUBELET_LABEL: "kwok"}
        wanted = {key: value for key, value in known.items() if value} | dict(labels or {})
        resources = {"cpu": "96", "memory": "1Ti", "ephemeral-storage": "1Ti", "pods": "110"}
        resources |= ({GPU: str(gpus)} if gpus else {}) | dict(capacity or {})
        names = [f"{prefix}-{number}" for number in range(count)]
        for name in names:
            own = wanted | {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
            self._core.create_node(_node(name, own, resources, taints))
            self._added.append(name)
        self.wait(names, lambda node: is_ready(node) and not _is_new(node), "to be Ready")
        return names

    def get(self, name: str) -> Any:
        return self._core.read_node(name)

    def patch(self, name: str, change: Mapping[str, Any]) -> None:
        """A merge patch: {"metadata": {"labels": {...: None}}} takes a label away."""
        self._core.patch_node(name, change)

    def label(self, name: str, **labels: str | None) -> None:
        """Sets labels, or takes those away that are None (by keyword; else use `patch`)."""
        self.patch(name, {"metadata": {"labels": labels}})

    def cordon(self, name: str, on: bool = True) -> None:
        self.patch(name, {"spec": {"unschedulable": on}})

    def remove(self, *names: str) -> None:
        """Deletes them, as when a cloud takes machines away; pods that were on them are left."""
        for name in names:
            self._core.delete_node(name)

    def clear(self) -> None:
        """Deletes those nodes of `add` that are still there."""
        there = {node.metadata.name for node in self._core.list_node().items}
        self.remove(*[name for name in self._added if name in there])
        self._added.clear()

    def lose(self, name: str) -> None:
        """Its kubelet falls silent and its pods stay as they are.

        After the plane's grace period the node is NotReady, as with a machine that died. Deleted
        pods on it stay `Terminating`.
        """
        self.patch(name, {"metadata": {"labels": {KUBELET_LABEL: None}}})

    def find_again(self, name: str) -> None:
        """The kubelet of a lost node is back."""
        self.patch(name, {"metadata": {"labels": {KUBELET_LABEL: "kwok"}}})

    def wait(self, names: list[str], happened: Callable[[Any], bool], what: str) -> None:
        """Returns when `happened(node)` is true for each of these nodes."""

        def all_happened() -> bool:
            nodes = {node.metadata.name: node for node in self._core.list_node().items}
            return all(name in nodes and happened(nodes[name]) for name in names)

        self._plane.wait(all_happened, f"nodes {names} {what}")


def is_ready(node: Any) -> bool:
    """Whether a node's condition Ready is True."""
    conditions = node.status.conditions or []
    return any(each.type == "Ready" and each.status == "True" for each in conditions)


def _is_new(node: Any) -> bool:
    """Whether the node controller has yet to take the taint away that each new node gets."""
    return any(each.key == "node.kubernetes.io/not-ready" for each in node.spec.taints or [])


def _node(
    name: str,
    labels: Mapping[str, str],
    resources: Mapping[str, str],
    taints: tuple[Mapping[str, str], ...],
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {"taints": [dict(each) for each in taints]} if taints else {},
        "status": {"capacity": dict(resources), "allocatable": dict(resources)},
    }
