"""What the chart makes of values, read as objects."""

import hashlib
import json
import re
from collections.abc import Iterator

import pytest
import yaml

from cptjob_api import crd
from helmchart import CHART, MANIFESTS, NAME, NAMESPACE, Helm, Object, Rendered, Values, manifests

ALWAYS = {
    "ClusterRole",
    "ClusterRoleBinding",
    "ConfigMap",
    "CustomResourceDefinition",
    "Deployment",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Role",
    "RoleBinding",
    "Service",
    "ServiceAccount",
}
EVERYTHING: Values = {
    "imagePullSecrets": [{"name": "registry"}],
    "settings": {"watchedNamespaces": ["team-a", "team-b"]},
    "serviceAccount": {"annotations": {"example.com/role": "cptjob"}},
    "metrics": {
        "service": {"annotations": {"example.com/scrape": "true"}},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "jobPodMonitor": {"enabled": True, "interval": "1m"},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Training"}},
    "commonLabels": {"team": "platform"},
    "podLabels": {"tier": "control"},
    "podAnnotations": {"example.com/note": "yes"},
    "env": [
        {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "token"}}},
    ],
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "networkPolicy": {
        "extraIngress": [{"ports": [{"port": 1}]}],
        "extraEgress": [{"ports": [{"port": 2}]}],
    },
}


@pytest.mark.parametrize("values", [{}, EVERYTHING, {"settings": {"pools": {"big": {}}}}], ids=len)
def test_helm_finds_no_fault(values: Values, helm: Helm) -> None:
    assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART), values=values)


def test_by_default_there_is_what_every_cluster_has(helm: Helm) -> None:
    assert helm.template().kinds == ALWAYS


@pytest.mark.parametrize(
    ("values", "gone"),
    [
        ({"crds": {"enabled": False}}, {"CustomResourceDefinition"}),
        ({"serviceAccount": {"create": False, "name": "mine"}}, {"ServiceAccount"}),
        ({"podDisruptionBudget": {"enabled": False}}, {"PodDisruptionBudget"}),
        ({"replicas": 1}, {"PodDisruptionBudget"}),
        ({"networkPolicy": {"enabled": False}}, {"NetworkPolicy"}),
        ({"metrics": {"service": {"enabled": False}}}, {"Service"}),
        (
            {"rbac": {"create": False, "aggregate": False}},
            {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"},
        ),
    ],
    ids=str,
)
def test_what_is_switched_off_is_not_there(values: Values, gone: set[str], helm: Helm) -> None:
    assert helm.template(values).kinds == ALWAYS - gone


def test_everything_together_is_rendered(helm: Helm) -> None:
    objects = helm.template(EVERYTHING)
    assert objects.kinds == ALWAYS | {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
    assert all(each["metadata"]["labels"]["team"] == "platform" for each in objects)
    pod = objects.pod()
    assert pod["priorityClassName"] == "system-cluster-critical"
    assert pod["nodeSelector"] == EVERYTHING["nodeSelector"]
    assert pod["tolerations"] == EVERYTHING["tolerations"]
    assert pod["affinity"] == EVERYTHING["affinity"]
    assert pod["topologySpreadConstraints"] == EVERYTHING["topologySpreadConstraints"]
    assert pod["imagePullSecrets"] == EVERYTHING["imagePullSecrets"]
    assert all(each in pod["containers"][0]["env"] for each in EVERYTHING["env"])
    about = objects.one("Deployment")["spec"]["template"]["metadata"]
    assert about["labels"]["tier"] == "control"
    assert about["annotations"]["example.com/note"] == "yes"
    policy = objects.one("NetworkPolicy")["spec"]
    assert policy["ingress"][-1] == {"ports": [{"port": 1}]}
    assert policy["egress"][-1] == {"ports": [{"port": 2}]}
    jobs = objects.one("PodMonitor", f"{NAME}-jobs")["spec"]
    assert jobs["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}
    assert jobs["podMetricsEndpoints"][0]["interval"] == "1m"


def test_two_objects_never_share_a_name(helm: Helm) -> None:
    names = [
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"])
        for each in helm.template(EVERYTHING)
    ]
    assert len(names) == len(set(names))


def test_every_object_that_has_a_namespace_is_in_the_releases_or_in_a_watched_one(
    helm: Helm,
) -> None:
    spaces = {each["metadata"].get("namespace") for each in helm.template(EVERYTHING)}
    assert spaces == {None, NAMESPACE, "team-a", "team-b"}


def test_a_long_release_name_still_makes_names_that_fit(helm: Helm) -> None:
    for each in helm.template(EVERYTHING, name="a" * 53):
        if each["kind"] != "CustomResourceDefinition":
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", each["metadata"]["name"])


def test_of_two_releases_of_one_name_no_object_without_a_namespace_is_the_same(
    helm: Helm,
) -> None:
    def shared(namespace: str) -> set[tuple[str, str]]:
        values = {"crds": {"enabled": False}}
        return {
            (each["kind"], each["metadata"]["name"])
            for each in helm.template(values, namespace=namespace)
            if "namespace" not in each["metadata"]
        }

    assert shared("one")
    assert not shared("one") & shared("two")


# --- the pods -------------------------------------------------------------------------------------


def test_the_operator_runs_with_as_few_rights_as_a_pod_can_have(helm: Helm) -> None:
    pod = helm.template().pod()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert container["resources"]["limits"].keys() == {"memory"}
    assert not any("hostPath" in each for each in pod["volumes"])


def test_what_was_wrong_at_the_start_stands_in_the_pods_status(helm: Helm) -> None:
    (container,) = helm.template().pod()["containers"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_probes_ask_where_the_operator_answers(helm: Helm) -> None:
    (container,) = helm.template({"settings": {"serving": {"probePort": 7777}}}).pod()["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness")}
    assert probes == {
        "liveness": {"path": "/healthz", "port": 7777},
        "readiness": {"path": "/readyz", "port": 7777},
    }
    assert {each["containerPort"] for each in container["ports"]} == {9400, 7777}


def test_one_port_for_everything_is_named_once(helm: Helm) -> None:
    serving = {"metricsPort": 9000, "probePort": 9000}
    (container,) = helm.template({"settings": {"serving": serving}}).pod()["containers"]
    assert [each["containerPort"] for each in container["ports"]] == [9000]


def test_a_change_of_the_settings_starts_the_operators_anew_and_nothing_else_does(
    helm: Helm,
) -> None:
    def checksum(values: Values) -> str:
        about = helm.template(values).one("Deployment")["spec"]["template"]["metadata"]
        value: str = about["annotations"]["checksum/settings"]
        return value

    first = helm.template()
    assert checksum({}) == hashlib.sha256(first.settings().rstrip("\n").encode()).hexdigest()
    assert checksum({"replicas": 3}) == checksum({})
    assert checksum({"settings": {"limits": {"maxNodes": 8}}}) != checksum({})


def test_the_operators_stand_on_different_nodes_and_in_different_zones_where_they_can(
    helm: Helm,
) -> None:
    objects = helm.template()
    pod, selector = objects.pod(), objects.one("Deployment")["spec"]["selector"]
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"
    assert spread["labelSelector"] == selector
    ((how, (preferred,)),) = pod["affinity"]["podAntiAffinity"].items()
    assert how == "preferredDuringSchedulingIgnoredDuringExecution"
    assert preferred["podAffinityTerm"]["topologyKey"] == "topology.kubernetes.io/zone"
    assert preferred["podAffinityTerm"]["labelSelector"] == selector


def test_services_and_policies_select_the_operators_pods(helm: Helm) -> None:
    objects = helm.template()
    deployment = objects.one("Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        objects.one("Service")["spec"]["selector"],
        objects.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        objects.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)


def test_the_network_policy_lets_in_the_monitoring_namespace_of_the_settings(helm: Helm) -> None:
    def sources(name: str | None) -> list[Object]:
        network = {"monitoringNamespace": name}
        spec = helm.template({"settings": {"network": network}}).one("NetworkPolicy")["spec"]
        return [each["from"] for each in spec["ingress"] if "from" in each]

    ((source,),) = sources("observability")
    named = source["namespaceSelector"]["matchLabels"]
    assert named == {"kubernetes.io/metadata.name": "observability"}
    assert sources(None) == []


def test_the_operator_may_reach_coordinators_where_it_looks_after_jobs(helm: Helm) -> None:
    def spaces(watched: list[str]) -> Object:
        objects = helm.template({"settings": {"watchedNamespaces": watched}})
        (peer,) = (each for each in objects.one("NetworkPolicy")["spec"]["egress"] if "to" in each)
        assert peer["ports"] == [{"protocol": "TCP", "port": 9400}]
        selector: Object = peer["to"][0]["namespaceSelector"]
        return selector

    assert spaces([]) == {}
    assert spaces(["a", "b"])["matchExpressions"][0]["values"] == ["a", "b"]


# --- rights ---------------------------------------------------------------------------------------


def rules(objects: Rendered) -> Iterator[tuple[str, Object]]:
    """(where, rule) of everything that is bound to the operator."""
    roles = {
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]): each["rules"]
        for each in objects
        if each["kind"] in ("Role", "ClusterRole")
    }
    for binding in objects:
        if binding["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            where = binding["metadata"].get("namespace")
            reference = binding["roleRef"]
            assert binding["subjects"] == [
                {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}
            ]
            for rule in roles[reference["kind"], where, reference["name"]]:
                yield where or "*", rule


MODES = {"cluster": [], "namespaced": ["team-a", "team-b"]}


@pytest.mark.parametrize("watched", MODES.values(), ids=MODES)
def test_no_right_goes_too_far(watched: list[str], helm: Helm) -> None:
    found = list(rules(helm.template({"settings": {"watchedNamespaces": watched}})))
    assert len(found) > 10
    for _, rule in found:
        assert "*" not in json.dumps(rule)
        (resource,) = rule["resources"]
        assert resource not in {"secrets", "pods/exec", "pods/attach", "pods/portforward"}
        assert resource not in {"serviceaccounts", "serviceaccounts/token", "namespaces"}
        if resource == "nodes":
            assert set(rule["verbs"]) <= {"get", "list", "watch"}
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_in_namespaced_mode_there_are_rights_in_those_namespaces_and_to_read_nodes(
    helm: Helm,
) -> None:
    objects = helm.template({"settings": {"watchedNamespaces": ["team-a", "team-b"]}})
    where: dict[str, set[str]] = {}
    for place, rule in rules(objects):
        where.setdefault(place, set()).update(rule["resources"])
    assert where.keys() == {"*", NAMESPACE, "team-a", "team-b"}
    assert where["*"] == {"nodes"}
    assert where[NAMESPACE] == {"leases"}
    assert where["team-a"] == where["team-b"]


def test_both_modes_give_the_same_rights_over_jobs(helm: Helm) -> None:
    def over_jobs(watched: list[str], place: str) -> list[Object]:
        objects = helm.template({"settings": {"watchedNamespaces": watched}})
        return [
            rule for where, rule in rules(objects) if where == place and "nodes" not in str(rule)
        ]

    assert over_jobs([], "*") == over_jobs(["team-a"], "team-a") != []


def test_the_right_to_the_lease_is_for_the_lease_of_the_settings(helm: Helm) -> None:
    objects = helm.template({"settings": {"leader": {"name": "mine"}}})
    leases = [rule for _, rule in rules(objects) if rule["resources"] == ["leases"]]
    assert {tuple(rule["verbs"]): rule.get("resourceNames") for rule in leases} == {
        ("create",): None,
        ("get", "update"): ["mine"],
    }


# --- the definition, the dashboard, the manifests -------------------------------------------------


def test_the_chart_has_the_definition_that_the_types_make(helm: Helm) -> None:
    found = helm.template().one("CustomResourceDefinition")
    assert found["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    found["metadata"].pop("labels")
    assert found == yaml.safe_load(crd.text())


def test_the_definition_goes_with_the_release_where_that_is_asked_for(helm: Helm) -> None:
    found = helm.template({"crds": {"keep": False}}).one("CustomResourceDefinition")
    assert "annotations" not in found["metadata"]


def test_the_dashboard_is_valid_and_labelled_for_grafana(helm: Helm) -> None:
    found = helm.template({"dashboard": {"enabled": True}}).one("ConfigMap", f"{NAME}-dashboard")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["cptjob.json"])["uid"] == "cptjob"


def test_the_plain_manifests_are_what_the_chart_makes(helm: Helm) -> None:
    assert MANIFESTS.read_text("utf-8") == manifests(helm), "run `make manifests`"
