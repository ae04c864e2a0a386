"""What rank 0 tells while it trains."""

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cptjob_trainer.checkpoint.checkpoints import Resume
from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.data.prepared import Prepared
from cptjob_trainer.training import components, reporter


def test_a_run_that_goes_on_tells_the_checkpoint_that_it_went_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, Any]] = []

    class Publisher:
        def __init__(self, address: str) -> None:
            assert address == "host:1"

        def publish(self, progress: Any) -> None:
            said.append(json.loads(progress.model_dump_json(by_alias=True)))

    monkeypatch.setenv(reporter.STORE_VARIABLE, "host:1")
    monkeypatch.setattr(reporter, "StorePublisher", Publisher)
    told = reporter.Reporter(0, 1.0, None, 1.0)
    told.resumed(Resume(step=20, path=tmp_path, loop_state={}, bytes=1))
    saved = datetime.fromtimestamp(int(tmp_path.stat().st_mtime), UTC)
    assert said[-1]["lastCheckpoint"]["step"] == 20
    assert said[-1]["lastCheckpoint"]["uri"] == tmp_path.as_uri()
    assert said[-1]["lastCheckpoint"]["time"].startswith(f"{saved:%Y-%m-%dT%H:%M}")


def test_the_log_of_rank_0_has_a_line_for_what_is_new_and_not_for_every_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(reporter.STORE_VARIABLE, raising=False)
    caplog.set_level("INFO")
    told = reporter.Reporter(0, 1.0, None, 1.0)
    told.phase("Loading", "0.7M parameters")
    for step in range(1, 4):
        values = {"seconds": 1.0, "dataWait": 0.0, "tokens": 512, "loss": 3.25}
        told.step(LoopState(step=step), 10, values)
    told.evaluation({"heldout_domain_loss": 3.5})
    assert caplog.messages == [
        "Loading: 0.7M parameters",
        "Training: step 1 of 10, loss 3.2500, 512 tokens/s, ETA 0:00:09",
        "step 3: heldout_domain_loss 3.5000",
    ]


def test_the_other_ranks_tell_no_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    reporter.Reporter(1, 1.0, None, 1.0).phase("Loading", "0.7M parameters")
    assert caplog.messages == []


def test_it_tells_which_ranks_run_on_which_node() -> None:
    told = reporter.Reporter(0, 1.0, None, 1.0)
    told.nodes(["node-a", "node-a", "node-b"])
    said = json.loads(told._progress.to_json())
    assert said["nodes"] == [
        {"name": "node-a", "ranks": [0, 1]},
        {"name": "node-b", "ranks": [2]},
    ]


def test_epochs_are_those_that_a_job_cut_short_by_max_steps_trains() -> None:
    training = SimpleNamespace(epochs=3, global_batch_size=4)
    prepared: Any = SimpleNamespace(total_rows=6618, total_steps=4, max_length=64)
    prepared.drawn = partial(Prepared.drawn, prepared)
    model: Any = SimpleNamespace(flops_per_token=float, parameter_count=lambda: 1)
    config: Any = SimpleNamespace(training=training)
    runtime: Any = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    told = components._reporter(config, prepared, runtime, model)
    told.step(LoopState(step=4), 4, {"seconds": 1.0, "dataWait": 0.0, "tokens": 512, "loss": 3.25})
    assert told._progress.epoch == pytest.approx(3 * 16 / 6618)
