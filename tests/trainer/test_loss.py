"""The chunked loss is cross entropy, gradients included, whatever the chunks."""

import pytest
import torch
import torch.nn.functional as F

from cptjob_trainer.model import loss

VOCABULARY, WIDTH, TOKENS = 300, 16, 210


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("elements", [(1, 1), (2**15, 2**15), (2**25, 2**25)])
def test_loss_and_gradients_are_those_of_cross_entropy(
    bias: bool, elements: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", elements)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    offset = torch.randn(VOCABULARY, requires_grad=True) if bias else None
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    targets[::7] = loss.IGNORE
    inputs = [t for t in (hidden, weight, offset) if t is not None]

    ours = loss.linear_cross_entropy(hidden, weight, offset, targets) / 7
    got = torch.autograd.grad(ours, inputs)
    plain = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="sum") / 7
    expected = torch.autograd.grad(plain, inputs)

    torch.testing.assert_close(ours, plain)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_written_for_compiling_is_the_plain_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, VOCABULARY, dtype=dtype) * 4
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    targets[::7] = loss.IGNORE
    other = loss.softmax_gradient_to_compile(logits, targets)
    one = loss.softmax_gradient(logits, targets)
    torch.testing.assert_close(one, other)


def test_the_scale_of_the_loss_is_not_rounded_in_gradients_of_half_precision() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    # In bf16 it would be a third of a percent less.
    scale = 1 / 16328
    (plain,) = torch.autograd.grad(loss.linear_cross_entropy(hidden, weight, None, targets), hidden)
    (scaled,) = torch.autograd.grad(
        loss.linear_cross_entropy(hidden, weight, None, targets) * scale, hidden
    )
    assert torch.equal(scaled, (plain.float() * scale).bfloat16())


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    value = loss.linear_cross_entropy(hidden, weight, None, torch.zeros(TOKENS, dtype=torch.int64))
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_without_targets_the_loss_is_zero_and_finite() -> None:
    hidden = torch.randn(4, WIDTH, requires_grad=True)
    targets = torch.full((4,), loss.IGNORE)
    value = loss.linear_cross_entropy(hidden, torch.randn(VOCABULARY, WIDTH), None, targets)
    value.backward()
    assert value.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_chunks_hold_no_more_logits_than_the_bound() -> None:
    for vocabulary, width in ((49_152, 576), (128_256, 4096), (2048, 64)):
        rows = loss.chunk_rows(vocabulary, width, "cpu")
        assert rows % 64 == 0
        assert rows == 64 or rows * vocabulary <= loss.CHUNK_ELEMENTS["cpu"][1]
