"""Two real nodes with the operator that helm installed, for the whole session; a namespace per test."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helmchart import CHART, NAME, NAMESPACE, Helm
from testnodes.cluster import OWNER, Cluster
from testplane import binaries

ROOT = Path(__file__).parents[2]
VOLUMES = ROOT / "volumes"  # the model and text that `make setup` makes
NODES = ("node-a", "node-b")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("node")


@pytest.fixture(scope="session", name="report")
def make_report(pytestconfig: pytest.Config) -> binaries.Report:
    """Prints at once, past pytest's capture: the nodes take a while."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def report(line: str) -> None:
        with capture.global_and_fixture_disabled():
            binaries.to_stderr(line)

    return report


@pytest.fixture(scope="session", name="cluster")
def start_cluster(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    report: binaries.Report,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    failed_before = request.session.testsfailed
    with Cluster(folder, NODES) as cluster:
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
    enforce = "pod-security.kubernetes.io/enforce=restricted"
    cluster.plane.kubectl("label", "namespace", NAMESPACE, enforce)
    wait = ["--wait", "--timeout", "3m"]
    values = {"settings": {"pools": {"default": {}}}}
    helm.run("install", NAME, str(CHART), "-n", NAMESPACE, *wait, values=values)


class Team:
    """A namespace that admits restricted pods only, with claims for models, data and results."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.volumes = {
            claim: cluster.volume(namespace, claim) for claim in ("models", "data", "results")
        }
        for claim in ("models", "data"):
            shutil.copytree(VOLUMES / claim, self.volumes[claim], dirs_exist_ok=True)
            for path in [self.volumes[claim], *self.volumes[claim].rglob("*")]:
                shutil.chown(path, OWNER, OWNER)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints in this namespace. Raises KubectlError."""
        return self.cluster.plane.kubectl("-n", self.namespace, *arguments, stdin=stdin)

    def submit(self, name: str, changes: dict[str, Any] | None = None) -> None:
        """The tiny example under that name, on two nodes; `changes`: other values by path."""
        job = yaml.safe_load((ROOT / "deploy" / "examples" / "tiny.yaml").read_text("utf-8"))
        defaults = {"metadata.name": name, "spec.trainer": {"numNodes": 2, "numProcPerNode": 1}}
        for path, value in {**defaults, **(changes or {})}.items():
            *parents, last = path.split(".")
            place = job
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        self.kubectl("apply", "-f", "-", stdin=json.dumps(job))

    def status(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.kubectl("get", "cpt", name, "-o", "json")).get("status") or {})

    def pods(self, name: str) -> list[dict[str, Any]]:
        selector = f"training.cptjob.io/job-name={name}"
        listed = json.loads(self.kubectl("get", "pods", "-l", selector, "-o", "json"))
        return list(listed["items"])

    def wait_for(self, name: str, phase: str) -> None:
        """Returns when the job's phase is that one."""
        self.cluster.wait(lambda: self.status(name).get("phase") == phase, f"{name} to be {phase}")


@pytest.fixture(name="team")
def make_team(cluster: Cluster, operator: None) -> Iterator[Team]:
    name = f"team-{secrets.token_hex(3)}"
    cluster.plane.kubectl("create", "namespace", name)
    enforce = "pod-security.kubernetes.io/enforce=restricted"
    cluster.plane.kubectl("label", "namespace", name, enforce)
    yield Team(cluster, name)
    with contextlib.suppress(Exception):
        cluster.plane.kubectl("delete", "namespace", name, "--wait=false")
