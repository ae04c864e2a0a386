"""The trainer's GPU paths: varlen attention, bf16, compiled layers, NCCL and FSDP2, determinism."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cptjob_trainer.model import attention
from cptjob_trainer.training.optimizer import checkpoint_tensors

pytestmark = pytest.mark.gpu

Build = Callable[..., Any]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def nccl(gpu: torch.device) -> Iterator[None]:
    """A process group of one rank: enough for FSDP2's hooks, mixed precision and collectives."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=gpu)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen3", "gemma3_text", "gpt2", "mixtral"]
)
def test_packed_steps_on_the_gpu_lose_what_they_lose_on_the_cpu(
    model_type: str,
    gpu: torch.device,
    model_dir: Build,
    rows: Build,
    trainer: Build,
    run_steps: Build,
) -> None:
    path, data = model_dir(model_type), rows(20, 64, 3)
    settings: dict[str, Any] = {"length": 64, "total_steps": 8, "precision": "Float32"}
    expected = run_steps(trainer(path, data, **settings), 8)
    assert run_steps(trainer(path, data, device=gpu, **settings), 8) == pytest.approx(
        expected, rel=1e-3
    )


def test_bfloat16_uses_the_varlen_kernel_and_learns_the_same(
    gpu: torch.device, model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama", **WIDE), rows(4, 64, 3)
    full = run_steps(trainer(path, data, length=64, precision="Float32"), 20)
    built = trainer(path, data, length=64, device=gpu)
    assert built.runtime.dtype == torch.bfloat16
    assert built.model.lm.config._attn_implementation == attention.NAME
    assert run_steps(built, 20) == pytest.approx(full, rel=3e-2)
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("sharded", [False, True])
def test_compiled_layers_lose_what_eager_ones_lose(
    sharded: bool,
    nccl: None,
    gpu: torch.device,
    model_dir: Build,
    rows: Build,
    trainer: Build,
    run_steps: Build,
) -> None:
    path, data = model_dir("llama", **WIDE), rows(8, 64, 3)
    settings = {"length": 64, "device": gpu, "sharded": sharded, "total_steps": 6}
    eager = run_steps(trainer(path, data, **settings), 6)
    compiled = run_steps(trainer(path, data, compile="Always", **settings), 6)
    assert compiled == pytest.approx(eager, rel=1e-2)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_fsdp_over_nccl_loses_what_a_plain_model_loses(
    lora: dict[str, Any] | None,
    nccl: None,
    gpu: torch.device,
    model_dir: Build,
    rows: Build,
    trainer: Build,
    run_steps: Build,
) -> None:
    path, data = model_dir("llama", **WIDE), rows(8, 64, 3)
    settings = {"length": 64, "device": gpu, "lora": lora, "total_steps": 10}
    plain = run_steps(trainer(path, data, **settings), 10)
    assert run_steps(trainer(path, data, sharded=True, **settings), 10) == pytest.approx(
        plain, rel=1e-2
    )


def test_a_checkpoint_of_a_sharded_run_continues_with_the_same_bits(
    nccl: None, gpu: torch.device, model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama", **WIDE), rows(8, 64, 3)
    settings = {
        "length": 64, "device": gpu, "sharded": True, "deterministic": True, "total_steps": 6,
    }  # fmt: skip
    torch.use_deterministic_algorithms(True)
    try:
        first = trainer(path, data, name="one", **settings)
        assert first.checkpoints.open() is None
        run_steps(first, 3)
        first.state.step = 3
        first.save()
        rows_left = [first.batcher.step(step) for step in (3, 4, 5)]
        went_on = [first.step(part, part.targets).loss for part in rows_left]
        second = trainer(path, data, name="one", **settings)
        resume = second.checkpoints.open()
        second.checkpoints.load(resume, checkpoint_tensors(second.model, second.optimizer))
        second.state.step = 3
        first.state.step = 3
        again = [second.step(part, part.targets).loss for part in rows_left]
    finally:
        torch.use_deterministic_algorithms(False)
    # The rate of each step is that of state.step, which stayed at 3 in both.
    assert again == went_on


def test_activation_checkpointing_needs_less_memory_for_the_same_losses(
    gpu: torch.device, model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path = model_dir("llama", **WIDE, num_hidden_layers=8, max_position_embeddings=1024)
    data = rows(8, 1024, 3)
    peaks, lost = [], []
    for setting in ("None", "Full"):
        torch.cuda.reset_peak_memory_stats()
        built = trainer(
            path, data, length=1024, device=gpu, activation_checkpointing=setting, batch=8, micro=8
        )
        lost.append(run_steps(built, 3))
        peaks.append(torch.cuda.max_memory_allocated())
        del built
    assert lost[1] == pytest.approx(lost[0], rel=1e-2)
    assert peaks[1] < 0.6 * peaks[0]
