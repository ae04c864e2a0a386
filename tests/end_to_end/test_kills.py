"""Runs that are killed at random moments, one process or all of them, and started again."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

VICTIMS = ("client", "launcher", "coordinator", "workers", "all")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_any_moment_and_run_again_the_weights_are_the_same(
    seed: int, done: Any, make_job: Callable[..., Any], processes_of: Callable[..., Any]
) -> None:
    expected = done[0].weights()
    job = make_job(f"killed-{seed}")
    chance = random.Random(seed)
    for _ in range(2):
        process = job.start()
        # The moment is the test: anywhere between the first import and the end.
        time.sleep(chance.uniform(0.5, done[0].seconds))
        running = processes_of(job.output)
        victim = VICTIMS[(seed + chance.randrange(2)) % len(VICTIMS)]
        found = running.all if victim == "all" else getattr(running, victim, [])[:1]
        for pid in found + ([process.pid] if victim in ("client", "all") else []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.end(process)
    code, _, errors = job.run()
    assert code == 0, errors + job.logs()
    job.wait_for_silence()
    assert job.weights() == expected
    # A client that is killed lets the workers save where they are; that one may be kept.
    assert len(job.checkpoints()) == 2
    assert job.checkpoints()[-1] == 12
    assert [line["step"] for line in job.metrics()] == list(range(1, 13))
