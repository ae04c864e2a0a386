"""The Grafana dashboard speaks of figures that exist."""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime

import pytest
from prometheus_client.core import Metric

from cptjob_operator.edge.cache import Cache
from cptjob_operator.metrics import Metrics, State
from cptjob_operator.queue import Queue
from cptjob_trainer import progress
from helmchart import CHART

DASHBOARD = json.loads((CHART / "dashboards" / "cptjob.json").read_text("utf-8"))
EXPRESSIONS = [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
]
# Labels that Prometheus adds: the pod, and the job by the chart's PodMonitor.
ADDED = {"pod", "cptjob", "le"}


def of_an_operator() -> dict[str, set[str]]:
    """Labels of every series that an operator can have, by its name."""
    metrics = Metrics()
    metrics.registry.register(State(Cache(), Queue(), lambda: True, lambda: 0.0))
    metrics.called("get", "Pod", "200", 0.1)
    metrics.passes.labels("changed").observe(0.1)
    metrics.restarts.labels("cause").inc()
    metrics.pulls.labels("ok").inc()
    return _labels(metrics.registry.collect())


def of_a_coordinator() -> dict[str, set[str]]:
    """Those of a coordinator."""
    now = datetime.now(UTC)
    told = progress.Progress(
        phase="Training",
        current_step=1,
        total_steps=2,
        epoch=0.5,
        progress_percentage=50,
        estimated_remaining_seconds=1,
        tokens_per_second=1.0,
        metrics={"loss": 1.0},
        last_checkpoint=progress.CheckpointRef(step=1, time=now, uri="file:///checkpoints"),
        last_updated_time=now,
    )
    return _labels(progress._MetricsCollector(lambda: told).collect())


def _labels(metrics: Iterable[Metric]) -> dict[str, set[str]]:
    return {sample.name: set(sample.labels) for metric in metrics for sample in metric.samples}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_expression_asks_for_series_and_labels_that_exist(expression: str) -> None:
    known = of_an_operator() | of_a_coordinator()
    names = re.findall(r"\bcptjob_[a-z_]+", expression)
    assert names
    for name in names:
        assert name in known
    grouped = {
        label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")
    }
    assert grouped <= set().union(*(known[name] for name in names)) | ADDED


def test_each_legend_uses_labels_that_the_expression_keeps() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            groups = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert shown <= {label for group in groups for label in group.split(", ")}


def test_every_figure_of_the_operator_is_on_the_dashboard() -> None:
    text = " ".join(EXPRESSIONS)
    for name in of_an_operator():
        family = re.sub(r"_(bucket|count|sum|total|created)$", "", name)
        assert family in text
