"""One step is the same step however it is divided, and no token counts twice."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cptjob import estimate
from cptjob_trainer.config import Dropout, Guards
from cptjob_trainer.errors import ConfigError, Stopped
from cptjob_trainer.model import activations, dropout
from cptjob_trainer.model import causal as model
from cptjob_trainer.training.optimizer import checkpoint_tensors

Build = Callable[..., Any]


def test_micro_batches_of_any_size_give_the_same_losses(
    model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama"), rows(40, 24, 2)
    whole = run_steps(trainer(path, data, batch=4, micro=4, total_steps=10), 10)
    parts = run_steps(trainer(path, data, batch=4, micro=1, total_steps=10), 10)
    uneven = run_steps(trainer(path, data, batch=4, micro=3, total_steps=10), 10)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert uneven == pytest.approx(whole, rel=1e-5)


def test_activation_checkpointing_changes_no_loss(
    model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama"), rows(20, 24, 2)
    plain = run_steps(trainer(path, data, total_steps=8), 8)
    saved = run_steps(trainer(path, data, total_steps=8, activation_checkpointing="Full"), 8)
    assert saved == plain


@pytest.mark.parametrize(("memory", "wrapped"), [(1, True), (10**12, False)])
def test_activation_checkpointing_is_chosen_where_memory_is_short_and_changes_no_loss(
    memory: int,
    wrapped: bool,
    model_dir: Build,
    rows: Build,
    trainer: Build,
    run_steps: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, data = model_dir("llama"), rows(20, 24, 2)
    plain = run_steps(trainer(path, data, total_steps=8, activation_checkpointing="None"), 8)
    monkeypatch.setattr(activations, "host_memory", lambda: memory)
    chosen = trainer(path, data, total_steps=8, activation_checkpointing="Auto")
    names = [name for name, _ in chosen.model.named_parameters()]
    assert any("_checkpoint_wrapped_module" in name for name in names) == wrapped
    assert run_steps(chosen, 8) == plain


def test_an_estimate_asks_for_the_memory_that_the_trainer_asks_for(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    path = model_dir("llama")
    made = trainer(path, rows(20, 24, 2), total_steps=1, precision="Float32")
    shape = estimate.Shape.read(path)
    ours = activations.demand(made.model, made.config, made.runtime)
    assert ours == estimate.demand(made.config, shape, made.runtime.world)


def test_activation_checkpointing_draws_the_dropout_masks_it_drew_before(
    model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama"), rows(20, 24, 2)
    settings: dict[str, Any] = {
        "total_steps": 6,
        "dropout": Dropout(hidden=0.2, attention=0.2, feed_forward=0.2),
    }
    plain = run_steps(trainer(path, data, **settings), 6)
    saved = run_steps(trainer(path, data, activation_checkpointing="Full", **settings), 6)
    assert saved == plain


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox", "bloom"])
def test_dropout_belongs_to_rows_and_not_to_the_micro_batches_they_are_in(
    model_type: str, model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    # Weights large enough that what attention drops is seen in the loss.
    path = model_dir(model_type, initializer_range=0.2)
    packed = model_type != "bloom"
    # Rows that are not packed are of many lengths, each with others than its own beside it.
    data = rows(20, 24, 2) if packed else [*rows(10, 24, 1), *rows(10, 90, 1)]
    settings: dict[str, Any] = {
        "batch": 4, "total_steps": 6, "packed": packed, "length": 24 if packed else 96,
        "dropout": Dropout(hidden=0.3, attention=0.3),
    }  # fmt: skip
    whole = run_steps(trainer(path, data, micro=4, **settings), 6)
    parts = run_steps(trainer(path, data, micro=1, **settings), 6)
    without = run_steps(trainer(path, data, micro=4, **settings | {"dropout": Dropout()}), 6)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole != without


def test_dropout_of_a_kind_that_an_architecture_has_no_place_for_is_refused_by_name(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    with pytest.raises(ConfigError, match=r"training\.dropout\.feedForward"):
        trainer(model_dir("mamba"), rows(4, 24, 1), packed=False, dropout=Dropout(feed_forward=0.1))


def test_no_loss_is_taken_on_a_system_prompt_and_the_document_sees_it(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    path, prompt = model_dir("llama"), 5
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    data, expected, targets = [], 0.0, 0
    for row in rows(2, 24, 2):
        # Each of a row's documents begins with the prompt.
        masked = row.masked.copy()
        for start, end in itertools.pairwise([*row.starts.tolist(), len(row.tokens)]):
            masked[start : start + prompt] = True
            ids = torch.from_numpy(row.tokens[start:end]).unsqueeze(0)
            labels = ids.clone()
            labels[:, :prompt] = -100
            count = end - start - prompt
            expected += lm(input_ids=ids, labels=labels).loss.item() * count
            targets += count
        data.append(dataclasses.replace(row, masked=masked))
    built = trainer(path, data, batch=2, micro=1, total_steps=1)
    step_rows = built.batcher.step(0)
    assert step_rows.targets == targets
    assert built.step(step_rows, targets).loss == pytest.approx(expected / targets, rel=1e-5)


def test_another_seed_drops_other_elements() -> None:
    x = torch.ones(2, 50)
    drawn = []
    for seed in (1, 1, 2):
        with dropout.keyed(seed, (7, 9), enabled=True):
            drawn.append(torch.nn.functional.dropout(x, 0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_a_step_whose_gradients_are_not_finite_changes_nothing(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    built = trainer(model_dir("llama"), rows(8, 24, 2))
    with torch.no_grad():
        built.model.lm.model.norm.weight.fill_(float("inf"))
    before = {n: t.clone() for n, t in checkpoint_tensors(built.model, built.optimizer).items()}
    step = built.step(built.batcher.step(0), 40)
    after = checkpoint_tensors(built.model, built.optimizer)
    assert step.skipped
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_guard_against_gradients_that_are_not_finite_can_be_turned_off(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    built = trainer(model_dir("llama"), rows(8, 24, 2), guards=Guards(skip_non_finite=False))
    with torch.no_grad():
        built.model.lm.model.norm.weight.fill_(float("inf"))
    assert not built.step(built.batcher.step(0), 40).skipped


def test_lora_trains_adapters_only_and_starts_from_the_base_models_loss(
    model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama"), rows(2, 24, 2)
    full = run_steps(trainer(path, data, total_steps=12), 1)
    built = trainer(path, data, total_steps=12, lora={"rank": 4}, learning_rate=2e-2)
    frozen = {name: p.clone() for name, p in built.model.named_parameters() if not p.requires_grad}
    lost = run_steps(built, 12)
    assert lost[0] == pytest.approx(full[0], rel=1e-6)
    assert lost[-1] < lost[0]
    assert all(torch.equal(frozen[n], p) for n, p in built.model.named_parameters() if n in frozen)
    names = [name for name, _ in model.trainable(built.model)]
    assert names
    assert all(".lora_" in name for name in names)


def test_lora_targets_that_fit_no_layer_are_refused_with_the_names_that_would(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    with pytest.raises(ConfigError, match=r"training\.lora\.targetModules.*q_proj"):
        trainer(model_dir("llama"), rows(4, 24, 2), lora={"target_modules": ("nonsense",)})


def test_layers_that_cannot_have_adapters_are_refused_with_the_reason(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    with pytest.raises(
        ConfigError, match=r"all-linear cannot .*: .*incompatible with Mamba.*x_proj"
    ):
        trainer(model_dir("mamba"), rows(4, 24, 1), packed=False, lora={})


def test_bfloat16_keeps_fp32_weights_and_learns_the_same(
    model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama"), rows(10, 24, 2)
    full = run_steps(trainer(path, data, total_steps=12), 12)
    built = trainer(path, data, total_steps=12, precision="BFloat16")
    assert run_steps(built, 12) == pytest.approx(full, rel=2e-2)
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}


def test_compiled_layers_lose_what_eager_ones_lose(
    model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama"), rows(10, 24, 2)
    eager = run_steps(trainer(path, data, total_steps=3), 3)
    compiled = run_steps(trainer(path, data, total_steps=3, compile="Always"), 3)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_dropout_of_a_lora_run_drops_the_sum_of_both_branches_and_belongs_to_rows(
    model_dir: Build, rows: Build, trainer: Build, run_steps: Build
) -> None:
    path, data = model_dir("llama"), rows(20, 24, 2)
    settings: dict[str, Any] = {
        "batch": 4, "total_steps": 4, "lora": {"rank": 4, "dropout": 0.1},
        "dropout": Dropout(hidden=0.3, feed_forward=0.2),
    }  # fmt: skip
    built = trainer(path, data, micro=4, **settings)
    layer = built.model.lm.model.layers[0].self_attn.o_proj
    assert layer._forward_hooks
    assert not layer.base_layer._forward_hooks
    parts = run_steps(trainer(path, data, micro=1, **settings), 4)
    assert parts == pytest.approx(run_steps(built, 4), rel=1e-5)


def test_a_stop_in_the_middle_of_a_long_step_saves_the_step_before_it(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    built = trainer(model_dir("llama"), rows(8, 24, 2), batch=4, micro=1)
    built.checkpoints.open()
    answers = iter([False, False, True])
    built.stop_asked = lambda: next(answers)
    built.warmup_steps = 2
    before = {n: t.clone() for n, t in checkpoint_tensors(built.model, built.optimizer).items()}
    with pytest.raises(Stopped, match="stopped after step 0 of"):
        built.run(None)
    after = checkpoint_tensors(built.model, built.optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in built.parameters)


def test_randomness_that_a_restart_cannot_repeat_is_refused_by_name(
    model_dir: Build, rows: Build, trainer: Build
) -> None:
    with pytest.raises(ConfigError, match="layerdrop"):
        trainer(model_dir("opt", layerdrop=0.1), rows(4, 24, 1))
