"""Figures about the operator and its jobs, for Prometheus."""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import TypeAdapter, ValidationError

from cptjob_api.conditions import Phase
from cptjob_api.status import CPTJobStatus
from cptjob_operator.edge.cache import Cache, Job
from cptjob_operator.plan.outcomes import Cause
from cptjob_operator.queue import Queue

_STATUS = TypeAdapter(CPTJobStatus)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)


class Metrics:
    """Counters that the operator's parts move, each in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # they double the lines and are never looked at
        self.registry = CollectorRegistry()
        self.passes = Histogram(
            "cptjob_reconcile_duration_seconds",
            "Time of one pass over a job, by what came of it.",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.calls = Counter(
            "cptjob_api_calls",
            "Requests to the API server, by verb, kind and status code.",
            ["verb", "kind", "code"],
            registry=self.registry,
        )
        self.call_seconds = Histogram(
            "cptjob_api_call_duration_seconds",
            "Time until the API server answered, by verb.",
            ["verb"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.restarts = Counter(
            "cptjob_restarts",
            "Restarts of jobs, by cause.",
            ["cause"],
            registry=self.registry,
        )
        for cause in get_args(Cause):  # of a counter that begins with 1, no rate is seen
            self.restarts.labels(cause)
        self.gpu_seconds = Counter(
            "cptjob_gpu_seconds", "GPU time that jobs held.", registry=self.registry
        )
        self.lost_gpu_seconds = Counter(
            "cptjob_lost_gpu_seconds",
            "GPU time that trained what was lost, or did not train.",
            registry=self.registry,
        )
        self.pulls = Counter(
            "cptjob_progress_pulls",
            "Reads of coordinators' progress, by what came of it.",
            ["outcome"],
            registry=self.registry,
        )

    def called(self, verb: str, kind: str, code: str, seconds: float) -> None:
        """One request to the API server."""
        self.calls.labels(verb, kind, code).inc()
        self.call_seconds.labels(verb).observe(seconds)

    def reported(self, before: CPTJobStatus | None, after: CPTJobStatus) -> None:
        """A status that was written: the GPU time since the one before."""
        was = before or CPTJobStatus()
        self.gpu_seconds.inc(max(0, after.gpu_seconds - was.gpu_seconds))
        self.lost_gpu_seconds.inc(max(0, after.lost_gpu_seconds - was.lost_gpu_seconds))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class State(Collector):
    """What is so at the moment that Prometheus asks."""

    def __init__(
        self,
        cache: Cache,
        queue: Queue,
        leads: Callable[[], bool],
        watch_ages: Callable[[], Mapping[str, float]],
    ) -> None:
        self._cache, self._queue, self._leads, self._watch_ages = cache, queue, leads, watch_ages

    def collect(self) -> Iterable[Metric]:
        phases = Tally(job.phase for job in self._cache.jobs.values())
        jobs = GaugeMetricFamily("cptjob_jobs", "Jobs, by phase.", labels=["phase"])
        for phase in Phase:
            jobs.add_metric([phase], phases[phase])
        jobs.add_metric([""], phases[""])
        yield jobs
        now = datetime.now(UTC)
        excluded = sum(_avoids(job, now) for job in self._cache.jobs.values())
        yield _gauge("excluded_nodes", "Nodes that jobs avoid, counted by job.", excluded)
        leads = self._leads()  # for one that does not lead, no job waits
        depth, age = (self._queue.depth(), self._queue.age()) if leads else (0, 0.0)
        yield _gauge("queue_depth", "Jobs that are due for a pass.", depth)
        yield _gauge("queue_age_seconds", "Longest wait of a job for its pass.", age)
        yield _gauge("passes_active", "Passes under way.", self._queue.active)
        yield _gauge("leader", "1 on the operator that acts.", float(leads))
        ages = GaugeMetricFamily(
            "cptjob_watch_age_seconds",
            "Time since the stalest watch of a kind was heard of.",
            labels=["kind"],
        )
        for kind, seconds in self._watch_ages().items():
            ages.add_metric([kind], seconds)
        yield ages


def _avoids(job: Job, now: datetime) -> int:
    """How many nodes: what stays in the status when their time or the job's is over is history."""
    if not job.excluded or job.phase in (Phase.COMPLETE, Phase.FAILED):
        return 0
    try:
        known = _STATUS.validate_json(job.parts.status, by_alias=True, by_name=False).excluded_nodes
    except ValidationError:
        return job.excluded
    return sum(each.until is None or each.until > now for each in known)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"cptjob_{name}", text, value=value)
