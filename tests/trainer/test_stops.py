"""SIGTERM in a running worker: the step that was trained is saved, and the next run goes on from it."""

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

Run = Any
# Long enough that a signal comes before the end; nothing but the stop and the end makes a checkpoint.
LONG = {"steps": 40, "save": 1000, "evaluate": 1000}


def stop_at(run: Run, step: int, ranks_told: int) -> list[int]:
    """Exit codes after SIGTERM to the first `ranks_told` ranks once `step` is told."""
    ranks = run.start()
    while max(run.steps(), default=0) < step:
        assert all(rank.exitcode is None for rank in ranks), "a rank ended before it was told to"
        time.sleep(0.01)
    for rank in ranks[:ranks_told]:
        os.kill(rank.pid, signal.SIGTERM)
    codes: list[int] = run.wait(ranks)
    return codes


def saved_steps(run: Run) -> list[int]:
    names = [path.parent.name for path in run.output.glob("checkpoints/step-*/manifest.json")]
    return sorted(int(re.findall(r"\d+", name)[0]) for name in names)


@pytest.mark.parametrize("world", [1, 2])
def test_a_worker_that_is_told_to_stop_saves_the_step_it_trained_and_the_next_run_goes_on(
    world: int, start: Callable[..., Run]
) -> None:
    whole, run = start(world, **LONG), start(world, **LONG)
    assert whole.attempt() == [0] * world
    # One of two ranks is told, and both stop at the same step.
    assert stop_at(run, 3, ranks_told=1) == [143] * world
    told = run.steps()
    assert told == list(range(1, len(told) + 1))
    assert saved_steps(run) == [len(told)]
    assert len(told) < LONG["steps"]
    assert run.attempt() == [0] * world
    assert run.steps() == whole.steps() == list(range(1, LONG["steps"] + 1))
    assert run.weights() == whole.weights()
