"""The figures that operators and coordinators serve, taken from their own registries."""

from collections.abc import Iterable
from datetime import UTC, datetime

from prometheus_client.core import Metric

from cptjob_operator.edge.cache import Cache
from cptjob_operator.metrics import Metrics, State
from cptjob_operator.queue import Queue
from cptjob_trainer.training import progress


def of_an_operator() -> list[Metric]:
    """Every figure of an operator, with a sample each."""
    metrics = Metrics()
    metrics.registry.register(State(Cache(), Queue(), lambda: True, lambda: {"Pod": 0.0}))
    metrics.called("get", "Pod", "200", 0.1)
    metrics.passes.labels("changed").observe(0.1)
    metrics.restarts.labels("cause").inc()
    metrics.pulls.labels("ok").inc()
    return list(metrics.registry.collect())


def of_a_coordinator() -> list[Metric]:
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
    return list(progress._MetricsCollector(lambda: told).collect())


def series(metrics: Iterable[Metric]) -> dict[str, set[str]]:
    """Labels of every series, by its name."""
    return {sample.name: set(sample.labels) for metric in metrics for sample in metric.samples}


def tables() -> str:
    """Both as Markdown."""
    return (
        f"Of an operator:\n\n{_table(of_an_operator())}\n"
        "Of a job's coordinator; `metrics.jobPodMonitor` adds the label `cptjob`, the job's name:\n\n"
        f"{_table(of_a_coordinator())}"
    )


def _table(metrics: Iterable[Metric]) -> str:
    lines = ["| Figure | Type | Labels | Meaning |", "|---|---|---|---|"]
    for each in sorted(metrics, key=lambda metric: metric.name):
        name = f"{each.name}_total" if each.type == "counter" else each.name
        labels = {label for sample in each.samples for label in sample.labels} - {"le"}
        named = ", ".join(f"`{label}`" for label in sorted(labels))
        sentence = each.documentation.rstrip(".")
        lines.append(f"| `{name}` | {each.type} | {named} | {sentence}. |")
    return "\n".join(lines) + "\n"
