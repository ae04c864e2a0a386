"""Real processes that save and load: forked, so that torch is imported once."""

import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cptjob_trainer import failpoints
from cptjob_trainer.checkpoint.checkpoints import Checkpoints

# Threads of a pool do not survive a fork, and nothing here is large enough for a second one.
torch.set_num_threads(1)

PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its value as JSON, or the error that it raised, or the signal that killed it."""

    value: Any = None
    error: str | None = None
    message: str = ""
    signal: int | None = None


def run(world: int, act: Callable[[int], Any], **environment: str) -> list[Outcome]:
    """Run `act(rank)` in `world` processes at once."""
    started = [_start(rank, act, environment) for rank in range(world)]
    return [_finish(pid, pipe) for pid, pipe in started]


def alone(act: Callable[[], Any], **environment: str) -> Outcome:
    """Run `act` in one process."""
    return run(1, lambda _: act(), **environment)[0]


def gloo(store: Path, world: int, act: Callable[[int], Any], **environment: str) -> list[Outcome]:
    """Run `act(rank)` in `world` processes of one gloo group."""

    def joined(rank: int) -> Any:
        os.environ["RANK"] = str(rank)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        return act(rank)

    store.unlink(missing_ok=True)
    return run(world, joined, **environment)


def _start(rank: int, act: Callable[[int], Any], environment: dict[str, str]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    os.close(reader)
    os.environ.update(environment)
    failpoints._hits.clear()
    # A forked child makes torch's thread pool anew at its first use. The threads of its backward
    # pass would do so at the same moment, and one of them would find none.
    torch.set_num_threads(1)
    try:
        report = {"value": act(rank)}
    except BaseException as error:
        report = {"error": type(error).__name__, "message": str(error)}
    with open(writer, "w") as file:
        json.dump(report, file)
    os._exit(0)


def _finish(pid: int, pipe: int) -> Outcome:
    text = b""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with open(pipe, "rb", buffering=0) as file:
        while True:
            ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                pytest.fail("a process hangs")
            block = file.read(1 << 16)
            if not block:
                break
            text += block
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return Outcome(signal=os.WTERMSIG(status))
    return Outcome(**json.loads(text))


def values(step: int) -> dict[str, torch.Tensor]:
    """Tensors of several kinds and shapes, different at each step."""
    random = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(5, 7, generator=random),
        "model.turned": torch.randn(6, 4, generator=random).t(),
        "model.half": torch.randn(9, generator=random).bfloat16(),
        "model.none": torch.empty(0, 3),
        "optimizer.weight.step": torch.tensor(float(step)),
        "optimizer.count": torch.tensor([step, 2**40]),
        "optimizer.flags": torch.tensor([True, False, step % 2 == 0]),
    }


def empty() -> dict[str, torch.Tensor]:
    """Places to load `values` into, filled with what was never saved."""
    return {name: torch.full_like(value, 1) for name, value in values(0).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Exact contents, whole, as JSON."""
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()
        for name, tensor in tensors.items()
    }


class Lab:
    """A checkpoint folder and what tests do with it."""

    alone = staticmethod(alone)
    run = staticmethod(run)
    values = staticmethod(values)
    empty = staticmethod(empty)
    bits = staticmethod(bits)

    def __init__(self, directory: Path) -> None:
        self.home = directory
        self.directory = directory / "checkpoints"

    def gloo(self, world: int, act: Callable[[int], Any], **environment: str) -> list[Outcome]:
        """Run `act(rank)` in `world` processes of one gloo group."""
        return gloo(self.home / "store", world, act, **environment)

    def make(self, **changes: Any) -> Checkpoints:
        """Checkpoints of a run, with what is not said set to something usual."""
        settings: dict[str, Any] = {
            "uid": "a-uid",
            "lineage": {"model": "m1", "seed": 0},
            "keep_last": None,
            "on_mismatch": "Refuse",
        }
        return Checkpoints(self.directory, **{**settings, **changes})

    def train(self, until: int, **changes: Any) -> list[int]:
        """A run that saves each step: claims, loads what it finds, goes on. The steps it saved."""
        checkpoints = self.make(**changes)
        resume = checkpoints.open()
        done = 0
        if resume is not None:
            tensors = empty()
            checkpoints.load(resume, tensors)
            done = resume.step
            assert bits(tensors) == bits(values(done))
            assert resume.loop_state == {"step": done}
        for step in range(done + 1, until + 1):
            checkpoints.save(step, values(step), {"step": step})
        return list(range(done + 1, until + 1))

    def names(self) -> list[str]:
        """What lies in the checkpoint folder, without the claims."""
        found = (path.name for path in self.directory.iterdir())
        return sorted(name for name in found if not name.startswith("generation-"))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)
