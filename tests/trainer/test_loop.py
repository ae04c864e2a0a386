"""Around the step: evaluations when they are due, and stops that lose nothing."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.config import ValidationInput
from cptjob_trainer.errors import Stopped
from cptjob_trainer.training.evaluate import HeldOut
from cptjob_trainer.training.metrics import MetricsLog, read_metrics
from cptjob_trainer.training.optimizer import checkpoint_tensors

Build = Callable[..., Any]
STEPS = 10


class Attempts:
    """One output, trained in this process: each call of `run` is an attempt that goes on."""

    def __init__(self, helpers: Any, model: Path, output: Path, **validation: Any) -> None:
        self.helpers, self.output = helpers, output
        settings = {
            "epochs": 1,
            "max_length": 24,
            "batch_size_per_device": 2,
            "global_batch_size": 2,
            "learning_rate": 1e-3,
            "schedule": helpers.ResolvedSchedule(min_learning_rate=1e-4, warmup_steps=2),
        }
        self.config = helpers.trainer_config(
            model, output, "Never", settings, validation=ValidationInput(**validation)
        )

    def run(self, stop_asked: Callable[[], bool] = lambda: False) -> Any:
        trainer = self.helpers.assemble(
            self.config, self.helpers.random_rows(20, 24, 2), STEPS, True, stop_asked=stop_asked
        )
        resume = trainer.checkpoints.open()
        if resume is not None:
            trainer.checkpoints.load(resume, trainer.tensors())
            trainer.state = LoopState.from_json(resume.loop_state)
        state = trainer.state
        trainer.metrics = MetricsLog(
            self.output / "metrics.jsonl", state.step, evaluated=not state.evaluation_pending
        )
        trainer.run(None)
        return trainer

    def evaluations(self) -> dict[int, list[float]]:
        """Held-out losses by the step they are of; each should be one."""
        found: dict[int, list[float]] = {}
        for line in read_metrics(self.output / "metrics.jsonl"):
            if "evaluation" in line:
                loss = line["evaluation"]["heldout_domain_loss"]
                found.setdefault(line["step"], []).append(loss)
        return found


@pytest.fixture
def attempts(tmp_path: Path, model_dir: Build, helpers: Any) -> Callable[..., Attempts]:
    """`attempts("name", every_steps=4)`: an output of its own."""
    model = model_dir("llama")
    return lambda name, **validation: Attempts(helpers, model, tmp_path / name, **validation)


def after(calls: int) -> Callable[[], bool]:
    """False for so many calls, and True from then on."""
    left: Iterator[bool] = iter([False] * calls)
    return lambda: next(left, True)


def test_evaluations_come_every_so_many_steps_and_at_the_end(
    attempts: Callable[..., Attempts],
) -> None:
    run = attempts("run", every_steps=4)
    trainer = run.run()
    found = run.evaluations()
    assert sorted(found) == [4, 8, 10]
    assert found[10][0] < found[4][0]
    assert trainer.state.heldout["heldout_domain_loss"] == found[10][0]


def test_without_an_interval_evaluations_keep_to_their_share_of_the_time(
    attempts: Callable[..., Attempts],
) -> None:
    run = attempts("run")
    run.run()
    # Ten steps have no time to spare: one evaluation, at the end.
    assert sorted(run.evaluations()) == [10]


# Evaluations ask before each of their micro-batches, of which there are four here; steps ask once.
@pytest.mark.parametrize(("calls", "step"), [(4, 4), (5, 4), (15, 8)])
def test_a_stop_leaves_an_evaluation_saves_its_step_and_evaluates_again_after_a_restart(
    calls: int, step: int, attempts: Callable[..., Attempts]
) -> None:
    whole, run = attempts("whole", every_steps=4), attempts("run", every_steps=4)
    expected = whole.run()
    with pytest.raises(Stopped, match=f"stopped after step {step} of 10"):
        run.run(after(calls))
    assert step not in run.evaluations()
    # Stopped once more before the next step is trained, when the evaluation has been told already.
    with pytest.raises(Stopped, match=f"stopped after step {step} of 10"):
        run.run(after(4))
    ended = run.run()
    assert run.evaluations() == whole.evaluations()
    ours, theirs = (
        checkpoint_tensors(trainer.model, trainer.optimizer) for trainer in (ended, expected)
    )
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_stop_in_the_last_evaluation_leaves_only_that_to_do(
    attempts: Callable[..., Attempts],
) -> None:
    whole, run = attempts("whole"), attempts("run")
    whole.run()
    with pytest.raises(Stopped, match="stopped after step 10 of 10"):
        run.run(after(STEPS))
    assert run.run().state.step == STEPS
    assert run.evaluations() == whole.evaluations()


def test_a_held_out_loss_that_is_no_number_is_null_in_what_survives_a_restart(
    attempts: Callable[..., Attempts], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = attempts("run").run()
    diverged = HeldOut({"Domain": math.nan}, {"law": 2.0}, 10)
    monkeypatch.setattr(trainer.evaluator, "run", lambda *_: diverged)
    trainer.metrics = None
    trainer.evaluate(HeldOut({"Domain": 3.0}, {"law": 3.0}, 10))
    kept = json.dumps(trainer.state.to_json(), allow_nan=False)
    expected = {"heldout_domain_loss": None, "heldout_domain_loss_change": None, "heldout/law": 2.0}
    assert LoopState.from_json(json.loads(kept)).heldout == expected
