"""Tiny models of many architectures with random weights, and a trainer around one, in this process."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cptjob_trainer import attention, dropout, evaluate, forkserver, loop, model
from cptjob_trainer.checkpoints import Checkpoints
from cptjob_trainer.config import (
    DatasetInput,
    Dropout,
    ModelInput,
    Paths,
    ResolvedLora,
    ResolvedSchedule,
    ResolvedTraining,
    TrainerConfig,
)
from cptjob_trainer.data import Batcher
from cptjob_trainer.mix import Mix
from cptjob_trainer.optimizer import build_optimizer, initialise_state
from cptjob_trainer.reporter import Reporter
from cptjob_trainer.rows import Row
from cptjob_trainer.state import LoopState

__all__ = ["Dropout", "ResolvedLora", "ResolvedSchedule"]

VOCABULARY = 128
CPU = torch.device("cpu")

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each architecture calls things, or needs besides. Windows are shorter than the documents.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gpt_neox": {},
    "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0},
    "mixtral": {"num_local_experts": 4},
    # Windows that are in the mask only, and longer than the probe's documents.
    "phimoe": {"sliding_window": 32, "num_local_experts": 4},
    "llama4_text": {
        "attention_chunk_size": 32, "num_local_experts": 2, "head_dim": 8,
        "intermediate_size_mlp": 64, "no_rope_layers": [1, 1], "moe_layers": [1],
    },
    "bloom": {"n_head": 4, "n_layer": 2},
    "mamba": {},
}  # fmt: skip


@dataclass(frozen=True)
class ListSource:
    """Rows in memory, where the trainer expects a prepared source."""

    name: str
    role: str
    items: Sequence[Row]

    def rows(self) -> int:
        return len(self.items)

    def row(self, index: int) -> Row:
        return self.items[index]


def make_row(*documents: Sequence[int]) -> Row:
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
    return Row(tokens, starts.astype(np.int64), np.zeros(len(tokens), dtype=np.bool_))


def random_rows(count: int, length: int, documents: int, seed: int = 0) -> list[Row]:
    """Rows of `length` tokens, each of `documents` documents of about the same length."""
    generator = np.random.default_rng(seed)
    sizes = [length // documents] * (documents - 1)
    sizes.append(length - sum(sizes))
    return [
        make_row(*(generator.integers(3, VOCABULARY, size=size).tolist() for size in sizes))
        for _ in range(count)
    ]


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """`model_dir("llama", attention_dropout=0.1)` writes a tiny random model and gives its folder."""

    def build(model_type: str, **overrides: Any) -> Path:
        settings = {**COMMON, **ARCHITECTURES[model_type], **overrides}
        config = AutoConfig.for_model(model_type, **settings)
        torch.manual_seed(1)
        path = tmp_path / "models" / model_type
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        return path

    return build


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., loop.Trainer]:
    """`trainer(model_path, rows, total_steps=..., batch=..., **training)` in one process on the CPU."""

    def build(
        model_path: Path,
        rows: Sequence[Row],
        *,
        total_steps: int = 20,
        batch: int = 2,
        micro: int = 2,
        length: int = 24,
        packed: bool = True,
        compile: str = "Never",
        name: str = "run",
        device: torch.device = CPU,
        sharded: bool = False,
        lora: dict[str, Any] | None = None,
        **training: Any,
    ) -> loop.Trainer:
        settings: dict[str, Any] = {
            "epochs": 1,
            "max_length": length,
            "batch_size_per_device": micro,
            "global_batch_size": batch,
            "learning_rate": 1e-3,
            "schedule": ResolvedSchedule(min_learning_rate=1e-4, warmup_steps=2),
            "lora": ResolvedLora(**{"alpha": 8.0, "target_modules": ("all-linear",), **lora})
            if lora is not None
            else None,
            "method": "LoRA" if lora is not None else "Full",
            **training,
        }
        config = trainer_config(model_path, tmp_path / name, compile, settings)
        return assemble(config, rows, total_steps, packed, device=device, sharded=sharded)

    return build


def trainer_config(
    model_path: Path, output: Path, compile: str, training: dict[str, Any]
) -> TrainerConfig:
    return TrainerConfig(
        name="test",
        uid="uid",
        model=ModelInput(uri="file:///model", path=model_path),
        datasets=(DatasetInput(name="a", uri="file:///data", path=output),),
        training=ResolvedTraining(**training),
        paths=Paths(output=output),
        compile=compile,
    )


def assemble(
    config: TrainerConfig,
    rows: Sequence[Row],
    total_steps: int,
    packed: bool,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
    sharded: bool = False,
) -> loop.Trainer:
    """What the worker does around preparing and the process group."""
    training = config.training
    lm = model.load(config, packed)
    sharded = sharded or world > 1
    lm.to(device)
    runtime = loop.Runtime(
        rank=rank,
        world=world,
        device=device,
        dtype=model.compute_dtype(training, device),
        sharded=sharded,
        documents=lm.config._attn_implementation == attention.NAME,
        dropping=dropout.active(lm, lm.config),
    )
    wrapped = model.LossModel(lm)
    if training.activation_checkpointing == "Full":
        model.set_activation_checkpointing(lm)
    if config.compile == "Always":
        model.compile_layers(wrapped)
    if sharded:
        model.shard(wrapped, device, runtime.dtype, world)
    optimizer = build_optimizer(wrapped, training)
    initialise_state(optimizer)
    source = ListSource("a", "Domain", rows)
    shape: dict[str, Any] = {
        "micro_batch": training.batch_size_per_device,
        "max_length": training.max_length,
        "pad_id": 0,
        "packed": packed,
        "rank": rank,
        "world": world,
    }
    quota = total_steps * training.global_batch_size
    wrapped.train()
    return loop.Trainer(
        config,
        runtime,
        wrapped,
        optimizer,
        Batcher(
            [source],
            Mix([len(rows)], [quota], training.seed),
            global_batch=training.global_batch_size,
            **shape,
        ),
        evaluate.Evaluator(
            [source],
            total_rows=quota,
            documents=runtime.documents,
            device=device,
            dtype=runtime.dtype,
            sharded=runtime.sharded,
            **shape,
        ),
        Checkpoints(
            config.paths.output / "checkpoints",
            uid="uid",
            lineage={},
            keep_last=None,
            on_mismatch="Refuse",
            rank=rank,
            world=world,
        ),
        LoopState(),
        total_steps,
        ["a"],
        stop_asked=lambda: False,
        metrics=None,
        reporter=Reporter(rank, 1.0, None, 1.0),
    )


@pytest.fixture
def rows() -> Callable[..., list[Row]]:
    """`rows(count, length, documents)`: random rows of several documents each."""
    return random_rows


def losses(trainer: loop.Trainer, steps: int) -> list[float]:
    """The loss of each of the first steps."""
    result = []
    for step in range(steps):
        rows = trainer.batcher.step(step)
        trainer.state.step = step
        result.append(trainer.step(rows, rows.targets).loss)
    return result


@pytest.fixture
def run_steps() -> Callable[..., list[float]]:
    """`run_steps(trainer, n)` trains n steps and gives their losses."""
    return losses


@pytest.fixture
def helpers() -> Any:
    """This module, for tests that build their own trainers."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The launcher's warm server: ranks forked from it start in a fraction of a second."""
    os.environ["OMP_NUM_THREADS"] = "1"
    forkserver.start("cptjob_trainer.worker:main")
