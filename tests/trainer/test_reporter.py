"""What rank 0 tells while it trains."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer import reporter
from cptjob_trainer.checkpoints import Resume


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
