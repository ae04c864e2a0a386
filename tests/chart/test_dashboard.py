"""The Grafana dashboard speaks of figures that exist."""

import json
import re

import pytest

from figures import of_a_coordinator, of_an_operator, series
from helmchart import CHART

DASHBOARD = json.loads((CHART / "dashboards" / "cptjob.json").read_text("utf-8"))
EXPRESSIONS = [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
]
# Labels that Prometheus adds: of the pod, and the job by the chart's PodMonitor.
ADDED = {"namespace", "pod", "cptjob", "le"}


def _names(expression: str) -> set[str]:
    return set(re.findall(r"\bcptjob_[a-z_]+", expression))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_expression_asks_for_series_and_labels_that_exist(expression: str) -> None:
    known = series(of_an_operator() + of_a_coordinator())
    names = _names(expression)
    assert names
    for name in names:
        assert name in known
    grouped = {
        label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")
    }
    selected = set(re.findall(r'(\w+)=~?"', expression))
    assert grouped | selected <= set().union(*(known[name] for name in names)) | ADDED


def test_jobs_of_one_name_in_two_namespaces_stay_apart() -> None:
    of_jobs = [each for each in EXPRESSIONS if series(of_a_coordinator()).keys() & _names(each)]
    assert of_jobs
    for each in of_jobs:
        assert re.search(r"by \(namespace, cptjob[,)]", each)
        assert 'namespace=~"$namespace", cptjob=~"$cptjob"' in each


def test_each_legend_uses_labels_that_the_expression_keeps() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            groups = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert shown <= {label for group in groups for label in group.split(", ")}


def test_every_figure_of_the_operator_is_on_the_dashboard() -> None:
    text = " ".join(EXPRESSIONS)
    for name in series(of_an_operator()):
        family = re.sub(r"_(bucket|count|sum|total|created)$", "", name)
        assert family in text
