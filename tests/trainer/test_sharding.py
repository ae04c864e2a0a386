"""Weights that one rank loads arrive, whole and in place, in a model that others built without them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from cptjob_trainer.errors import DataError
from cptjob_trainer.model import pretrained, sharding

Build = Callable[..., Any]
ARCHITECTURES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "opt",
    "olmo2", "granite", "mixtral", "phimoe", "llama4_text", "bloom", "mamba",
]  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process: FSDP2 wants one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def config(tmp_path: Path, helpers: Any) -> Build:
    """`config(model_path, lora)`: of a run with these weights."""

    def build(path: Path, lora: bool = False) -> Any:
        settings = {
            "epochs": 1,
            "max_length": 24,
            "batch_size_per_device": 2,
            "global_batch_size": 2,
            "learning_rate": 1e-3,
            "schedule": helpers.ResolvedSchedule(min_learning_rate=1e-4),
            "method": "LoRA" if lora else "Full",
            "lora": helpers.ResolvedLora(rank=4, alpha=8.0, target_modules=("all-linear",))
            if lora
            else None,
        }
        return helpers.trainer_config(path, tmp_path / "out", "Never", settings)

    return build


def described(lm: Any) -> dict[str, Any]:
    return {
        name: (tensor.shape, tensor.dtype, tensor.requires_grad)
        for name, tensor in sharding.tensors(lm).items()
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_their_tensor(
    value: float, packed: bool, model_dir: Build, config: Build
) -> None:
    path = model_dir("llama")
    file = path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, :2] = value
    save_file(weights, file, {"format": "pt"})
    count = f"2 of the {weights[name].numel():,} numbers of the tensor {name} are NaN or infinite"
    with pytest.raises(DataError, match=count):
        pretrained.load(config(path), packed=packed)


@pytest.mark.parametrize(
    ("model_type", "lora"),
    # PEFT has adapters for some layers of Mamba only.
    [
        (kind, lora)
        for kind in ARCHITECTURES
        for lora in (False, True)
        if (kind, lora) != ("mamba", True)
    ],
)
def test_a_skeleton_has_every_tensor_of_the_loaded_model_and_no_other(
    model_type: str, lora: bool, model_dir: Build, config: Build
) -> None:
    told = config(model_dir(model_type), lora)
    lm = pretrained.load(told, packed=False)
    names = [name for name, _ in lm.named_parameters()]
    skeleton = pretrained.skeleton(told, lm.config._attn_implementation, names)
    assert described(skeleton) == described(lm)
    assert [name for name, _ in skeleton.named_parameters()] == names
    assert all(tensor.is_meta for tensor in sharding.tensors(skeleton).values())
    # Nothing else holds numbers that would be missing.
    others = [value for module in skeleton.modules() for value in vars(module).values()]
    assert not any(isinstance(value, torch.Tensor) for value in others)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "mixtral", "bloom"])
def test_a_sharded_model_loses_what_the_loaded_one_loses(
    model_type: str,
    lora: Any,
    alone: None,
    model_dir: Build,
    rows: Build,
    trainer: Build,
    run_steps: Build,
) -> None:
    path, packed = model_dir(model_type), model_type != "bloom"
    data = rows(8, 24, 2 if packed else 1)
    settings = {"total_steps": 4, "packed": packed, "lora": lora}
    plain = run_steps(trainer(path, data, **settings), 4)
    shared = trainer(path, data, sharded=True, **settings)
    assert run_steps(shared, 4) == pytest.approx(plain, rel=1e-6)


def test_a_head_of_its_own_stays_one_though_the_configuration_ties_it(
    alone: None, model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path = model_dir("llama", tie_word_embeddings=False)
    weights = load_file(path / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    data = rows(8, 24, 2)
    plain = trainer(path, data)
    shared = trainer(path, data, sharded=True)
    names = [name for name, _ in shared.model.named_parameters()]
    assert names == [name for name, _ in plain.model.named_parameters()]
    assert "lm.lm_head.weight" in names
    assert run_steps(shared, 3) == pytest.approx(run_steps(plain, 3), rel=1e-6)
