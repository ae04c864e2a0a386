"""What the operator tells Prometheus."""

from datetime import UTC, datetime, timedelta
from typing import Any

from cptjob_operator.edge.cache import Cache
from cptjob_operator.identity import JobKey
from cptjob_operator.metrics import Metrics, State
from cptjob_operator.queue import Queue


def test_restarts_of_every_cause_begin_at_zero_so_that_a_rate_sees_the_first() -> None:
    text = Metrics().text().decode()
    for cause in ("Deleted", "NodeLost", "OutOfMemory", "Vanished"):
        assert f'cptjob_restarts_total{{cause="{cause}"}} 0.0' in text


def _figures(leads: bool) -> dict[str, float]:
    now = 0.0
    queue = Queue(clock=lambda: now)
    queue.add(JobKey("team", "job"))
    now = 3600.0
    state = State(Cache(), queue, lambda: leads, dict)
    return {each.name: each.value for metric in state.collect() for each in metric.samples}


def test_no_job_waits_for_an_operator_that_does_not_lead() -> None:
    names = ("cptjob_leader", "cptjob_queue_depth", "cptjob_queue_age_seconds")
    assert [_figures(leads=True)[name] for name in names] == [1.0, 1.0, 3600.0]
    assert [_figures(leads=False)[name] for name in names] == [0.0, 0.0, 0.0]


def _avoided(*statuses: dict[str, Any]) -> float:
    """Nodes that jobs of these statuses avoid, as Prometheus hears."""
    cache = Cache()
    for number, status in enumerate(statuses):
        about = {"namespace": "team", "name": f"job-{number}", "uid": f"uid-{number}"}
        cache.put_job({"metadata": about | {"resourceVersion": "1"}, "spec": {}, "status": status})
    (found,) = [
        each.value
        for metric in State(cache, Queue(), lambda: True, dict).collect()
        for each in metric.samples
        if each.name == "cptjob_excluded_nodes"
    ]
    return found


def test_a_node_counts_as_avoided_until_its_time_or_the_jobs_is_over() -> None:
    now = datetime.now(UTC)
    later, before = (now + timedelta(hours=sign) for sign in (1, -1))
    node = {"reason": "boom", "failures": 1}
    nodes = [
        node | {"name": "a", "until": later.isoformat()},
        node | {"name": "b", "until": before.isoformat()},
        node | {"name": "c"},
    ]
    assert _avoided({"phase": "Running", "excludedNodes": nodes}, {"phase": "Running"}) == 2
    assert _avoided({"phase": "Running", "excludedNodes": nodes[1:2]}) == 0
    for end in ("Complete", "Failed"):
        assert _avoided({"phase": end, "excludedNodes": nodes}) == 0
    unreadable = [{"name": 3}, {"name": "d"}]
    assert _avoided({"phase": "Running", "excludedNodes": unreadable}) == 2
