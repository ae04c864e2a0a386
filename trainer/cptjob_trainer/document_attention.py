"""Causal attention of each document by itself, as one operator with its own backward pass.

PyTorch's CPU kernel works in squares of up to 512 keys, masked or not. Here a block of queries meets
the keys up to its last query and no others, in plain matrix products, which are fast in bf16; the
backward pass computes the probabilities again. Key heads are shared without copies. Scores and
softmax are fp32.

It is made for CPUs and runs anywhere. It is a custom operator because the borders differ in every
batch: compiled code calls it as it is.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Rows of a product; more of them compute more of the square's useless half, fewer fill no core.
BLOCK = 128
LEAST_BLOCK = 64


@dataclass(frozen=True)
class _Block:
    """Queries [start, end) of one row, which see the keys from `first` on, as far as themselves."""

    row: int
    start: int
    end: int
    first: int


def _blocks(borders: torch.Tensor, length: int, groups: int, window: int) -> Iterator[_Block]:
    """All blocks. borders: where pieces begin and the last ends, with rows of `length` end to end."""
    step = max(LEAST_BLOCK, BLOCK // groups)
    for begin, end in itertools.pairwise(borders.tolist()):
        row, piece = divmod(begin, length)
        stop = piece + end - begin
        for start in range(piece, stop, step):
            first = max(piece, start - window + 1) if window else piece
            yield _Block(row, start, min(start + step, stop), first)


@lru_cache(maxsize=256)
def _triangle(queries: int, device: torch.device) -> torch.Tensor:
    """-inf where a query of a block is before a key of it."""
    return torch.full((queries, queries), float("-inf"), device=device).triu(1)


@lru_cache(maxsize=256)
def _too_far(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """-inf where a key is `window` or more before a query; the last key is the last query."""
    return torch.full((queries, keys), float("-inf"), device=device).tril(keys - queries - window)


def _fold(x: torch.Tensor, block: _Block, heads: int) -> torch.Tensor:
    """[b, H, T, d] -> [heads, H / heads * n, d]: the block of all query heads of each key head."""
    part = x[block.row, :, block.start : block.end]
    return part.reshape(heads, -1, x.shape[3])


def _unfold(x: torch.Tensor, block: _Block) -> torch.Tensor:
    """[heads, H / heads * n, d] -> [H, n, d]."""
    return x.view(-1, block.end - block.start, x.shape[2])


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, block: _Block, scale: float, window: int
) -> torch.Tensor:
    """softmax of query [K, g * n, d] times key [K, m, d], fp32 [K, g * n, m]; both in fp32."""
    n, m = block.end - block.start, block.end - block.first
    scores = torch.bmm(query * scale, key.transpose(1, 2))
    by_query = scores.view(-1, n, m)
    by_query[:, :, m - n :].add_(_triangle(n, scores.device))
    if window and m > window:
        by_query.add_(_too_far(n, m, window, scores.device))
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

    borders: int, on the CPU, see `_blocks`. window: keys that a query sees, itself included; 0 for all.
    """
    batch, heads, length, _ = query.shape
    key_heads = key.shape[1]
    out = query.new_empty(batch, length, heads, value.shape[3])
    value = value.contiguous()
    key32 = key.float().contiguous()
    for block in _blocks(borders, length, heads // key_heads, window):
        keys = slice(block.first, block.end)
        folded = _fold(query, block, key_heads)
        weights = _probabilities(folded.float(), key32[block.row, :, keys], block, scale, window)
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
    heads, length, key_heads = query.shape[1], query.shape[2], key.shape[1]
    grad = grad.transpose(1, 2)
    grad_query = torch.empty_like(query)
    key, value = key.contiguous(), value.contiguous()
    key32 = key.float()
    # Summed over blocks, so in fp32.
    grad_key = torch.zeros_like(key, dtype=torch.float32)
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    for block in _blocks(borders, length, heads // key_heads, window):
        row, keys = block.row, slice(block.first, block.end)
        folded, out = _fold(query, block, key_heads), _fold(grad, block, key_heads)
        weights = _probabilities(folded.float(), key32[row, :, keys], block, scale, window)
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
