"""Runs that are killed, one process or all of them, and started again: the weights are the same.

`make test` kills at chosen points, `make soak` at random moments.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

VICTIMS = ("client", "launcher", "coordinator", "workers", "all")
# In the order in which a run comes to them.
FAILPOINTS = (
    "prepare.tokenize:3",
    "checkpoint.before_publish:2",
    "checkpoint.after_publish:2",
    "checkpoint.retention:1",
    "output.model_swap:1",
)
# In the middle of the training. The client: test_run.py.
KILLED_IN_TRAINING = ("launcher", "coordinator", "workers")


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def victims(running: Any, client: int, victim: str) -> list[int]:
    found: list[int] = running.all if victim == "all" else getattr(running, victim, [])[:1]
    return found + ([client] if victim in ("client", "all") else [])


def check(job: Any, expected: str) -> None:
    """Complete, with the same weights, two checkpoints, and one line for each step."""
    job.wait_for_silence()
    assert job.weights() == expected
    # A client that is killed lets the workers save where they are; that one may be kept.
    assert len(job.checkpoints()) == 2
    assert job.checkpoints()[-1] == 12
    assert [line["step"] for line in job.metrics()] == list(range(1, 13))


def kill_and_run_again(job: Any, where: str, processes_of: Callable[..., Any]) -> None:
    """Raises AssertionError when it was not killed where it should be, or does not go on."""
    if where in FAILPOINTS:
        process = job.start(CPTJOB_FAILPOINT=where)
    else:
        process = job.start()
        job.wait_for_step(5)
        found = victims(processes_of(job.output), process.pid, where)
        assert found, f"there is no {where}"
        kill(found)
    code, _, errors = job.end(process)
    assert code in (75, 137, -signal.SIGKILL), errors
    job.wait_for_silence()
    assert not (job.output / "manifest.json").exists(), "it was over before it was killed"
    code, _, errors = job.run()
    assert code == 0, errors + job.logs()


@pytest.fixture(scope="module")
def run_again(
    request: pytest.FixtureRequest, make_job: Callable[..., Any], processes_of: Callable[..., Any]
) -> Iterator[dict[str, tuple[Any, Future[None]]]]:
    """The jobs of all chosen tests, killed and run again two at a time: most of it is waiting."""
    items = (item for item in request.session.items if "where" in getattr(item, "fixturenames", ()))
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for where in [item.callspec.params["where"] for item in items]:  # type: ignore[attr-defined]
            name = "killed-" + where.replace(":", "-")
            job = make_job(name, elasticPolicy={"maxRestarts": 0})
            started[where] = job, pool.submit(kill_and_run_again, job, where, processes_of)
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("where", [*FAILPOINTS, *KILLED_IN_TRAINING])
def test_killed_at_a_point_and_run_again_the_weights_are_the_same(
    where: str, done: Any, run_again: dict[str, tuple[Any, Future[None]]]
) -> None:
    job, ended = run_again[where]
    ended.result()
    check(job, done[0].weights())


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_any_moment_and_run_again_the_weights_are_the_same(
    seed: int, done: Any, make_job: Callable[..., Any], processes_of: Callable[..., Any]
) -> None:
    job = make_job(f"killed-{seed}")
    chance = random.Random(seed)
    for _ in range(2):
        process = job.start()
        # The moment is the test: anywhere between the first import and the end.
        time.sleep(chance.uniform(0.5, done[0].seconds))
        victim = VICTIMS[(seed + chance.randrange(2)) % len(VICTIMS)]
        kill(victims(processes_of(job.output), process.pid, victim))
        job.end(process)
    code, _, errors = job.run()
    assert code == 0, errors + job.logs()
    check(job, done[0].weights())
