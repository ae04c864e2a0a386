"""The Grafana dashboard: rows of panels, each a question and the expressions that answer it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_HEIGHT, _WIDTH, _COLUMNS = 8, 8, 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """A graph. lines: legend -> PromQL. unit: as Grafana names it."""

    title: str
    lines: dict[str, str]
    unit: str = "short"
    description: str = ""


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def _quantile(quantile: float, metric: str, by: str = "") -> str:
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({quantile}, {_rate(f'{metric}_bucket', groups)})"


def _job(metric: str, by: str = "", of: str = "") -> str:
    """Of each job that is chosen above: one coordinator a job, but for the moment of its change."""
    chosen = ", ".join(filter(None, ('namespace=~"$namespace"', 'cptjob=~"$cptjob"', of)))
    groups = ", ".join(filter(None, ("namespace", "cptjob", by)))
    return f"max by ({groups}) ({metric}{{{chosen}}})"


_JOB = "{{namespace}}/{{cptjob}}"
_LOSS = 'name=~"loss|heldout.*"'
# Every operator watches and only one acts: what each of them knows is taken once.
ROWS: dict[str, tuple[Panel, ...]] = {
    "Jobs": (
        Panel("Jobs by phase", {"{{phase}}": "max by (phase) (cptjob_jobs)"}),
        Panel(
            "Restarts by cause",
            {"{{cause}}": "sum by (cause) (increase(cptjob_restarts_total[$__rate_interval]))"},
        ),
        Panel("Nodes that jobs avoid", {"nodes": "max(cptjob_excluded_nodes)"}),
        Panel(
            "GPUs in use",
            {
                "held": "sum(rate(cptjob_gpu_seconds_total[$__rate_interval]))",
                "lost": "sum(rate(cptjob_lost_gpu_seconds_total[$__rate_interval]))",
            },
            description="GPU-seconds a second: held by jobs, and of those the ones that trained "
            "what was lost or did not train.",
        ),
    ),
    "Training": (
        Panel("Progress", {_JOB: _job("cptjob_progress_ratio")}, "percentunit"),
        Panel("Step", {_JOB: _job("cptjob_step")}),
        Panel("Time left", {_JOB: _job("cptjob_estimated_remaining_seconds")}, "s"),
        Panel("Loss", {f"{_JOB} {{{{name}}}}": _job("cptjob_metric", "name", _LOSS)}),
        Panel("Tokens per second", {_JOB: _job("cptjob_tokens_per_second")}),
        Panel(
            "Model FLOPs utilisation",
            {_JOB: _job("cptjob_metric", of='name="mfu"')},
            "percentunit",
            "Achieved over peak, where the device's peak is known.",
        ),
        Panel("Wait for data in a step", {_JOB: _job("cptjob_metric", of='name="dataWait"')}, "s"),
        Panel("Learning rate", {_JOB: _job("cptjob_metric", of='name="learningRate"')}, "sci"),
        Panel("Norm of the gradient", {_JOB: _job("cptjob_metric", of='name="gradNorm"')}),
        Panel(
            "Age of the last checkpoint",
            {_JOB: f"time() - {_job('cptjob_checkpoint_timestamp_seconds')}"},
            "s",
        ),
        Panel(
            "Silence of the trainers",
            {_JOB: f"time() - {_job('cptjob_last_update_timestamp_seconds')}"},
            "s",
        ),
    ),
    "Operator": (
        Panel(
            "Passes by outcome",
            {"{{outcome}}": _rate("cptjob_reconcile_duration_seconds_count", "outcome")},
            "ops",
        ),
        Panel(
            "Time of a pass",
            {
                "p50": _quantile(0.5, "cptjob_reconcile_duration_seconds"),
                "p99": _quantile(0.99, "cptjob_reconcile_duration_seconds"),
            },
            "s",
        ),
        Panel(
            "Queue",
            {
                "due": "sum(cptjob_queue_depth)",
                "under way": "sum(cptjob_passes_active)",
            },
        ),
        Panel("Longest wait in the queue", {"age": "max(cptjob_queue_age_seconds)"}, "s"),
        Panel(
            "Requests to the API server",
            {"{{verb}} {{kind}} {{code}}": _rate("cptjob_api_calls_total", "verb, kind, code")},
            "reqps",
        ),
        Panel(
            "Time of a request (p99)",
            {"{{verb}}": _quantile(0.99, "cptjob_api_call_duration_seconds", "verb")},
            "s",
        ),
        Panel(
            "Age of the stalest watch",
            {"{{pod}} {{kind}}": "max by (pod, kind) (cptjob_watch_age_seconds)"},
            "s",
        ),
        Panel("Leader", {"{{pod}}": "max by (pod) (cptjob_leader)"}),
        Panel(
            "Reads of progress", {"{{outcome}}": _rate("cptjob_progress_pulls_total", "outcome")}
        ),
    ),
}


def text() -> str:
    """The dashboard as JSON."""
    return json.dumps(dashboard(), indent=2) + "\n"


def dashboard() -> dict[str, Any]:
    return {
        "uid": "cptjob",
        "title": "CPTJob",
        "tags": ["cptjob"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "1m",
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "type": "datasource",
                    "query": "prometheus",
                    "label": "Data source",
                },
                _choice("namespace", "Namespace", "label_values(cptjob_step, namespace)"),
                _choice(
                    "cptjob",
                    "CPTJob",
                    'label_values(cptjob_step{namespace=~"$namespace"}, cptjob)',
                ),
            ]
        },
        "panels": list(_panels()),
    }


def _choice(name: str, label: str, query: str) -> dict[str, Any]:
    """A list at the top, of which one picks several, or all as at the beginning."""
    return {
        "name": name,
        "type": "query",
        "label": label,
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # with the time range
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels() -> Iterator[dict[str, Any]]:
    top, number = 0, 0
    for name, panels in ROWS.items():
        number += 1
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": name, "gridPos": place, "panels": []}
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            row, column = divmod(index, _COLUMNS // _WIDTH)
            yield _graph(panel, number, column * _WIDTH, top + row * _HEIGHT)
        top += -(-len(panels) // (_COLUMNS // _WIDTH)) * _HEIGHT


def _graph(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": {"x": left, "y": top, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(panel.lines.items())
        ],
    }
