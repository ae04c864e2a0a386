"""One control plane for the whole session, with the definition of CPTJob; a namespace per test."""

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, watch
from lives import Live, living
from rights import Audit
from running import RunningOperator
from world import World

from testplane import binaries
from testplane.kubelet import Kubelet
from testplane.nodes import Nodes
from testplane.plane import ControlPlane
from testplane.proxy import FaultProxy

ROOT = Path(__file__).parents[2]
CRD = ROOT / "crds" / "training.cptjob.io_cptjobs.yaml"
GROUP = {"group": "training.cptjob.io", "version": "v1alpha1", "plural": "cptjobs"}


# Long enough for a loaded machine to renew the leases of its nodes, short enough to wait for.
NODE_GRACE_SECONDS = 12
# Off by default, and on in clusters that are run with care.
PLUGIN = "--enable-admission-plugins=OwnerReferencesPermissionEnforcement"


def pytest_configure(config: pytest.Config) -> None:
    # The client library's own use of urllib3.
    config.addinivalue_line("filterwarnings", "ignore:HTTPResponse.getheader:DeprecationWarning")


@pytest.fixture(scope="session", name="report")
def make_report(pytestconfig: pytest.Config) -> binaries.Report:
    return binaries.past_capture(pytestconfig.pluginmanager.getplugin("capturemanager"))


@pytest.fixture(scope="session", name="audit")
def make_audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return Audit(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="session", name="plane")
def start_plane(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    report: binaries.Report,
    audit: Audit,
) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("plane")
    failed_before = request.session.testsfailed
    flags = {"kube-apiserver": [PLUGIN, *audit.flags()]}
    with ControlPlane(
        folder, node_grace_seconds=NODE_GRACE_SECONDS, flags=flags, report=report
    ) as plane:
        install_crd(plane)
        yield plane
    if request.session.testsfailed > failed_before:
        report(f"\nlogs of the control plane: {folder}/*.log")
    else:
        shutil.rmtree(folder)


def install_crd(plane: ControlPlane) -> None:
    """Returns when jobs are served and kubectl can find their kind."""
    plane.kubectl("create", "-f", str(CRD))
    group = "/apis/training.cptjob.io/v1alpha1"
    for path in (group, f"{group}/cptjobs"):
        plane.wait(lambda path=path: plane.get(path)[0] == 200, f"{path} to be served")


@pytest.fixture(scope="session", name="api")
def make_api(plane: ControlPlane) -> Iterator[client.ApiClient]:
    """A client with every right."""
    with plane.api() as api:
        yield api


@pytest.fixture(name="core")
def make_core(api: client.ApiClient) -> client.CoreV1Api:
    return client.CoreV1Api(api)


@pytest.fixture(name="namespace")
def make_namespace(core: client.CoreV1Api) -> Iterator[str]:
    """A namespace whose pods run by themselves once they have a node."""
    with _namespace(core, "test") as name:
        yield name


@pytest.fixture(name="manual_namespace")
def make_manual_namespace(core: client.CoreV1Api) -> Iterator[str]:
    """A namespace whose pods do only what `kubelet` makes them do."""
    with _namespace(core, "manual") as name:
        yield name


@pytest.fixture(name="new_namespace")
def make_new_namespaces(core: client.CoreV1Api) -> Iterator[Callable[[], str]]:
    """Makes another such namespace with each call."""
    with contextlib.ExitStack() as made:
        yield lambda: made.enter_context(_namespace(core, "manual"))


@contextlib.contextmanager
def _namespace(core: client.CoreV1Api, kind: str) -> Iterator[str]:
    name = f"{kind}-{secrets.token_hex(4)}"
    core.create_namespace({"metadata": {"name": name}})
    # Pods are refused until the controller manager has made it.
    _wait_for_account(core, name)
    yield name
    core.delete_namespace(name)
    for pod in core.list_namespaced_pod(name).items:
        core.delete_namespaced_pod(pod.metadata.name, name, grace_period_seconds=0)


def _wait_for_account(core: client.CoreV1Api, namespace: str) -> None:
    events = watch.Watch().stream(core.list_namespaced_service_account, namespace)
    next(event for event in events if event["object"].metadata.name == "default")


@pytest.fixture(name="nodes")
def make_nodes(plane: ControlPlane, api: client.ApiClient) -> Iterator[Nodes]:
    """`nodes.add(...)`: nodes for one test, and for no other test at the same time."""
    nodes = Nodes(plane, api)
    yield nodes
    nodes.clear()


@pytest.fixture(name="kubelet")
def make_kubelet(api: client.ApiClient) -> Kubelet:
    return Kubelet(api)


class Jobs:
    """CPTJobs of one namespace."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._api = client.CustomObjectsApi(api)
        self._where = GROUP | {"namespace": namespace}

    def create(self, job: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        more = {"dry_run": "All"} if dry_run else {}
        created: dict[str, Any] = self._api.create_namespaced_custom_object(
            body=job, **self._where, **more
        )
        return created

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._api.get_namespaced_custom_object(name=name, **self._where)
        return found

    def patch(self, name: str, change: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """A merge patch."""
        more = {"dry_run": "All"} if dry_run else {}
        patched: dict[str, Any] = self._api.patch_namespaced_custom_object(
            name=name, body=change, **self._where, **more
        )
        return patched

    def patch_status(self, name: str, status: dict[str, Any]) -> dict[str, Any]:
        patched: dict[str, Any] = self._api.patch_namespaced_custom_object_status(
            name=name, body={"status": status}, **self._where
        )
        return patched


@pytest.fixture(name="jobs")
def make_jobs(api: client.ApiClient, namespace: str) -> Jobs:
    return Jobs(api, namespace)


# --- the operator ---


@pytest.fixture(name="world")
def make_world(plane: ControlPlane, api: client.ApiClient, manual_namespace: str) -> World:
    return World(plane, api, manual_namespace)


@pytest.fixture(name="lively_world")
def make_lively_world(plane: ControlPlane, api: client.ApiClient, namespace: str) -> World:
    """Its pods run by themselves, and go when they are deleted."""
    return World(plane, api, namespace)


@pytest.fixture(name="start")
def make_start(
    plane: ControlPlane, world: World, tmp_path: Path
) -> Iterator[Callable[..., RunningOperator]]:
    """`start(identity=..., kubeconfig=...)` starts an operator; all are killed in the end.

    All must have said what they said as JSON.
    """
    started: list[RunningOperator] = []

    def start(**more: Any) -> RunningOperator:
        started.append(RunningOperator(plane, tmp_path, world.namespace, **more))
        return started[-1].start()

    yield start
    for each in started:
        each.kill()
    for each in started:
        assert all("message" in line for line in each.lines), "whatever it did, it told as JSON"


@pytest.fixture(scope="module", name="pool")
def make_pool(plane: ControlPlane, api: client.ApiClient) -> Iterator[list[str]]:
    """Nodes of the pool `default` for all tests of a module, with room for many pods."""
    nodes = Nodes(plane, api)
    yield nodes.add(3, pool="default", prefix="of-module")
    nodes.clear()


@pytest.fixture(scope="module", name="operator")
def start_operator(
    plane: ControlPlane,
    pool: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[RunningOperator]:
    """One operator for all namespaces and all tests of a module.

    A module's SETTINGS come in place of some of its own.
    """
    settings = {"watchedNamespaces": [], "pools": {"default": {}}}
    operator = RunningOperator(
        plane,
        tmp_path_factory.mktemp("operator"),
        "default",
        settings=settings | getattr(request.module, "SETTINGS", {}),
    )
    yield operator.start().wait_leading()
    operator.stop()
    assert all("message" in line for line in operator.lines)


@pytest.fixture(name="proxy")
def start_proxy(plane: ControlPlane, tmp_path: Path) -> Iterator[FaultProxy]:
    with FaultProxy(plane, tmp_path / "proxy") as proxy:
        yield proxy


@pytest.fixture(name="live")
def make_live(
    plane: ControlPlane, api: client.ApiClient, new_namespace: Callable[[], str], tmp_path: Path
) -> Iterator[Live]:
    """See `lives.living`."""
    with living(plane, api, new_namespace, tmp_path) as live:
        yield live
