"""Ranks that share a model (FSDP2 over gloo, real processes) train what one process trains."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer.run import forkserver

Build = Callable[..., Any]


def run(world: int, task: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        forkserver.spawn("sharded_rank:main", json.dumps(task), environment | {"RANK": str(rank)})
        for rank in range(world)
    ]
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0] * world
    result: dict[str, Any] = json.loads(Path(task["result"]).read_text())
    return result


@pytest.fixture
def task(
    tmp_path: Path,
    model_dir: Build,
    helpers: Any,
    fork_server: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Build:
    """`task("run", method="LoRA", ...)`: what `run` is told; one name, one output."""
    path = model_dir("llama")
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def build(name: str, until: int = 6, **training: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "epochs": 1,
            "max_length": 24,
            "batch_size_per_device": 2,
            "global_batch_size": 5,
            "learning_rate": 1e-2,
            "schedule": helpers.ResolvedSchedule(min_learning_rate=1e-4, warmup_steps=2),
            **training,
        }
        config = helpers.trainer_config(path, tmp_path / name, "Never", settings)
        config.dump(tmp_path / f"{name}.json")
        return {
            "config": str(tmp_path / f"{name}.json"),
            "rows": [10, 24, 2],
            "total_steps": 6,
            "packed": True,
            "until": until,
            "result": str(tmp_path / f"{name}.losses.json"),
        }

    return build


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_two_ranks_lose_what_one_process_loses_even_where_they_do_not_divide_the_batch(
    method: str, task: Build, helpers: Any
) -> None:
    lora = helpers.ResolvedLora(alpha=8.0, rank=4, target_modules=("all-linear",))
    settings = {"method": method, "lora": lora if method == "LoRA" else None}
    alone = run(1, task("alone", **settings))
    shared = run(2, task("shared", **settings))
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert shared["heldout"] == pytest.approx(alone["heldout"], rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_at_another_world_size(before: int, after: int, task: Build) -> None:
    whole = run(1, task("whole"))
    begun = run(before, task("moved", until=3))
    ended = run(after, task("moved"))
    assert ended["first"] == 3
    assert begun["losses"] + ended["losses"] == pytest.approx(whole["losses"], rel=1e-4)


def test_dropout_is_the_same_at_another_world_size(task: Build, helpers: Any) -> None:
    settings = {"dropout": helpers.Dropout(hidden=0.2, attention=0.2)}
    alone = run(1, task("alone", **settings))
    shared = run(2, task("shared", **settings))
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-4)
