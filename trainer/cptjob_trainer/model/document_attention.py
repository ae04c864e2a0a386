"""Causal attention of each document by itself, as one operator with its own backward pass.

PyTorch's CPU kernel works in squares of up to 512 keys, masked or not. Here a block of queries meets
only the keys from its first document's start up to its last query, in plain matrix products, which
are fast in bf16; the backward pass computes the probabilities again. Key heads are shared without
copies. Scores and softmax are fp32.

Blocks lie on a grid, not on documents' borders: oneDNN compiles code for each shape of a product and
keeps it, so there should be few shapes.

It is made for CPUs and runs anywhere. It is a custom operator because the borders differ in every
batch: compiled code calls it as it is.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Keys begin at multiples of this, and so do queries.
GRID = 64
# Queries of a block, times the query heads of a key head, are at least this many rows of a product.
BLOCK = 128


@dataclass(frozen=True)
class _Block:
    """Queries [start, end) of one row and the keys [first, end) that any of them sees."""

    row: int
    start: int
    end: int
    first: int
    # fp32 [queries, some of the first keys], -inf where a query does not see so far back.
    unseen: torch.Tensor


def _blocks(
    query: torch.Tensor, key: torch.Tensor, borders: torch.Tensor, window: int
) -> tuple[_Block, ...]:
    """The blocks of query [b, H, T, d] over key [b, K, T, d]; for the rest see `document_attention`."""
    step = max(GRID, BLOCK // (query.shape[1] // key.shape[1]))
    return _lay_out(tuple(borders.tolist()), query.shape[2], step, window, query.device)


@lru_cache(maxsize=4)  # every layer asks for the same ones, forward and backward
def _lay_out(
    borders: tuple[int, ...], length: int, step: int, window: int, device: torch.device
) -> tuple[_Block, ...]:
    flat = torch.tensor(borders)
    begins = torch.repeat_interleave(flat[:-1], flat.diff()).view(-1, length) % length
    # The first key that a query sees; it never goes back along the row.
    nearest = torch.arange(length) - window + 1 if window else torch.zeros_like(begins)
    lowest = begins.maximum(nearest)
    blocks = []
    for row, bounds in enumerate(lowest.tolist()):
        for start in range(0, length, step):
            end = min(start + step, length)
            first = bounds[start] // GRID * GRID
            before = torch.arange(first, bounds[end - 1]) < lowest[row, start:end].unsqueeze(1)
            unseen = torch.zeros(before.shape).masked_fill_(before, float("-inf"))
            blocks.append(_Block(row, start, end, first, unseen.to(device)))
    return tuple(blocks)


@lru_cache(maxsize=4)
def _triangle(queries: int, device: torch.device) -> torch.Tensor:
    """-inf where a query of a block is before a key of it."""
    return torch.full((queries, queries), float("-inf"), device=device).triu(1)


def _fold(x: torch.Tensor, block: _Block, heads: int) -> torch.Tensor:
    """[b, H, T, d] -> [heads, H / heads * n, d]: the block of all query heads of each key head."""
    part = x[block.row, :, block.start : block.end]
    return part.reshape(heads, -1, x.shape[3])


def _unfold(x: torch.Tensor, block: _Block) -> torch.Tensor:
    """[heads, H / heads * n, d] -> [H, n, d]."""
    return x.view(-1, block.end - block.start, x.shape[2])


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, block: _Block, scale: float
) -> torch.Tensor:
    """softmax of query [K, g * n, d] times key [K, m, d], fp32 [K, g * n, m]; both in fp32."""
    n, m = block.end - block.start, block.end - block.first
    scores = torch.bmm(query * scale, key.transpose(1, 2))
    by_query = scores.view(-1, n, m)
    by_query[:, :, m - n :].add_(_triangle(n, scores.device))
    if block.unseen.numel():
        by_query[:, :, : block.unseen.shape[1]].add_(block.unseen)
    return torch.softmax(scores, -1)


@torch.library.custom_op("cptjob::document_attention", mutates_args=())
def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """query [b, H, T, d], key [b, K, T, d], value [b, K, T, e] -> [b, T, H, e]; K divides H.

    borders: int32, on the CPU: where pieces begin and the last one ends, in rows laid end to end.
    window: keys that a query sees, itself included; 0 for all.
    """
    batch, heads, length, _ = query.shape
    key_heads = key.shape[1]
    out = query.new_empty(batch, length, heads, value.shape[3])
    value = value.contiguous()
    key32 = key.float().contiguous()
    for block in _blocks(query, key, borders, window):
        keys = slice(block.first, block.end)
        folded = _fold(query, block, key_heads)
        weights = _probabilities(folded.float(), key32[block.row, :, keys], block, scale)
        result = torch.bmm(weights.to(value.dtype), value[block.row, :, keys])
        out[block.row, block.start : block.end] = _unfold(result, block).transpose(0, 1)
    return out


@document_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3])


@torch.library.custom_op("cptjob::document_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. grad: [b, T, H, e]."""
    key_heads = key.shape[1]
    grad = grad.transpose(1, 2)
    grad_query = torch.empty_like(query)
    key, value = key.contiguous(), value.contiguous()
    key32 = key.float()
    # Summed over blocks, so in fp32.
    grad_key = torch.zeros_like(key, dtype=torch.float32)
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    for block in _blocks(query, key, borders, window):
        row, keys = block.row, slice(block.first, block.end)
        folded, out = _fold(query, block, key_heads), _fold(grad, block, key_heads)
        weights = _probabilities(folded.float(), key32[row, :, keys], block, scale)
        grad_value[row, :, keys] += torch.bmm(weights.to(out.dtype).transpose(1, 2), out)
        grad_weights = torch.bmm(out, value[row, :, keys].transpose(1, 2)).float()
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32)
        grad_scores = grad_scores.to(out.dtype)
        part = torch.bmm(grad_scores, key[row, :, keys]).mul_(scale)
        grad_query[row, :, block.start : block.end] = _unfold(part, block)
        grad_key[row, :, keys] += torch.bmm(grad_scores.transpose(1, 2), folded)
    return grad_query, grad_key.mul_(scale).to(key.dtype), grad_value.to(value.dtype)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query),
        torch.empty_like(key, memory_format=contiguous),
        torch.empty_like(value, memory_format=contiguous),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> Any:
    query, key, value, borders = ctx.saved_tensors
    return *_backward(grad, query, key, value, borders, ctx.scale, ctx.window), None, None, None


document_attention.register_autograd(_differentiate, setup_context=_keep)
