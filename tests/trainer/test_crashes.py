"""A run that is killed with -9 wherever it stands, and run again, ends with the same weights bit for bit.

The workers are real ones, forked from the launcher's warm fork server; the rest of a local run is
left out here to make each attempt take a second.
"""

import hashlib
import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cptjob_trainer import failpoints

# A `Run` of conftest.py.
Run = Any
# Of the runs that `start` makes.
STEPS = 9
# Points that a worker passes; those of prepare are another process's.
POINTS = sorted(name for name in failpoints.NAMES if not name.startswith("prepare."))
ONCE = {"train.start", "checkpoint.claim", "checkpoint.claimed", "checkpoint.clean"} | {
    name for name in POINTS if name.startswith("output.")
}


def check(run: Run, expected: str) -> None:
    """Complete, the same weights, what was asked to be kept, and one line for each step."""
    assert json.loads((run.output / "manifest.json").read_text())["steps"] == STEPS
    assert run.weights() == expected
    kept = [path.name for path in (run.output / "checkpoints").glob("step-*")]
    assert sorted(int(re.findall(r"\d+", name)[0]) for name in kept) == [8, 9]
    assert run.steps() == list(range(1, STEPS + 1))


@pytest.fixture(scope="session")
def uninterrupted(start: Callable[..., Run]) -> Callable[..., str]:
    """Digest of the weights that a run leaves that nobody disturbs."""
    known: dict[Any, str] = {}

    def digest(world: int = 1, method: str = "Full") -> str:
        if (world, method) not in known:
            run = start(world, method)
            assert run.attempt() == [0] * world
            known[world, method] = run.weights()
            check(run, known[world, method])
            base = (Path(run.config.model.path) / "model.safetensors").read_bytes()
            assert known[world, method] != hashlib.sha256(base).hexdigest(), "nothing was learnt"
        return known[world, method]

    return digest


def kill_and_go_on(run: Run, expected: str, failpoint: str) -> None:
    if failpoint.startswith("checkpoint.load:"):
        # Passed only by a run that goes on.
        run.attempt("train.step:6")
    codes = run.attempt(failpoint)
    assert -signal.SIGKILL in codes, f"{failpoint} was not passed"
    assert run.attempt() == [0] * run.world
    check(run, expected)


def passed_at_least(point: str) -> list[str]:
    return [f"{point}:1"] if point in ONCE or point == "checkpoint.load" else [f"{point}:2"]


@pytest.mark.parametrize("failpoint", [f for point in POINTS for f in passed_at_least(point)])
def test_killed_at_a_failpoint_and_run_again_the_weights_are_the_same(
    failpoint: str, start: Callable[..., Run], uninterrupted: Callable[..., str]
) -> None:
    if failpoint.startswith("output.adapter"):
        kill_and_go_on(start(method="LoRA"), uninterrupted(method="LoRA"), failpoint)
    else:
        kill_and_go_on(start(), uninterrupted(), failpoint)


@pytest.mark.parametrize("failpoint", ["train.step:5:1", "checkpoint.written:2:0"])
def test_one_of_two_ranks_killed_and_both_run_again_the_weights_are_the_same(
    failpoint: str, start: Callable[..., Run], uninterrupted: Callable[..., str]
) -> None:
    kill_and_go_on(start(world=2), uninterrupted(world=2), failpoint)


def test_killed_again_and_again_the_weights_are_the_same(
    start: Callable[..., Run], uninterrupted: Callable[..., str]
) -> None:
    run = start()
    for failpoint in (
        "train.step:4",
        "checkpoint.written:1",
        "train.step:3",
        "output.model_swap:1",
    ):
        assert run.attempt(failpoint) == [-signal.SIGKILL]
    assert run.attempt() == [0]
    check(run, uninterrupted())


def test_a_run_killed_before_its_manifest_leaves_no_older_one_beside_its_model(
    start: Callable[..., Run],
) -> None:
    run = start()
    assert run.attempt() == [0]
    run.config = run.config.model_copy(
        update={
            "training": run.config.training.model_copy(update={"seed": 1}),
            "checkpoint": run.config.checkpoint.model_copy(update={"on_mismatch": "StartNew"}),
        }
    )
    run.config.dump(run.config_path)
    assert run.attempt("output.manifest:1") == [-signal.SIGKILL]
    assert not (run.output / "manifest.json").exists()


def test_a_result_without_adapter_takes_an_older_adapter_away(start: Callable[..., Run]) -> None:
    run = start(method="LoRA")
    assert run.attempt() == [0]
    assert (run.output / "adapter").is_dir()
    run.config = run.config.model_copy(
        update={
            "training": run.config.training.model_copy(update={"method": "Full", "lora": None}),
            "checkpoint": run.config.checkpoint.model_copy(update={"on_mismatch": "StartNew"}),
        }
    )
    run.config.dump(run.config_path)
    assert run.attempt() == [0]
    assert not (run.output / "adapter").exists()
    files = json.loads((run.output / "manifest.json").read_text())["files"]
    assert not any(name.startswith("adapter") for name in files)


def test_a_lora_run_leaves_the_base_with_its_adapter_merged(start: Callable[..., Run]) -> None:
    run = start(method="LoRA")
    assert run.attempt() == [0]
    base = AutoModelForCausalLM.from_pretrained(run.config.model.path, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(run.output / "adapter")).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(run.output / "model", dtype=torch.float32)
    expected = merged.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "point", sorted(set(POINTS) - ONCE - {"checkpoint.load", "train.evaluate"})
)
def test_killed_at_every_passing_of_a_failpoint_the_weights_are_the_same(
    point: str, count: int, world: int, start: Callable[..., Run], uninterrupted: Callable[..., str]
) -> None:
    kill_and_go_on(start(world=world), uninterrupted(world=world), f"{point}:{count}")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_any_moment_and_run_again_the_weights_are_the_same(
    seed: int, start: Callable[..., Run], uninterrupted: Callable[..., str]
) -> None:
    world = 1 + seed % 2
    expected = uninterrupted(world=world)
    run = start(world=world)
    moments = random.Random(seed)
    for _ in range(3):
        run.attempt(kill_after=moments.uniform(0.2, 4.0))
    assert run.attempt() == [0] * world
    check(run, expected)
