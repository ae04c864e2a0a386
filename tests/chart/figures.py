"""Which figures there are: the series of an operator and of a coordinator, with their labels."""

from collections.abc import Iterable
from datetime import UTC, datetime

from prometheus_client.core import Metric

from cptjob_operator.edge.cache import Cache
from cptjob_operator.metrics import Metrics, State
from cptjob_operator.queue import Queue
from cptjob_trainer import progress


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
