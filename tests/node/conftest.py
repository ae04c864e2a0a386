"""Two real nodes with the operator that helm installed, for the whole session; a namespace per test."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from team import VALUES, Team

from helmchart import CHART, NAME, NAMESPACE, Helm
from testnodes.cluster import Cluster
from testplane import binaries

NODES = ("node-a", "node-b")
#: Long enough for a loaded machine to renew the leases of its nodes, short enough to wait for.
GRACE_SECONDS = 12
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("node")


@pytest.fixture(scope="session", name="report")
def make_report(pytestconfig: pytest.Config) -> binaries.Report:
    return binaries.past_capture(pytestconfig.pluginmanager.getplugin("capturemanager"))


@pytest.fixture(scope="session", name="cluster")
def start_cluster(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    report: binaries.Report,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    failed_before = request.session.testsfailed
    with Cluster(folder, NODES, grace_seconds=GRACE_SECONDS) as cluster:
        yield cluster
    if request.session.testsfailed > failed_before:
        report(f"\nlogs of the cluster: {folder}/*/*.log")
    else:
        shutil.rmtree(folder)


@pytest.fixture(scope="session", name="helm")
def make_helm(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Helm:
    program = binaries.find(["helm"])["helm"]
    return Helm(program, tmp_path_factory.mktemp("helm"), cluster.plane.kubeconfig)


@pytest.fixture(scope="session", name="operator")
def install_operator(cluster: Cluster, helm: Helm) -> None:
    """As a platform team installs it, in a namespace that admits restricted pods only."""
    cluster.plane.kubectl("create", "namespace", NAMESPACE)
    cluster.plane.kubectl("label", "namespace", NAMESPACE, RESTRICTED)
    wait = ["--wait", "--timeout", "2m"]
    helm.run("install", NAME, str(CHART), "-n", NAMESPACE, *wait, values=VALUES)


@pytest.fixture(name="team")
def make_team(cluster: Cluster, operator: None) -> Iterator[Team]:
    name = f"team-{secrets.token_hex(3)}"
    cluster.plane.kubectl("create", "namespace", name)
    cluster.plane.kubectl("label", "namespace", name, RESTRICTED)
    yield Team(cluster, name)
    with contextlib.suppress(Exception):
        cluster.plane.kubectl("delete", "cptjobs", "--all", "-n", name, "--timeout=60s")
