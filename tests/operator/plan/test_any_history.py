"""Whatever happens, in whatever order: no pass fails, no pod is made twice, and it comes to rest."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cptjob_api.conditions import Condition, Phase
from cptjob_operator.identity import Role
from cptjob_operator.observed import Claim

MakeWorld = Callable[..., Any]

HISTORIES = 150
LENGTH = 60


def _anything(job: Any, dice: random.Random) -> None:
    """One thing that a kubelet, a scheduler, a person or time may do."""
    pods = list(job.pods.values())
    pod = dice.choice(pods) if pods else None
    what = dice.randrange(14)
    if what == 0:
        job.wait(dice.choice([1, 20, 130, 1000]))
    elif what == 1:
        job.edit(suspend=dice.random() < 0.5)
    elif what == 2:
        job.edit(trainer={"numNodes": dice.randint(1, 4)})
    elif what == 3:
        job.refused = {"Pod": "exceeded quota"} if dice.random() < 0.5 else {}
    elif what == 4:
        job.checkpoint(dice.randrange(100))
    elif pod is None:
        return
    elif what in (5, 6, 7) and pod.active:
        job.get_ready(pod)
    elif what == 8 and pod.active:
        codes = [1, 70, 137, 143] + ([65] if dice.random() < 0.1 else [])
        job.fail(pod, dice.choice(codes))
    elif what == 9:
        job.vanish(pod)
    elif what == 10 and pod.active:
        job.take_away(pod)
    elif what == 11 and pod.active and pod.role is Role.WORKER and dice.random() < 0.1:
        job.succeed(pod)
    elif what == 12 and pod.active:
        job.change(pod, unschedulable=dice.choice([None, "no nodes"]))
    elif what == 13 and pod.deleting:
        del job.pods[pod.id]


def _pass(job: Any, dice: random.Random) -> None:
    """A pass, whose status may have to wait; at times the operator dies in the middle of it."""
    wanted = job.plan()
    dies = dice.random()
    if dies < 0.05:
        return
    if wanted.urgent or dice.random() < 0.5:
        job.commit(wanted)
    if dies < 0.1:
        return
    if dies < 0.15:
        job.apply(replace(wanted, objects=wanted.objects[:1], deletions=wanted.deletions[:1]))
        return
    job.apply(wanted)


def _check(job: Any) -> None:
    active = [pod for pod in job.workers if pod.deleting is None]
    places = [(pod.id.attempt, pod.id.index) for pod in active]
    current = [place for place in places if job.status and place[0] == job.status.attempt]
    assert len(current) == len(set(current)), "two pods of one rank run beside one another"
    if job.status is None:
        return
    names = [each.type for each in job.status.conditions]
    assert len(names) == len(set(names))
    both = {Condition.COMPLETE, Condition.FAILED} & {
        each.type for each in job.status.conditions if each.status == "True"
    }
    assert len(both) <= 1
    assert (job.condition(Condition.STALLED) is not None) == (job.phase is Phase.FAILED)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_a_job_survives_any_history(world: MakeWorld, seed: int) -> None:
    dice = random.Random(seed)
    job = world(
        failurePolicy={"maxRestarts": dice.choice([0, 3, 1000])},
        trainer={"numNodes": dice.choice([1, 2])},
    )
    if job.spec["trainer"]["numNodes"] == 1 and dice.random() < 0.5:
        _one_node_mounts(job)  # the worker shares a node with its coordinator
    ended: Phase | None = None
    for _ in range(LENGTH):
        _anything(job, dice)
        _pass(job, dice)
        _check(job)
        if ended is not None:
            assert job.phase is ended, "an end was taken back"
        if job.phase in (Phase.COMPLETE, Phase.FAILED):
            ended = job.phase
    _bring_to_an_end(job, ended)


def _one_node_mounts(job: Any) -> None:
    names = ("models", "data", "results")
    job.claims = {name: Claim(name, ("ReadWriteOnce",)) for name in names}


def _bring_to_an_end(job: Any, ended: Phase | None) -> None:
    """With nothing more in its way, the job runs."""
    job.refused = {}
    job.edit(suspend=False)
    if job.claims is not None:
        job.edit(trainer={"numNodes": 1})  # all that its claims can serve
    for _ in range(40):
        job.wait(700)
        for pod in list(job.pods.values()):
            if pod.deleting:
                del job.pods[pod.id]
            elif pod.active:
                job.change(pod, unschedulable=None, waiting=None)
                job.get_ready(job.pods[pod.id])
        job.step()
        _check(job)
        if job.phase in (Phase.RUNNING, Phase.COMPLETE, Phase.FAILED):
            break
    assert job.phase in ((ended,) if ended else (Phase.RUNNING, Phase.COMPLETE, Phase.FAILED))
    job.settle()
    wanted = job.plan()
    assert (wanted.status, wanted.objects, wanted.deletions) == (None, (), ())
