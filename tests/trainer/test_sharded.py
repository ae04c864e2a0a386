"""Ranks that share a model (FSDP2 over gloo, real processes) train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("sharded_rank.py")
Build = Callable[..., Any]


def run(world: int, task: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **common, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(task)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(e for _, e in outputs)
    result: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return result


@pytest.fixture
def task(tmp_path: Path, model_dir: Build, helpers: Any) -> Build:
    """`task("run", method="LoRA", ...)`: what `run` is told; one name, one output."""
    path = model_dir("llama")

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
