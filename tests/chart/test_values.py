"""What a platform may write into the chart's values, and what helm says when it may not."""

import re
from typing import Any

import pytest
import yaml

from cptjob_operator import settings
from helmchart import CHART, NAMESPACE, Helm, HelmError, Values

# Each names the value at fault and says what is wrong with it.
BAD: list[tuple[Values, str]] = [
    ({"replcias": 3}, "'replcias' not allowed"),
    ({"replicas": 0}, "at '/replicas': minimum: got 0, want 1"),
    ({"replicas": "two"}, "at '/replicas': got string, want integer"),
    ({"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy': value must be one of"),
    ({"image": {"digest": "abc"}}, "at '/image/digest': 'abc' does not match pattern"),
    ({"image": {"repository": ""}}, "at '/image/repository': minLength: got 0, want 1"),
    ({"fullnameOverride": "Upper"}, "at '/fullnameOverride': 'Upper' does not match pattern"),
    ({"crds": {"enabled": "yes"}}, "at '/crds/enabled': got string, want boolean"),
    (
        {"settings": {"limits": {"maxNodes": 501}}},
        "at '/settings/limits/maxNodes': maximum: got 501, want 500",
    ),
    (
        {"settings": {"timing": {"resyncSecond": 5}}},
        "at '/settings/timing': additional properties 'resyncSecond' not allowed",
    ),
    (
        {"settings": {"pools": {"big": {"gpuProduct": []}}}},
        "at '/settings/pools/big': additional properties 'gpuProduct' not allowed",
    ),
    (
        {"settings": {"pools": {"big pool": {}}}},
        "at '/settings/pools': additional properties 'big pool' not allowed",
    ),
    (
        {"settings": {"pools": {"big": {"shmSize": "8 GB"}}}},
        "at '/settings/pools/big/shmSize': '8 GB' does not match pattern",
    ),
    (
        {"settings": {"pools": {"big": {"security": {"profile": "privileged"}}}}},
        "at '/settings/pools/big/security/profile': value must be one of",
    ),
    (
        {"settings": {"jobs": {"pool": 1}}},
        "at '/settings/jobs/pool': got number, want null or string",
    ),
    (
        {"settings": {"watchedNamespaces": ["Team_A"]}},
        "at '/settings/watchedNamespaces/0': 'Team_A' does not match pattern",
    ),
    ({"networkPolicy": {"apiServerPorts": []}}, "at '/networkPolicy/apiServerPorts': minItems"),
    ({"metrics": {"podMonitor": {"interval": "often"}}}, "at '/metrics/podMonitor/interval'"),
    (
        {"env": [{"name": "A", "valeu": "b"}]},
        "at '/env/0': additional properties 'valeu' not allowed",
    ),
    (
        {"tolerations": [{"key": "a", "effects": "NoSchedule"}]},
        "at '/tolerations/0': additional properties 'effects' not allowed",
    ),
    (
        {"settings": {"watchedNamespaces": ["team", "team"]}},
        "at '/settings/watchedNamespaces': items at 0 and 1 are equal",
    ),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_value_is_refused_by_name(values: Values, message: str, helm: Helm) -> None:
    with pytest.raises(HelmError) as refused:
        helm.template(values)
    assert message in str(refused.value)
    assert str(refused.value).count("- at ") == 1  # and nothing else is said


# What the schema cannot say: each alone would be installed and not work.
TOGETHER: list[tuple[Values, str]] = [
    (
        {"metrics": {"service": {"enabled": False}, "serviceMonitor": {"enabled": True}}},
        "metrics.serviceMonitor: needs metrics.service.enabled; set it, or use metrics.podMonitor",
    ),
    (
        {"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
        "metrics: serviceMonitor and podMonitor would read the same figures twice; enable one",
    ),
    (
        {"serviceAccount": {"create": False}},
        "serviceAccount.name: name the account that is there, or set serviceAccount.create",
    ),
]


@pytest.mark.parametrize(("values", "message"), TOGETHER, ids=[each for _, each in TOGETHER])
def test_values_that_do_not_go_together_are_refused_by_name(
    values: Values, message: str, helm: Helm
) -> None:
    with pytest.raises(HelmError) as refused:
        helm.template(values)
    assert f"\n{message}" in str(refused.value)


def test_all_values_that_do_not_go_together_are_told_at_once(helm: Helm) -> None:
    with pytest.raises(HelmError) as refused:
        helm.template({"serviceAccount": {"create": False}, "settings": {"jobs": {"pool": "b"}}})
    assert "settings.jobs.pool: there is no pool b; pools: default" in str(refused.value)
    assert "serviceAccount.name: name the account" in str(refused.value)


# --- settings -------------------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "watchedNamespaces": ["team-a", "team-b"],
    "jobs": {
        "image": "registry.example/trainer:2",
        "outputUri": "pvc://runs/all",
        "pool": "gold",
        "instanceGpus": {"gpu.8x": 8},
        "allowedServiceAccounts": ["trainer"],
        "schedulerName": None,
    },
    "pools": {
        "gold": {
            "labelKey": "node-restriction.kubernetes.io/pool",
            "gpuProducts": ["NVIDIA-H100-80GB-HBM3"],
            "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes"}],
            "extraResources": {"rdma/hca": 1},
            "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
            "shmSize": "64Gi",
            "security": {"profile": "baseline", "namespaces": ["team-b"]},
        },
        "silver": {"labelValue": "ag", "fsGroup": None},
    },
    "limits": {"maxNodes": 16, "maxUncountedRestarts": 100_000},
    "coordinator": {"requests": {"cpu": 0.5}},
    "timing": {"backoff": {"baseSeconds": 1.5}, "writes": {"burst": 100_000}},
    "leader": {"name": "mine", "leaseSeconds": 30},
    "network": {"monitoringNamespace": None},
    "serving": {"metricsPort": 8080, "logLevel": "DEBUG"},
}


def test_without_settings_the_operator_gets_its_defaults_and_what_the_chart_knows(
    helm: Helm,
) -> None:
    read = settings.parse(helm.template().settings())
    default = settings.Settings()
    labels = {
        "app.kubernetes.io/name": "cptjob-operator",
        "app.kubernetes.io/instance": "cptjob-operator",
    }
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert read == default.model_copy(
        update={
            "jobs": default.jobs.model_copy(update={"image": f"cptjob/trainer:{version}"}),
            "network": default.network.model_copy(
                update={"operator_labels": labels, "operator_namespace": NAMESPACE}
            ),
        }
    )


def test_the_operator_reads_the_settings_that_were_written(helm: Helm) -> None:
    read = settings.parse(helm.template({"settings": FULL}).settings())
    wanted = settings.parse(yaml.safe_dump(FULL))
    assert read.network.operator_namespace == NAMESPACE
    network = wanted.network.model_copy(
        update={
            "operator_namespace": NAMESPACE,
            "operator_labels": read.network.operator_labels,
        }
    )
    assert read == wanted.model_copy(update={"network": network})


def test_pools_of_the_platform_are_the_only_ones(helm: Helm) -> None:
    read = settings.parse(helm.template({"settings": FULL}).settings())
    assert set(read.pools) == {"gold", "silver"}
    assert read.jobs.instance_gpus == {"gpu.8x": 8}


def test_the_settings_shown_in_the_values_file_can_be_taken_as_they_are(helm: Helm) -> None:
    shown = re.findall(r"^  # ?(.*)$", (CHART / "values.yaml").read_text("utf-8"), re.MULTILINE)
    start = shown.index("watchedNamespaces: []") - 1
    text = "\n".join(shown[start : shown.index("  logLevel: INFO", start) + 1])
    read = settings.parse(text)
    assert read == settings.Settings()
    helm.template({"settings": yaml.safe_load(text)})


def test_each_value_in_the_values_file_stands_under_a_sentence() -> None:
    lines = (CHART / "values.yaml").read_text("utf-8").splitlines()
    above = ""
    found = 0
    for line in lines:
        if re.match(r"\s*[a-z][A-Za-z]*:", line) and above.strip():
            assert above.lstrip().startswith("#") or not above.strip().endswith("."), line
            found += above.lstrip().startswith("#")
        above = line
    assert found > 40


def test_a_digest_wins_over_a_tag(helm: Helm) -> None:
    digest = "sha256:" + "a" * 64
    image = {"repository": "registry.example/operator", "tag": "1", "digest": digest}
    objects = helm.template({"image": image, "trainerImage": image | {"digest": ""}})
    (container,) = objects.pod()["containers"]
    assert container["image"] == f"registry.example/operator@{digest}"
    assert settings.parse(objects.settings()).jobs.image == "registry.example/operator:1"
