"""A control plane with nodes, namespaces and an operator, for the bench."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kubernetes import client
from running import RunningOperator

from testplane.nodes import Nodes
from testplane.plane import ControlPlane

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "crds" / "training.cptjob.io_cptjobs.yaml"

#: A namespace for each side. Still: pods do only what the bench makes them do. Live: they run as soon
#: as they have a node, but for coordinators, which become ready when the bench says so.
STILL = ("manual-cptjobs", "manual-plain")
LIVE = ("live-cptjobs", "live-plain")
MANUAL = (
    '(.metadata.namespace | startswith("manual-")) or (.metadata.namespace == "live-cptjobs" and '
    '.metadata.labels["training.cptjob.io/role"] == "coordinator")'
)
#: Here the pods run by themselves as soon as they have a node.
FLEET = "fleet"
NODES, PODS_PER_NODE = 16, 1000
#: No reading of progress (the pods' addresses answer nothing), and no full list while one measures.
SETTINGS = {
    "watchedNamespaces": [],
    "leader": {"leaseSeconds": 15, "renewSeconds": 5.0},
    "timing": {"progressSeconds": 3600},
}
FLAGS = (
    "etcd --unsafe-no-fsync; kube-controller-manager and kube-scheduler 1000 requests/s (burst 2000), "
    "concurrent-job-syncs as it comes (5); operator settings as they come, progress off"
)


@dataclass
class Stage:
    plane: ControlPlane
    folder: Path

    def operator(self) -> "Measured":
        return Measured(self.plane, self.folder, FLEET, identity="bench", settings=dict(SETTINGS))


class Measured(RunningOperator):
    """An operator with figures about its process."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def memory(self) -> tuple[float, float]:
        """MiB held now, and the most that ever was."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return tuple(int(lines[each].split()[0]) / 1024 for each in ("VmRSS", "VmHWM"))  # type: ignore[return-value]

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def api_cpu_seconds(self) -> float:
        """Of the API server."""
        return cpu_seconds(self.plane.daemons["kube-apiserver"].pid)

    def rest_cpu_seconds(self) -> float:
        """Of everything else in the control plane: etcd, scheduler, controllers, KWOK."""
        daemons = self.plane.daemons
        return sum(cpu_seconds(daemons[name].pid) for name in daemons if name != "kube-apiserver")

    def cpu(self) -> tuple[float, float, float]:
        """Processor seconds of the operator, the API server and the rest of the control plane."""
        return self.cpu_seconds(), self.api_cpu_seconds(), self.rest_cpu_seconds()

    def calls(self) -> dict[tuple[str, str, str], float]:
        """Requests so far, by verb, kind and code, without those for the lease."""
        found = {}
        for name, value in self.figures().items():
            if name.startswith("cptjob_api_calls_total{"):
                labels = dict(
                    part.split("=", 1) for part in name.split("{", 1)[1].rstrip("}").split(",")
                )
                key = tuple(labels[each].strip('"') for each in ("verb", "kind", "code"))
                if key[1] != "Lease":
                    found[key] = value
        return found  # type: ignore[return-value]

    def writes(self) -> float:
        return sum(
            count for (verb, _, _), count in self.calls().items() if verb not in ("get", "list")
        )


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has spent."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Ready for jobs; everything ends with the with statement."""
    with ControlPlane(folder, node_grace_seconds=40, manual=MANUAL) as plane, plane.api() as api:
        plane.kubectl("create", "-f", str(CRD))
        for path in ("", "/cptjobs"):
            found = f"/apis/training.cptjob.io/v1alpha1{path}"
            plane.wait(lambda path=found: plane.get(path)[0] == 200, f"{found} to be served")
        Nodes(plane, api).add(NODES, capacity={"pods": str(PODS_PER_NODE)})
        core = client.CoreV1Api(api)
        for namespace in (*STILL, *LIVE, FLEET):
            _namespace(plane, core, namespace)
        yield Stage(plane, folder)


def _namespace(plane: ControlPlane, core: client.CoreV1Api, name: str) -> None:
    core.create_namespace({"metadata": {"name": name}})
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    plane.wait(lambda: plane.get(account)[0] == 200, f"the service account of {name}")
    for claim in ("models", "data", "results"):
        spec = {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "resources": {"requests": {"storage": "1Gi"}},
        }
        volume = {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "hostPath": {"path": "/volumes"},
            "claimRef": {"namespace": name, "name": claim},
        }
        core.create_persistent_volume({"metadata": {"name": f"{name}-{claim}"}, "spec": volume})
        core.create_namespaced_persistent_volume_claim(
            name, {"metadata": {"name": claim}, "spec": spec}
        )


@contextlib.contextmanager
def running(operator: Measured) -> Iterator[Measured]:
    """The operator leads; it is killed in the end."""
    try:
        operator.start().wait_leading()
        yield operator
    finally:
        operator.kill()


class Load:
    """How many cores were busy while the with statement ran, and how many of them with others' work."""

    def __enter__(self) -> "Load":
        self._since = time.monotonic(), _busy(), _own()
        return self

    def __exit__(self, *_: object) -> None:
        when, busy, own = self._since
        seconds = time.monotonic() - when
        self.cores = (_busy() - busy) / seconds
        self.others = max(0.0, self.cores - (_own() - own) / seconds)


def _busy() -> float:
    user, nice, system, _, _, _, _, steal, *_ = Path("/proc/stat").read_text().split()[1:]
    return sum(map(int, (user, nice, system, steal))) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Processor time of this process and all below it that still run."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (each / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(each.name)] = int(fields[1])
                spent[int(each.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    me, ours = os.getpid(), 0.0
    for pid in parents:
        up = pid
        while up not in (me, 0) and up in parents:
            up = parents[up]
        ours += spent[pid] if up == me else 0.0
    return ours
