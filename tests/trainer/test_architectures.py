"""Any transformers causal LM trains as a plain loop over single documents would train it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cptjob_trainer.model import attention, isolation
from cptjob_trainer.training.schedule import learning_rate

PACKED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3",
    "opt", "olmo2", "granite", "mixtral",
]  # fmt: skip
LEAKING = ["bloom", "mamba"]
WINDOW_IN_THE_MASK = ["phimoe", "llama4_text"]


def plain_losses(path: Path, trainer: Any, steps: int, decay: float = 0.1) -> list[float]:
    """transformers' own model and loss, one document at a time, and torch's AdamW: no code of ours."""
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    lm.config.use_cache = False
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in lm.parameters() if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in lm.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    result = []
    for step in range(steps):
        documents = []
        for number in range(step * 2, step * 2 + 2):
            source, index = trainer.batcher.mix.locate(number)
            row = trainer.batcher.sources[source].row(index)
            documents += np.split(row.tokens, row.starts[1:])
        targets = sum(len(document) - 1 for document in documents)
        total = 0.0
        for document in documents:
            ids = torch.from_numpy(document).unsqueeze(0)
            loss = lm(input_ids=ids, labels=ids).loss * (len(document) - 1) / targets
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate("Cosine", step, 20, peak=1e-3, floor=1e-4, warmup_steps=2)
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.append(total)
    return result


@pytest.mark.parametrize("model_type", PACKED)
def test_two_packed_documents_give_the_logits_of_two_alone(
    model_type: str, model_dir: Callable[..., Path]
) -> None:
    lm = AutoModelForCausalLM.from_pretrained(model_dir(model_type), dtype=torch.float32).eval()
    assert isolation.settle(lm)
    with torch.no_grad():
        assert isolation.leak(lm) < 1e-5


@pytest.mark.parametrize("model_type", [*PACKED, *LEAKING])
def test_whether_documents_may_share_a_row_is_found_without_the_weights(
    model_type: str, model_dir: Callable[..., Path]
) -> None:
    assert isolation.packs(model_dir(model_type)) == (model_type in PACKED)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", *WINDOW_IN_THE_MASK])
def test_windows_longer_than_the_trial_documents_are_kept(
    model_type: str, model_dir: Callable[..., Path]
) -> None:
    path = model_dir(
        model_type, **({} if model_type in WINDOW_IN_THE_MASK else {"sliding_window": 32})
    )
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(3, 128, (1, 100), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(100).unsqueeze(0)
    with torch.no_grad():
        expected = lm(input_ids=ids, position_ids=positions, use_cache=False).logits
        packs = isolation.settle(lm)
        ours = isolation._logits(lm, ids, positions)
    assert packs
    assert (lm.config._attn_implementation == attention.NAME) == (
        model_type not in WINDOW_IN_THE_MASK
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", PACKED)
def test_twenty_packed_steps_lose_what_a_plain_loop_over_single_documents_loses(
    model_type: str,
    model_dir: Callable[..., Path],
    rows: Callable[..., Any],
    trainer: Callable[..., Any],
    run_steps: Callable[..., list[float]],
) -> None:
    path = model_dir(model_type)
    ours = trainer(path, rows(40, 24, 3))
    expected = plain_losses(path, ours, 20)
    assert run_steps(ours, 20) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("model_type", LEAKING)
def test_twenty_unpacked_steps_of_a_leaking_architecture_do_so_too(
    model_type: str,
    model_dir: Callable[..., Path],
    rows: Callable[..., Any],
    trainer: Callable[..., Any],
    run_steps: Callable[..., list[float]],
) -> None:
    path = model_dir(model_type)
    ours = trainer(path, rows(40, 20, 1), packed=False)
    expected = plain_losses(path, ours, 20)
    assert run_steps(ours, 20) == pytest.approx(expected, rel=2e-5)
