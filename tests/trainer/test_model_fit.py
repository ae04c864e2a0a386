"""Weights that are not those of the model's configuration are refused, with the tensors' names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cptjob_trainer.errors import DataError
from cptjob_trainer.model import model_fit

Build = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def edit(model: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def without_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers." in name]:
        del tensors[name]


REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a missing tensor": (lambda t: t.pop(Q_PROJ), f"the weights lack the tensor {Q_PROJ}, which"),
    "no layers": (
        without_layers,
        r"lack the tensors model.layers.0.input_layernorm.weight, .*, .* and 15 more, which",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.2.self_attn.q_proj.weight": t[Q_PROJ].clone()}),
        "have the tensor model.layers.2.self_attn.q_proj.weight, for which",
    ),
    "another shape": (
        lambda t: t.update({Q_PROJ: torch.zeros(32, 7)}),
        f"model.safetensors: the tensor {Q_PROJ} has the shape 32 x 7, and the model that "
        "config.json describes has 32 x 32;",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_of_another_model_are_refused(model_dir: Build, case: str) -> None:
    change, message = REFUSED[case]
    model = model_dir("llama")
    edit(model, change)
    with pytest.raises(DataError, match=message):
        model_fit.check(model)


@pytest.mark.parametrize("case", REFUSED)
def test_the_trainer_refuses_them_too(
    model_dir: Build, trainer: Build, rows: Any, case: str
) -> None:
    change, message = REFUSED[case]
    model = model_dir("llama")
    edit(model, change)
    with pytest.raises(DataError, match=message):
        trainer(model, rows(4, 24, 2))


@pytest.mark.parametrize(
    "model_type",
    [
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3",
        "opt", "olmo2", "granite", "mixtral", "phimoe", "llama4_text", "bloom", "mamba",
    ],
)  # fmt: skip
def test_what_each_architecture_saves_is_whole(model_dir: Build, model_type: str) -> None:
    model_fit.check(model_dir(model_type))


def test_more_layers_in_the_configuration_than_in_the_weights_are_refused(model_dir: Build) -> None:
    model = model_dir("llama")
    set_config(model, num_hidden_layers=6)
    with pytest.raises(DataError, match=r"lack the tensors model.layers.2.* and 33 more"):
        model_fit.check(model)


def set_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "config.json: transformers cannot read it: .*hidden_size"),
        ({"num_attention_heads": 5}, "config.json: "),
    ],
)
def test_a_configuration_that_is_no_model_is_named(
    model_dir: Build, changes: dict[str, object], message: str
) -> None:
    model = model_dir("llama")
    set_config(model, **changes)
    with pytest.raises(DataError, match=message):
        model_fit.check(model)


def test_a_tensor_that_is_no_part_of_the_model_is_left_aside(model_dir: Build) -> None:
    model = model_dir("llama")
    edit(model, lambda t: t.update({"score.weight": torch.zeros(2, 32)}))
    model_fit.check(model)


def test_no_value_is_read(model_dir: Build, tmp_path: Path) -> None:
    model = shutil.copytree(model_dir("llama"), tmp_path / "copy")
    file = model / "model.safetensors"
    size = file.stat().st_size
    head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as opened:
        opened.truncate(head)
        opened.truncate(size)  # sparse: the values are a hole
    model_fit.check(model)
    assert file.stat().st_blocks * 512 < size
