"""Tiny models of many architectures with random weights, and a trainer around one, in this process."""

import dataclasses
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cptjob_trainer import demo, failpoints
from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.config import (
    Checkpoint,
    DatasetInput,
    Dropout,
    ModelInput,
    Paths,
    ResolvedLora,
    ResolvedSchedule,
    ResolvedTraining,
    TrainerConfig,
    ValidationInput,
)
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import Prepared
from cptjob_trainer.data.rows import Row
from cptjob_trainer.run import forkserver
from cptjob_trainer.runtime import Runtime
from cptjob_trainer.training import components, loop
from cptjob_trainer.training.metrics import read_metrics

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
    "phimoe": {
        "sliding_window": 32, "num_local_experts": 4,
        "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
    },
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
    model_path: Path, output: Path, compile: str, training: dict[str, Any], **settings: Any
) -> TrainerConfig:
    return TrainerConfig(
        name="test",
        uid="uid",
        model=ModelInput(uri="file:///model", path=model_path),
        datasets=(DatasetInput(name="a", uri="file:///data", path=output),),
        training=ResolvedTraining(**training),
        paths=Paths(output=output),
        compile=compile,
        **settings,
    )


def prepared_rows(
    config: TrainerConfig, rows: Sequence[Row], total_steps: int, packed: bool
) -> Prepared:
    """What `prepare` would leave of these rows, all of which are held out, too."""
    source: Any = ListSource("a", "Domain", rows)
    total_rows = total_steps * config.training.global_batch_size
    return Prepared(
        directory=config.paths.output,
        digest="digest",
        model_fingerprint="model",
        data_fingerprint="data",
        packed=packed,
        max_length=config.training.max_length,
        prompt_ids=(),
        pad_id=0,
        vocab_size=VOCABULARY,
        sources=(source,),
        heldout=(source,),
        quotas=(total_rows,),
        total_rows=total_rows,
        total_steps=total_steps,
        warnings=(),
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
    **settings: Any,
) -> loop.Trainer:
    """What the worker does around preparing and the process group; `settings` are the trainer's."""
    runtime = Runtime.of(config.training, rank, world, device)
    runtime = dataclasses.replace(runtime, sharded=sharded or runtime.sharded)
    parts = components.assemble(config, prepared_rows(config, rows, total_steps, packed), runtime)
    parts.model.train()
    return loop.Trainer(parts, LoopState(), **settings)


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
    forkserver.start("cptjob_trainer.run.worker:main")


# --- whole workers ----------------------------------------------------------------------------


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
        ranks = self.start(failpoint)
        if kill_after is not None:
            time.sleep(kill_after)
            for rank in ranks:
                if rank.pid is not None and rank.exitcode is None:
                    os.kill(rank.pid, signal.SIGKILL)
        return self.wait(ranks)

    def start(self, failpoint: str = "") -> list[Any]:
        """The processes of the ranks."""
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
        return [
            forkserver.spawn(
                "cptjob_trainer.run.worker:main",
                str(self.config_path),
                environment | {"RANK": str(rank)},
            )
            for rank in range(self.world)
        ]

    @staticmethod
    def wait(ranks: list[Any]) -> list[int]:
        """Exit codes of the ranks."""
        for rank in ranks:
            rank.join(240)
        codes = [rank.exitcode for rank in ranks]
        assert None not in codes, "a rank hangs"
        return codes

    def steps(self) -> list[int]:
        """The steps that are told in metrics.jsonl."""
        lines = read_metrics(self.output / "metrics.jsonl")
        return [line["step"] for line in lines if "loss" in line]

    @property
    def output(self) -> Path:
        return self.config.paths.output

    def weights(self) -> str:
        names = sorted(self.output.glob("model/*.safetensors"))
        return hashlib.sha256(b"".join(name.read_bytes() for name in names)).hexdigest()


@pytest.fixture(scope="session")
def start(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`start(world=2, method="LoRA")`: a fresh output; the data is prepared once."""

    def build(
        world: int = 1, method: str = "Full", steps: int = 9, save: int = 2, evaluate: int = 4
    ) -> Run:
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
            validation=ValidationInput(split_percent=5.0, every_steps=evaluate),
            training=ResolvedTraining(
                method=method,  # type: ignore[arg-type]
                lora=lora if method == "LoRA" else None,
                epochs=1,
                max_steps=steps,
                max_length=64,
                batch_size_per_device=2,
                global_batch_size=4,
                learning_rate=1e-3,
                schedule=ResolvedSchedule(min_learning_rate=1e-4, warmup_steps=2),
            ),
            checkpoint=Checkpoint(every_steps=save, keep_last=2),
            paths=Paths(output=output, prepared=volumes / "prepared"),
        )
        config.dump(output / "config.json")
        prepared = prepare(config, processes=1, packs=lambda _: True)
        return Run(config, output / "config.json", prepared.directory, world)

    return build
