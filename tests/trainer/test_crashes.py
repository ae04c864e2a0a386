"""A run that is killed with -9 wherever it stands, and run again, ends with the same weights bit for bit.

The workers are real ones, forked from the launcher's warm fork server; the rest of a local run is
left out here to make each attempt take a second.
"""

import hashlib
import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cptjob_trainer import demo, failpoints, forkserver
from cptjob_trainer.config import (
    Checkpoint,
    DatasetInput,
    ModelInput,
    Paths,
    ResolvedLora,
    ResolvedSchedule,
    ResolvedTraining,
    TrainerConfig,
    ValidationInput,
)
from cptjob_trainer.metrics import read_metrics
from cptjob_trainer.prepare import prepare

STEPS, KEPT = 9, 2
ENTRYPOINT = "cptjob_trainer.worker:main"
# Points that a worker passes; those of prepare are another process's.
POINTS = sorted(name for name in failpoints.NAMES if not name.startswith("prepare."))
ONCE = {"train.start", "checkpoint.claim", "checkpoint.claimed", "checkpoint.clean"} | {
    name for name in POINTS if name.startswith("output.")
}


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory, fork_server: None) -> Path:
    path = tmp_path_factory.mktemp("volumes")
    demo.main(["tiny", "--volumes", str(path)])
    return path


@dataclass
class Run:
    """One output, trained by as many attempts as it takes."""

    config: TrainerConfig
    config_path: Path
    prepared: Path
    world: int = 1

    def attempt(self, failpoint: str = "", kill_after: float | None = None) -> list[int]:
        """Exit codes of the ranks."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            "CPTJOB_PREPARED": str(self.prepared),
            failpoints.VARIABLE: failpoint,
            "WORLD_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "CPTJOB_TERMINATION_LOG": os.devnull,
        }
        ranks = [
            forkserver.spawn(ENTRYPOINT, str(self.config_path), environment | {"RANK": str(rank)})
            for rank in range(self.world)
        ]
        if kill_after is not None:
            time.sleep(kill_after)
            for rank in ranks:
                if rank.pid is not None and rank.exitcode is None:
                    os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.join(240)
        codes = [rank.exitcode for rank in ranks]
        assert None not in codes, "a rank hangs"
        return [code for code in codes if code is not None]

    @property
    def output(self) -> Path:
        return self.config.paths.output

    def weights(self) -> str:
        names = sorted(self.output.glob("model/*.safetensors"))
        return hashlib.sha256(b"".join(name.read_bytes() for name in names)).hexdigest()

    def check(self, expected: str) -> None:
        """Complete, the same weights, what was asked to be kept, and one line for each step."""
        assert json.loads((self.output / "manifest.json").read_text())["steps"] == STEPS
        assert self.weights() == expected
        kept = [path.name for path in (self.output / "checkpoints").glob("step-*")]
        assert sorted(int(re.findall(r"\d+", name)[0]) for name in kept) == [8, 9]
        steps = [
            line["step"] for line in read_metrics(self.output / "metrics.jsonl") if "loss" in line
        ]
        assert steps == list(range(1, STEPS + 1))


@pytest.fixture(scope="session")
def start(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`start(world=2, method="LoRA")`: a fresh output; the data is prepared once."""

    def build(world: int = 1, method: str = "Full") -> Run:
        output = tmp_path_factory.mktemp("run")
        lora = ResolvedLora(rank=4, alpha=8.0, target_modules=("all-linear",))
        config = TrainerConfig(
            name="crash",
            uid="uid",
            model=ModelInput(uri="pvc://models/tiny", path=volumes / "models/tiny"),
            datasets=(
                DatasetInput(name="domain", uri="d", path=volumes / "data/domain"),
                DatasetInput(
                    name="general", uri="g", path=volumes / "data/general", role="General"
                ),
            ),
            validation=ValidationInput(split_percent=5.0, every_steps=4),
            training=ResolvedTraining(
                method=method,  # type: ignore[arg-type]
                lora=lora if method == "LoRA" else None,
                epochs=1,
                max_steps=STEPS,
                max_length=64,
                batch_size_per_device=2,
                global_batch_size=4,
                learning_rate=1e-3,
                schedule=ResolvedSchedule(min_learning_rate=1e-4, warmup_steps=2),
            ),
            checkpoint=Checkpoint(every_steps=2, keep_last=KEPT),
            paths=Paths(output=output, prepared=volumes / "prepared"),
        )
        config.dump(output / "config.json")
        prepared = prepare(config, processes=1, packs=lambda _: True)
        return Run(config, output / "config.json", prepared.directory, world)

    return build


@pytest.fixture(scope="session")
def uninterrupted(start: Callable[..., Run]) -> Callable[..., str]:
    """Digest of the weights that a run leaves that nobody disturbs."""
    known: dict[Any, str] = {}

    def digest(world: int = 1, method: str = "Full") -> str:
        if (world, method) not in known:
            run = start(world, method)
            assert run.attempt() == [0] * world
            known[world, method] = run.weights()
            run.check(known[world, method])
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
    run.check(expected)


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
    run.check(uninterrupted())


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
    run.check(expected)
