"""A Kubernetes control plane on this machine: real programs, fake nodes, ready in seconds.

    with ControlPlane(folder) as plane:
        plane.kubectl("apply", "-f", "deploy/examples/tiny.yaml")

etcd, kube-apiserver, kube-controller-manager and kube-scheduler are Kubernetes' own; KWOK stands in
for the kubelets of the nodes that nodes.py makes. Everything listens on 127.0.0.1 and dies with the
process that started it. Make it in the main thread (see daemon.py).
"""

import json
import secrets
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trustme

from testplane import binaries
from testplane.daemon import Daemon, DaemonError
from testplane.lifespan import Lifespan
from testplane.ports import free_ports

READY_SECONDS = 120.0  # a limit for a loaded machine, no measure
START_ATTEMPTS = 3

# Pods that are left to the test, as a jq expression: those that say so, and whole namespaces.
MANUAL = (
    '(.metadata.annotations["testplane/kubelet"] == "manual") or '
    '(.metadata.namespace | startswith("manual-"))'
)
KUBELET_LABEL = "testplane/kubelet"
SERVICE = "10.96.0.1"  # the first address for Services is the API server's


class KubectlError(Exception):
    """kubectl failed; the message is what it said."""


class ControlPlane(Lifespan):
    """One control plane; `start` and `stop`, or a with statement.

    folder: gets logs, keys, kubeconfig and (until `stop`) etcd's data.
    address: where the API server listens; with real nodes, one that they reach.
    node_grace_seconds: a node whose kubelet is silent for this long becomes NotReady.
    manual: jq expression; pods for which it is true do nothing by themselves (see kubelet.py).
    flags: more flags by program, as in {"kube-apiserver": ["--watch-cache=false"]}; of a flag that
        is given twice, the last one counts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        node_grace_seconds: int = 16,
        manual: str = MANUAL,
        flags: Mapping[str, Sequence[str]] | None = None,
        report: binaries.Report = binaries.to_stderr,
    ) -> None:
        self.folder = folder.resolve()
        self.address = address
        self.node_grace_seconds = node_grace_seconds
        self.manual = manual
        self.flags = dict(flags or {})
        self.programs = binaries.find(report=report)
        self.token = secrets.token_hex(16)
        self.daemons: dict[str, Daemon] = {}
        self.url = ""

    # --- life ---

    def start(self) -> None:
        """Returns when jobs can be applied and pods get nodes. Raises DaemonError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_keys()
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start()
                return
            except DaemonError as error:
                # Another process may have taken a port between its choice and its use.
                self.stop()
                if attempt == START_ATTEMPTS or "address already in use" not in str(error):
                    raise

    def _start(self) -> None:
        etcd_port, peer_port, api_port = free_ports(3)
        self.url = f"https://{self.address}:{api_port}"
        self.write_kubeconfig(self.kubeconfig, self.token)
        self._write_settings()
        commands = {
            "etcd": self._etcd(etcd_port, peer_port),
            "kube-apiserver": self._apiserver(api_port, etcd_port),
            "kube-controller-manager": self._controller_manager(),
            "kube-scheduler": self._scheduler(),
            "kwok": self._kwok(),
        }
        self.daemons = {
            name: Daemon(
                name,
                [str(self.programs[name]), *command, *self.flags.get(name, ())],
                self.folder / f"{name}.log",
            )
            for name, command in commands.items()
        }
        self.daemons["etcd"].start()
        self.start_apiserver()
        for name in ("kube-controller-manager", "kube-scheduler", "kwok"):
            self.daemons[name].start()
        self.wait(self._has_default_account, "the controller manager to work")

    def stop(self) -> None:
        """Ends every program, by process id, and deletes etcd's data; logs stay in `folder`."""
        for daemon in reversed(self.daemons.values()):
            # Nothing is worth a clean shutdown here: the data goes with it.
            daemon.kill()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    # --- the API server on its own ---

    def start_apiserver(self) -> None:
        """Starts it (again) on the same address and data. Returns when it is ready."""
        self.daemons["kube-apiserver"].start()
        self.wait(self._is_ready, "the API server to be ready")

    def stop_apiserver(self) -> None:
        """Lets it finish what it does, as in an upgrade of the control plane."""
        self.daemons["kube-apiserver"].stop()

    def kill_apiserver(self) -> None:
        self.daemons["kube-apiserver"].kill()

    @contextmanager
    def apiserver_down(self) -> Iterator[None]:
        """Without an API server for the time of the with statement."""
        self.kill_apiserver()
        try:
            yield
        finally:
            self.start_apiserver()

    # --- access ---

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach it."""
        return self.address.startswith("127.")

    @property
    def kubeconfig(self) -> Path:
        """Of an administrator."""
        return self.folder / "kubeconfig"

    @property
    def ca(self) -> Path:
        """Certificate of the authority that signed the API server's."""
        return self.folder / "ca.crt"

    def write_kubeconfig(
        self, path: Path, token: str, url: str | None = None, ca: Path | None = None
    ) -> Path:
        """A kubeconfig for another bearer token, or for a proxy with its own address."""
        cluster = {
            "server": url or self.url,
            "certificate-authority": str(ca or self.ca),
        }
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(document, indent=1))
        path.chmod(0o600)
        return path

    def token_of(self, namespace: str, account: str) -> str:
        """A bearer token of a ServiceAccount, as its pods get one."""
        return self.kubectl("create", "token", account, "-n", namespace, "--duration=24h").strip()

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints. Raises KubectlError with what it says when it fails."""
        done = self.try_kubectl(*arguments, stdin=stdin)
        if done.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def try_kubectl(
        self, *arguments: str, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """kubectl's exit code, output and errors."""
        return subprocess.run(
            [str(self.programs["kubectl"]), "--kubeconfig", str(self.kubeconfig), *arguments],
            # Its discovery cache lies in HOME; another plane may have had the same address.
            env={"HOME": str(self.folder), "PATH": "/usr/bin:/bin"},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def api(self, token: str | None = None) -> Any:
        """A client of the `kubernetes` package, of an administrator unless told otherwise."""
        from kubernetes import client  # takes a second; not everyone who runs a plane wants it

        settings = client.Configuration(host=self.url)
        settings.ssl_ca_cert = str(self.ca)
        settings.api_key = {"authorization": f"Bearer {token or self.token}"}
        return client.ApiClient(settings)

    def get(self, path: str) -> tuple[int, Any]:
        """Status code and JSON (or text) of a GET, for what is not worth a client."""
        request = urllib.request.Request(
            self.url + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        context = ssl.create_default_context(cafile=str(self.ca))
        try:
            with urllib.request.urlopen(request, context=context, timeout=5) as answer:
                code, body = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            code, body = error.code, error.read().decode()
        try:
            return code, json.loads(body)
        except ValueError:
            return code, body

    def memory(self) -> dict[str, int]:
        """Bytes that each program holds in memory."""
        return {name: daemon.memory() for name, daemon in self.daemons.items()}

    def wait(
        self, happened: Callable[[], object], what: str, seconds: float = READY_SECONDS
    ) -> None:
        """Returns when `happened()` is true. Raises DaemonError when a program ends meanwhile."""
        deadline = time.monotonic() + seconds
        while not happened():
            for daemon in self.daemons.values():
                if daemon.started:
                    daemon.check()
            if time.monotonic() > deadline:
                raise DaemonError(f"waited {seconds:.0f} s in vain for {what}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            code, _ = self.get("/readyz")
        except OSError:
            return False
        return code == 200

    def _has_default_account(self) -> bool:
        code, _ = self.get("/api/v1/namespaces/default/serviceaccounts/default")
        return code == 200

    # --- files ---

    def _write_keys(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca))
        server = authority.issue_cert(self.address, SERVICE, "kubernetes.default.svc")
        server.cert_chain_pems[0].write_to_path(str(self.folder / "server.crt"))
        server.private_key_pem.write_to_path(str(self.folder / "server.key"))
        # What the API server asks kubelets with, for logs.
        asks = authority.issue_cert(
            "apiserver.test", common_name="apiserver", organization_name="system:masters"
        )
        asks.private_key_and_cert_chain_pem.write_to_path(str(self.folder / "asks.pem"))
        accounts = authority.issue_cert("service-accounts.test")
        accounts.private_key_pem.write_to_path(str(self.folder / "accounts.key"))
        (self.folder / "tokens.csv").write_text(f'{self.token},admin,admin,"system:masters"\n')

    def _write_settings(self) -> None:
        scheduler = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "clientConnection": {"kubeconfig": str(self.kubeconfig), "qps": 1000, "burst": 2000},
            "leaderElection": {"leaderElect": False},
            "podMaxBackoffSeconds": 2,
        }
        (self.folder / "scheduler.json").write_text(json.dumps(scheduler))
        stages = Path(__file__).with_name("stages.yaml").read_text("utf-8")
        (self.folder / "stages.yaml").write_text(
            stages.replace("MANUAL then", f"{self.manual} then")
        )

    # --- commands ---

    def _etcd(self, port: int, peer_port: int) -> list[str]:
        here, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        return [
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={here}",
            f"--advertise-client-urls={here}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--quota-backend-bytes=4294967296",
            "--log-level=warn",
        ]

    def _apiserver(self, port: int, etcd_port: int) -> list[str]:
        accounts = self.folder / "accounts.key"
        return [
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            f"--bind-address={self.address}",
            f"--secure-port={port}",
            f"--tls-cert-file={self.folder / 'server.crt'}",
            f"--tls-private-key-file={self.folder / 'server.key'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            f"--client-ca-file={self.ca}",
            "--authorization-mode=Node,RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={accounts}",
            f"--service-account-signing-key-file={accounts}",
            "--service-cluster-ip-range=10.96.0.0/16",
            # An address of loopback cannot be an endpoint of the Service `kubernetes`.
            f"--endpoint-reconciler-type={'none' if self.is_local else 'lease'}",
            f"--kubelet-client-certificate={self.folder / 'asks.pem'}",
            f"--kubelet-client-key={self.folder / 'asks.pem'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--profiling=false",
        ]

    def _controller_manager(self) -> list[str]:
        return [
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={self.folder / 'accounts.key'}",
            f"--root-ca-file={self.ca}",
            "--secure-port=0",
            "--leader-elect=false",
            "--controllers=*,-nodeipam,-cloud-node-lifecycle",
            "--node-monitor-period=1s",
            f"--node-monitor-grace-period={self.node_grace_seconds}s",
            "--node-eviction-rate=10",
            "--kube-api-qps=1000",
            "--kube-api-burst=2000",
            "--profiling=false",
        ]

    def _scheduler(self) -> list[str]:
        return [f"--config={self.folder / 'scheduler.json'}", "--secure-port=0"]

    def _kwok(self) -> list[str]:
        # It renews a node's lease after a quarter of the lease's time.
        return [
            f"--kubeconfig={self.kubeconfig}",
            f"--config={self.folder / 'stages.yaml'}",
            f"--manage-nodes-with-label-selector={KUBELET_LABEL}=kwok",
            f"--node-lease-duration-seconds={self.node_grace_seconds * 3 // 4}",
            "--cidr=10.0.0.0/12",
        ]
