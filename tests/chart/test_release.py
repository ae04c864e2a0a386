"""The chart's life on a real control plane: install, upgrade, rollback, uninstall."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from helmchart import CHART, MANIFESTS, NAME, Helm, HelmError, Values
from testplane.nodes import Nodes
from testplane.plane import ControlPlane

ROOT = Path(__file__).parents[2]
TINY = ROOT / "deploy" / "examples" / "tiny.yaml"
CRD = "cptjobs.training.cptjob.io"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
WAIT = ("--wait", "--timeout", "120s")


class Release:
    """One release in a namespace of its own, where Pod Security admits only `restricted`."""

    def __init__(self, helm: Helm, plane: ControlPlane, namespace: str) -> None:
        self.helm = Helm(helm.program, helm.home, plane.kubeconfig)
        self.plane, self.namespace = plane, namespace

    def helm_does(self, verb: str, *arguments: str, values: Values | None = None) -> str:
        return self.helm.run(verb, NAME, *arguments, "-n", self.namespace, values=values)

    def install(self, values: Values | None = None) -> str:
        return self.helm_does("install", str(CHART), *WAIT, values=values)

    def upgrade(self, values: Values | None = None) -> str:
        return self.helm_does("upgrade", str(CHART), *WAIT, values=values)

    def kubectl(self, *arguments: str) -> str:
        return self.plane.kubectl(*arguments, "-n", self.namespace)

    def get(self, what: str) -> Any:
        return json.loads(self.kubectl("get", what, "-o", "json"))

    def status(self) -> str:
        found: str = json.loads(self.helm_does("status", "-o", "json"))["info"]["status"]
        return found


@pytest.fixture(name="nodes", scope="session", autouse=True)
def make_nodes(plane: ControlPlane) -> Iterator[None]:
    with plane.api() as api:
        nodes = Nodes(plane, api)
        nodes.add(2, pool=None, gpus=0)
        yield
        nodes.clear()


@pytest.fixture(name="release")
def make_release(helm: Helm, plane: ControlPlane) -> Iterator[Release]:
    namespace = f"operator-{secrets.token_hex(4)}"
    plane.kubectl("create", "namespace", namespace)
    plane.kubectl("label", "namespace", namespace, RESTRICTED)
    release = Release(helm, plane, namespace)
    yield release
    release.helm_does("uninstall", "--ignore-not-found", "--wait")
    plane.kubectl("delete", "crd", CRD, "--ignore-not-found")
    plane.kubectl("delete", "namespace", namespace, "--wait=false")


def has_crd(plane: ControlPlane) -> bool:
    return CRD in plane.kubectl("get", "crd", "-o", "name")


def test_an_installed_operator_stands_where_only_restricted_pods_are_admitted(
    release: Release,
) -> None:
    notes = release.install()
    assert "looks after every namespace" in " ".join(notes.split())
    assert release.get(f"deployment/{NAME}")["status"]["readyReplicas"] == 2
    pods = release.get("pods")["items"]
    assert len(pods) == 2
    assert {pod["spec"]["serviceAccountName"] for pod in pods} == {NAME}
    # The two pods stand on different nodes, and one of them may be drained.
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    budget = release.get(f"pdb/{NAME}")
    assert budget["spec"]["maxUnavailable"] == 1
    # Jobs can be made, and the API server knows their fields.
    release.kubectl("apply", "-f", str(TINY))
    assert release.get("cptjob/tiny")["metadata"]["uid"]


def test_an_upgrade_starts_new_pods_for_new_settings_and_a_rollback_takes_them_back(
    release: Release,
) -> None:
    def settings() -> str:
        text: str = release.get(f"configmap/{NAME}-settings")["data"]["settings.yaml"]
        return text

    def pods() -> set[str]:
        living = release.get("pods")["items"]
        return {
            pod["metadata"]["uid"] for pod in living if "deletionTimestamp" not in pod["metadata"]
        }

    release.install()
    first, text = pods(), settings()
    release.upgrade({"replicas": 2, "settings": {"limits": {"maxNodes": 8}}})
    assert "maxNodes: 8" in settings()
    second = pods()
    assert not first & second
    release.helm_does("rollback", "1", *WAIT)
    assert settings() == text
    assert not second & pods()
    assert release.status() == "deployed"


def test_an_upgrade_that_changes_nothing_leaves_the_pods_alone(release: Release) -> None:
    release.install()
    before = release.get("pods")["items"]
    release.upgrade()
    names = {pod["metadata"]["name"] for pod in release.get("pods")["items"]}
    assert names == {pod["metadata"]["name"] for pod in before}


def test_uninstalling_leaves_the_definition_and_the_jobs_and_installing_takes_them_up_again(
    release: Release,
) -> None:
    release.install()
    release.kubectl("apply", "-f", str(TINY))
    uid = release.get("cptjob/tiny")["metadata"]["uid"]
    release.helm_does("uninstall", "--wait")
    assert has_crd(release.plane)
    assert release.get("cptjob/tiny")["metadata"]["uid"] == uid
    left = release.kubectl("get", "deployments,pods,roles,rolebindings,configmaps", "-o", "name")
    assert NAME not in left
    release.install()
    assert release.get("cptjob/tiny")["metadata"]["uid"] == uid


def test_uninstalling_takes_the_definition_along_where_that_is_asked_for(release: Release) -> None:
    release.install({"crds": {"keep": False}})
    assert has_crd(release.plane)
    release.helm_does("uninstall", "--wait")
    release.plane.wait(lambda: not has_crd(release.plane), "the definition to go")


def test_bad_values_change_nothing(release: Release) -> None:
    release.install()
    with pytest.raises(HelmError, match="maximum: got 501, want 500"):
        release.upgrade({"settings": {"limits": {"maxNodes": 501}}})
    assert json.loads(release.helm_does("history", "-o", "json"))[-1]["revision"] == 1


def test_the_plain_manifests_are_taken_by_the_api_server(
    plane: ControlPlane,
) -> None:
    plane.kubectl("apply", "--server-side", "-f", str(MANIFESTS))
    try:
        plane.kubectl(
            "rollout", "status", f"deployment/{NAME}", "-n", "cptjob-system", "--timeout=120s"
        )
        assert plane.kubectl("diff", "--server-side", "-f", str(MANIFESTS)) == ""
    finally:
        plane.kubectl("delete", "-f", str(MANIFESTS))


# --- rights, as the API server sees them ----------------------------------------------------------


def allowed(
    plane: ControlPlane, user: str, verb: str, resource: str, namespace: str, group: str = ""
) -> bool:
    """What the API server's own authorizer says."""
    name, _, subresource = resource.partition("/")
    attributes = {
        "verb": verb,
        "group": group,
        "resource": name,
        "subresource": subresource,
        "namespace": namespace,
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": attributes},
    }
    with plane.api() as api:
        answer = client.AuthorizationV1Api(api).create_subject_access_review(review)
    return bool(answer.status.allowed)


JOBS = "training.cptjob.io"


@pytest.fixture(name="teams")
def make_teams(plane: ControlPlane) -> Iterator[tuple[str, str]]:
    names = (f"team-{secrets.token_hex(4)}", f"other-{secrets.token_hex(4)}")
    for name in names:
        plane.kubectl("create", "namespace", name)
    yield names
    plane.kubectl("delete", "namespace", *names, "--wait=false")


def test_in_cluster_mode_the_operator_makes_pods_anywhere_and_reads_no_secret(
    release: Release, teams: tuple[str, str]
) -> None:
    release.install()
    plane, user = release.plane, f"system:serviceaccount:{release.namespace}:{NAME}"
    for team in teams:
        assert allowed(plane, user, "create", "pods", team)
        assert allowed(plane, user, "patch", "cptjobs/status", team, JOBS)
        for verb in ("get", "list", "watch"):
            assert not allowed(plane, user, verb, "secrets", team)
        assert not allowed(plane, user, "create", "pods/exec", team)
        assert not allowed(plane, user, "patch", "cptjobs", team, JOBS)
    assert allowed(plane, user, "watch", "nodes", "")
    assert not allowed(plane, user, "patch", "nodes", "")


def test_in_namespaced_mode_the_operator_has_no_right_elsewhere_but_to_read_nodes(
    release: Release, teams: tuple[str, str]
) -> None:
    watched, other = teams
    release.install({"settings": {"watchedNamespaces": [watched]}})
    plane, user = release.plane, f"system:serviceaccount:{release.namespace}:{NAME}"
    assert allowed(plane, user, "create", "pods", watched)
    assert allowed(plane, user, "watch", "cptjobs", watched, JOBS)
    assert not allowed(plane, user, "list", "pods", other)
    assert not allowed(plane, user, "watch", "cptjobs", other, JOBS)
    assert not allowed(plane, user, "create", "pods", release.namespace)
    assert allowed(plane, user, "watch", "nodes", "")


def test_who_may_edit_a_namespace_may_write_jobs_there_and_who_may_view_it_may_read_them(
    release: Release, teams: tuple[str, str]
) -> None:
    release.install()
    plane, (team, other) = release.plane, teams
    for role in ("edit", "view"):
        binding = f"{role}or"
        plane.kubectl(
            "create",
            "rolebinding",
            binding,
            f"--clusterrole={role}",
            f"--user={role}or",
            "-n",
            team,
        )
    # The controller manager adds the rules up a moment later.
    plane.wait(lambda: allowed(plane, "viewor", "watch", "cptjobs", team, JOBS), "the roles")
    plane.wait(lambda: allowed(plane, "editor", "create", "cptjobs", team, JOBS), "the roles")
    assert allowed(plane, "editor", "patch", "cptjobs/scale", team, JOBS)
    assert allowed(plane, "editor", "list", "cptjobs", team, JOBS)
    assert not allowed(plane, "editor", "patch", "cptjobs/status", team, JOBS)
    assert not allowed(plane, "editor", "create", "cptjobs", other, JOBS)
    assert not allowed(plane, "viewor", "create", "cptjobs", team, JOBS)
