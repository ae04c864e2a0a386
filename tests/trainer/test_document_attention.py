"""The attention of documents, against PyTorch's own on each document alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cptjob_trainer.model.document_attention import document_attention

# Rows of 160: pieces shorter than a block, longer than one, and of a single token.
PIECES = ([0, 1, 40, 160], [0, 160], [0, 159, 160])
LENGTH = 160


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int
) -> torch.Tensor:
    """[b, H, T, d] and [b, K, T, d] -> [b, T, H, d]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    rows = []
    for row, starts in enumerate(PIECES):
        parts = []
        for start, end in itertools.pairwise(starts):
            mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            mask = mask.triu(1 - window) if window else mask
            q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, mask, scale=0.3))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows).transpose(1, 2)


def inputs(key_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key, value as models give them, transposed, and where pieces begin."""
    torch.manual_seed(0)
    shapes = [(3, LENGTH, heads, 8) for heads in (4, key_heads, key_heads)]
    tensors = [torch.randn(shape, dtype=dtype).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def borders() -> torch.Tensor:
    flat = [row * LENGTH + start for row, starts in enumerate(PIECES) for start in starts[:-1]]
    return torch.tensor([*flat, len(PIECES) * LENGTH], dtype=torch.int32)


@pytest.mark.parametrize("window", [0, 7, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_output_and_gradients_are_those_of_each_document_alone(key_heads: int, window: int) -> None:
    tensors = inputs(key_heads, torch.float32)
    grad = torch.randn(3, LENGTH, 4, 8)
    expected = reference(*tensors, window)
    found = document_attention(*tensors, borders(), 0.3, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, grad),
        torch.autograd.grad(expected, tensors, grad),
        atol=1e-5,
        rtol=1e-4,
    )


def test_bf16_is_about_as_near_to_fp32_as_pytorchs_own() -> None:
    tensors = inputs(2, torch.bfloat16)
    exact = reference(*(tensor.float() for tensor in tensors), 0)
    theirs = (reference(*tensors, 0).float() - exact).norm()
    ours = (document_attention(*tensors, borders(), 0.3, 0).float() - exact).norm()
    assert ours < 1.5 * theirs


def test_it_keeps_the_rules_of_an_operator_that_is_compiled() -> None:
    torch.library.opcheck(document_attention, (*inputs(2, torch.float32), borders(), 0.3, 7))
