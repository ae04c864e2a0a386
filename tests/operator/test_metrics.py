"""What the operator tells Prometheus."""

from cptjob_operator.edge.cache import Cache
from cptjob_operator.identity import JobKey
from cptjob_operator.metrics import State
from cptjob_operator.queue import Queue


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
