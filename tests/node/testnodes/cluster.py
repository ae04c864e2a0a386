"""A cluster of real nodes on this machine: Kubernetes' own programs from API server to kubelet."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from testnodes import images
from testnodes.machine import HERE, make_bridge
from testnodes.node import DOMAIN, Node
from testplane import binaries
from testplane.daemon import Daemon
from testplane.lifespan import Lifespan
from testplane.plane import ControlPlane

POOL = "training.cptjob.io/pool"
WAIT_SECONDS = 400.0  # a limit for a loaded machine, no measure
OWNER = 65532  # the user of the images
COREFILE = f"""\
.:53 {{
    bind {HERE}
    errors
    kubernetes {DOMAIN} in-addr.arpa {{
        kubeconfig KUBECONFIG
        pods disabled
        ttl 1
    }}
}}
"""


class Cluster(Lifespan):
    """A control plane and nodes; a with statement starts and stops it.

    names: of the nodes. grace_seconds: a node that is silent for this long becomes NotReady.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], *, grace_seconds: int = 16) -> None:
        self.folder = folder.resolve()
        self.plane = ControlPlane(
            self.folder / "plane", address=HERE, node_grace_seconds=grace_seconds
        )
        programs = binaries.find(binaries.REAL_NODES)
        self._coredns = programs["coredns"]
        self.nodes = {
            name: Node(
                name,
                number,
                plane=self.plane,
                folder=self.folder / name,
                store=self.folder / f"{name}-store",
                programs=programs,
                labels={POOL: "default"},
            )
            for number, name in enumerate(names, 1)
        }

    def start(self) -> None:
        """Returns when every node is Ready."""
        make_bridge()
        for node in self.nodes.values():
            images.copy_store(node.store)
        self.plane.start()
        corefile = self.plane.folder / "Corefile"
        corefile.write_text(COREFILE.replace("KUBECONFIG", str(self.plane.kubeconfig)))
        command = [str(self._coredns), "-conf", str(corefile)]
        coredns = Daemon("coredns", command, self.plane.folder / "coredns.log")
        coredns.start()
        self.plane.daemons["coredns"] = coredns  # it ends with the plane
        for node in self.nodes.values():
            node.start()
        self.wait(lambda: self.ready() == set(self.nodes), f"nodes {list(self.nodes)} to be Ready")

    def stop(self) -> None:
        """Ends all of it; the logs stay."""
        for node in self.nodes.values():
            node.stop()
            shutil.rmtree(node.store, ignore_errors=True)
        self.plane.stop()

    def ready(self) -> set[str]:
        """Names of the nodes that are."""
        _, listed = self.plane.get("/api/v1/nodes")
        return {
            each["metadata"]["name"]
            for each in listed["items"]
            if any(
                condition["type"] == "Ready" and condition["status"] == "True"
                for condition in each["status"].get("conditions", ())
            )
        }

    def wait(self, happened: Callable[[], object], what: str) -> None:
        """Returns when `happened()` is true. Raises DaemonError."""
        self.plane.wait(happened, what, WAIT_SECONDS)

    def volume(self, namespace: str, claim: str) -> Path:
        """A claim whose data lies in a folder that all nodes see, as with a shared filesystem."""
        path = self.folder / "volumes" / namespace / claim
        path.mkdir(parents=True)
        shutil.chown(path, OWNER, OWNER)
        common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        self._create(
            "PersistentVolume",
            {"name": f"{namespace}-{claim}"},
            {
                "capacity": {"storage": "10Gi"},
                "claimRef": {"namespace": namespace, "name": claim},
                "hostPath": {"path": str(path)},
                **common,
            },
        )
        self._create(
            "PersistentVolumeClaim",
            {"name": claim, "namespace": namespace},
            {"resources": {"requests": {"storage": "10Gi"}}, **common},
        )
        return path

    def _create(self, kind: str, metadata: Mapping[str, str], spec: Mapping[str, Any]) -> None:
        made = {"apiVersion": "v1", "kind": kind, "metadata": dict(metadata), "spec": dict(spec)}
        self.plane.kubectl("create", "-f", "-", stdin=json.dumps(made))
