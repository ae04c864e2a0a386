"""A real node: containerd, a kubelet and kube-proxy on a machine of its own."""

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testnodes.machine import HERE, POD_PREFIX, Machine
from testnodes.needs import CNI
from testplane.daemon import DaemonError
from testplane.plane import ControlPlane

PAUSE_IMAGE = "localhost/pause:1"
DOMAIN = "cluster.local"
CGROUPS = Path("/sys/fs/cgroup")
START_SECONDS = 60.0


class Node:
    """One node. `start` joins it to the cluster; `lose` pulls its plug, and `start` is its return.

    store: containerd's data, with the images in it; it is the node's own.
    programs: paths of kubelet and kube-proxy.
    """

    def __init__(
        self,
        name: str,
        number: int,
        *,
        plane: ControlPlane,
        folder: Path,
        store: Path,
        programs: Mapping[str, Path],
        labels: Mapping[str, str],
    ) -> None:
        folder.mkdir(parents=True)
        self.name, self.folder, self.store = name, folder, store
        self.machine = Machine(name, number, folder)
        self._plane, self._programs, self._labels = plane, programs, dict(labels)
        self._cgroup = f"cptjob-{secrets.token_hex(4)}-{name}"

    def start(self) -> None:
        """Returns when containerd answers and the kubelet runs; the node is not Ready at once."""
        self._write_settings()
        _make_cgroup(self._cgroup)
        self.machine.start()
        self.machine.spawn("containerd", "containerd", "--config", f"{self.folder}/containerd.toml")
        self._wait_for_containerd()
        self.start_kubelet()
        settings = f"--config={self.folder / 'kube-proxy.json'}"
        self.machine.spawn("kube-proxy", str(self._programs["kube-proxy"]), settings)

    def start_kubelet(self) -> None:
        labels = ",".join("=".join(item) for item in self._labels.items())
        self.machine.spawn(
            "kubelet",
            str(self._programs["kubelet"]),
            f"--config={self.folder / 'kubelet.json'}",
            f"--kubeconfig={self._plane.kubeconfig}",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--cert-dir={self.folder / 'keys'}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.machine.address}",
            f"--node-labels={labels}",
        )

    def lose(self) -> None:
        """It is gone at once with all that runs on it, as when its power fails."""
        self.machine.stop()

    def stop(self) -> None:
        """For good."""
        self.machine.stop()
        _remove_cgroup(self._cgroup)

    def processes(self, words: str) -> list[str]:
        """Ids, as the machine numbers them, of processes whose command line has these words."""
        # In brackets, so that the shell that asks does not find itself.
        pattern = f"[{words[0]}]{words[1:]}"
        return self.machine.run("sh", "-c", f"pgrep -f -- '{pattern}' || true").split()

    @property
    def _socket(self) -> Path:
        return self.folder / "containerd.sock"

    def _wait_for_containerd(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.machine.daemons["containerd"].check()
            if self._socket.exists():
                return
            time.sleep(0.05)
        raise DaemonError(f"containerd of {self.name} does not answer")

    def _write_settings(self) -> None:
        (self.folder / "containerd.toml").write_text(self._containerd())
        network = self.folder / "net.d" / "10-bridge.conflist"
        network.parent.mkdir(exist_ok=True)
        network.write_text(json.dumps(self._network()))
        (self.folder / "kubelet.json").write_text(json.dumps(self._kubelet()))
        (self.folder / "kube-proxy.json").write_text(json.dumps(self._proxy()))
        (self.folder / "resolv.conf").write_text(f"nameserver {HERE}\n")

    def _containerd(self) -> str:
        return f"""\
version = 2
root = "{self.store}"
state = "{self.folder}/containerd"
[grpc]
address = "{self._socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# Without CAP_SYS_RESOURCE runc cannot lower it.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI}"
conf_dir = "{self.folder}/net.d"
"""

    def _network(self) -> dict[str, Any]:
        bridge = {
            "type": "bridge",
            "bridge": "pods",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": self.machine.pods}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(self.folder / "addresses"),
            },
        }
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}

    def _kubelet(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.machine.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._plane.ca)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "clusterDNS": [HERE],
            "clusterDomain": DOMAIN,
            "resolvConf": str(self.folder / "resolv.conf"),
            "podLogsDir": str(self.folder / "logs"),
            "nodeStatusUpdateFrequency": "2s",
            "nodeLeaseDurationSeconds": max(4, self._plane.node_grace_seconds * 3 // 4),
            # The disk is shared with whatever else this machine does.
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "serializeImagePulls": False,
            "registryPullQPS": 0,
            "kubeAPIQPS": 100,
            "kubeAPIBurst": 200,
        }

    def _proxy(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "clusterCIDR": f"{POD_PREFIX}.0.0/16",
            "hostnameOverride": self.name,
            "bindAddress": self.machine.address,
            "clientConnection": {"kubeconfig": str(self._plane.kubeconfig)},
            # The kernel's tables are not the machine's own to size.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }


def _make_cgroup(name: str) -> None:
    """Under every controller of cgroup v1, or in the one tree of v2."""
    for parent in _hierarchies():
        folder = parent / name
        folder.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # v1: nothing runs where these are empty
            if (folder / file).exists() and (parent / "tasks").exists():
                (folder / file).write_text((parent / file).read_text())


def _remove_cgroup(name: str) -> None:
    """Returns when it is gone: its last processes may still be ending."""
    for parent in _hierarchies():
        folders = [each for each in (parent / name).rglob("*/") if each.is_dir()]
        for folder in (*sorted(folders, reverse=True), parent / name):
            deadline = time.monotonic() + START_SECONDS
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)


def _hierarchies() -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [each for each in CGROUPS.iterdir() if each.is_dir() and not each.is_symlink()]
