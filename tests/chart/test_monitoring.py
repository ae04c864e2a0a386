"""What the chart makes for Prometheus, judged by Prometheus' own definitions and promtool."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from figures import of_an_operator
from figures import series as series_of
from helmchart import NAMESPACE, Helm, HelmError, Object
from testplane import binaries, definitions
from testplane.plane import ControlPlane, KubectlError

EVERY: dict[str, Any] = {
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "jobPodMonitor": {"enabled": True},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
    }
}
# In place of the ServiceMonitor.
BY_POD = {"metrics": EVERY["metrics"] | {"serviceMonitor": {}, "podMonitor": {"enabled": True}}}
WATCHED = {"settings": {"watchedNamespaces": ["default", "team"]}}
KINDS = ("ServiceMonitor", "PodMonitor", "PrometheusRule")
# What Prometheus adds to each series of an operator.
TARGET = f'namespace="{NAMESPACE}",pod="cptjob-operator-5d9-{{}}"'


@pytest.fixture(scope="module", name="monitored")
def install_definitions(plane: ControlPlane) -> Iterator[ControlPlane]:
    """A cluster with the definitions of the Prometheus operator, and the release's namespace."""
    with definitions.installed(plane, ["monitoring"]):
        plane.kubectl("create", "namespace", NAMESPACE)
        yield plane
        plane.kubectl("delete", "namespace", NAMESPACE)


def try_out(plane: ControlPlane, found: Object) -> None:
    """Raises KubectlError with what the API server has against it."""
    how = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    plane.kubectl(*how, stdin=yaml.safe_dump(found))


@pytest.mark.parametrize("more", [{}, WATCHED], ids=["cluster", "namespaced"])
def test_the_definitions_of_the_prometheus_operator_take_every_object(
    monitored: ControlPlane, helm: Helm, more: Mapping[str, Any]
) -> None:
    for values, kinds in (EVERY, sorted(KINDS)), (BY_POD, ["PodMonitor"] * 2 + ["PrometheusRule"]):
        found = [each for each in helm.template(values | more) if each["kind"] in KINDS]
        assert sorted(each["kind"] for each in found) == sorted(kinds)
        for each in found:
            try_out(monitored, each)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_definitions_refuse_a_field_that_is_none_of_theirs(
    monitored: ControlPlane, helm: Helm, kind: str
) -> None:
    found = next(each for each in helm.template(EVERY) if each["kind"] == kind)
    found["spec"]["intervall"] = "30s"
    with pytest.raises(KubectlError, match="intervall"):
        try_out(monitored, found)


# --- alerts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="promtool")
def find_promtool(report: binaries.Report) -> Path:
    return binaries.find(["promtool"], report)["promtool"]


@pytest.fixture(scope="module", name="groups")
def make_groups(helm: Helm) -> Object:
    """The alerts as a file of rules has them."""
    spec: Object = helm.template(EVERY).one("PrometheusRule")["spec"]
    return spec


def alerts(groups: Object) -> dict[str, Object]:
    return {rule["alert"]: rule for group in groups["groups"] for rule in group["rules"]}


def ask(promtool: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)


def test_promtool_finds_no_fault_in_the_alerts(
    promtool: Path, groups: Object, tmp_path: Path
) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(groups))
    checked = ask(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(file))
    assert checked.returncode == 0, checked.stderr
    assert f"SUCCESS: {len(alerts(groups))} rules found" in checked.stdout


def test_each_alert_asks_for_figures_that_exist_and_says_what_to_do(groups: Object) -> None:
    known = series_of(of_an_operator())
    for rule in alerts(groups).values():
        asked = re.findall(r"(cptjob_\w+)\{([^}]*)\}", rule["expr"])
        assert asked
        for name, selector in asked:
            labels = set(re.findall(r'(\w+)=~?"', selector))
            assert labels <= known[name] | {"namespace", "pod"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


Series = dict[str, str]


def series(name: str, values: str, pod: str = "a", **labels: str) -> Series:
    more = "".join(f',{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{TARGET.format(pod)}{more}}}", "values": values}


def operator(pod: str, leads: int, failed: str = "3x180", **more: str) -> list[Series]:
    """Three hours of an operator that has nothing to complain of, one sample a minute."""
    passes = "cptjob_reconcile_duration_seconds_count"
    return [
        series("cptjob_leader", f"{leads}x180", pod),
        series(
            "cptjob_watch_age_seconds", more.get("watch", "0+60x4 0+60x4 0x180"), pod, kind="Pod"
        ),
        series(passes, "0+60x180", pod, outcome="unchanged"),
        series(passes, more.get("errors", "0+1x180"), pod, outcome="error"),
        series("cptjob_jobs", failed, pod, phase="Failed"),
        series("cptjob_gpu_seconds_total", "0+3600x180", pod),
        series("cptjob_lost_gpu_seconds_total", more.get("lost", "0+60x180"), pod),
    ]


OTHERS = [
    each | {"series": each["series"].replace(NAMESPACE, "other")} for each in operator("a", 0)
]
CALM = [*operator("a", 1), *operator("b", 0, failed="0x9 3x171")]
CASES: dict[str, list[Series]] = {
    "CPTJobOperatorDown": [],
    "CPTJobOperatorWithoutLeader": [*operator("a", 0), *operator("b", 0)],
    "CPTJobOperatorWatchStale": operator("a", 1, watch="0+60x180"),
    "CPTJobOperatorErrors": operator("a", 1, errors="0+20x180"),
    "CPTJobFailed": operator("a", 1, failed="3x100 5x80"),
    "CPTJobGpuTimeLost": operator("a", 1, lost="0+1200x180"),
}


def firing(promtool: Path, groups: Object, given: list[Series], folder: Path) -> set[str]:
    """The alerts that fire after two hours and a half of these series."""
    rules, tests = folder / "rules.yaml", folder / "tests.yaml"
    rules.write_text(yaml.safe_dump(groups))
    # Without an alert that is expected, promtool names those that fire.
    cases = [{"eval_time": "150m", "alertname": name, "exp_alerts": []} for name in alerts(groups)]
    test = {"interval": "1m", "input_series": given, "alert_rule_test": cases}
    tests.write_text(
        yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]})
    )
    done = ask(promtool, "test", "rules", str(tests))
    assert ("SUCCESS" in done.stdout) == (done.returncode == 0), done.stdout + done.stderr
    return set(re.findall(r"alertname: ?(\w+), time", done.stdout + done.stderr))


def test_every_alert_has_a_case(groups: Object) -> None:
    assert alerts(groups).keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_an_alert_fires_when_it_should_and_no_other_does(
    name: str, promtool: Path, groups: Object, tmp_path: Path
) -> None:
    given = CASES[name] + OTHERS
    assert firing(promtool, groups, given, tmp_path) == {name}


def test_no_alert_fires_over_operators_that_are_well_or_have_just_begun(
    promtool: Path, groups: Object, tmp_path: Path
) -> None:
    assert firing(promtool, groups, CALM + OTHERS, tmp_path) == set()


def test_alerts_without_figures_are_refused(helm: Helm) -> None:
    with pytest.raises(HelmError, match=r"set metrics\.serviceMonitor\.enabled or"):
        helm.template({"metrics": {"rules": {"enabled": True}}})
