"""The attention that keeps documents of one row apart.

Positions restart at each document piece. transformers' masking code reads document borders off that
restart (`find_packed_sequence_indices`), as long as no cache and no other mask is given, but it then
computes a row's full square of scores. `packed_attention` computes only each document's own: with
`document_attention`, and on a GPU with the varlen kernel. isolation.py finds out where it may be used.
"""

import inspect
import itertools
from typing import Any

import torch

from cptjob_trainer.model import dropout as keyed_dropout
from cptjob_trainer.model.document_attention import document_attention

NAME = "cptjob_packed"
# Arguments some architectures give their attention that a plain softmax(QK)V does not honour.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


def borders(position_ids: torch.Tensor) -> list[list[int]]:
    """Start of each document piece in each row of `position_ids` [rows, length], end included.

    Positions that do not follow on from the one before begin a piece.
    """
    first = position_ids[:, :1] - 1
    breaks = torch.diff(position_ids, prepend=first, dim=1) != 1
    breaks[:, 0] = True
    length = position_ids.shape[1]
    return [[*row.nonzero().flatten().tolist(), length] for row in breaks]


def _repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """x: [..., heads, T, d]."""
    return x if times == 1 else x.repeat_interleave(times, dim=-3)


def _with_dropout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    p: float,
    row: int,
    place: tuple[int, ...],
) -> torch.Tensor:
    """Attention of one document written out, for the mask of dropped scores must be our own."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = scores.masked_fill(~_causal(q.shape[-2], window, q.device), float("-inf"))
    weights = scores.softmax(-1).to(q.dtype)
    return (weights * keyed_dropout.keep_mask(weights, p, row, place)) @ v


def _causal(length: int, window: int, device: torch.device) -> torch.Tensor:
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask.triu(1 - window) if window else mask


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_document_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders_flat: torch.Tensor,
    scale: float,
    dropout: float,
    window: int,
) -> torch.Tensor:
    """[b, heads, T, d] x 3 -> [b, T, heads, d]; one causal attention for each piece of each row."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    place = keyed_dropout.next_place()
    outputs = []
    for begin, end in itertools.pairwise(borders_flat.tolist()):
        row, start = divmod(begin, length)
        q, k, v = (x[row, :, start : start + end - begin] for x in (query, key, value))
        k, v = _repeat_heads(k, groups), _repeat_heads(v, groups)
        outputs.append(_with_dropout(q, k, v, scale, window, dropout, row, (*place, start)))
    result = torch.cat(outputs, dim=1).transpose(0, 1)
    return result.reshape(batch, length, heads, -1)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders_flat: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    """The same on a GPU: rows laid end to end, one flash kernel for all pieces of the batch."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    batch, _, length, _ = query.shape
    q, k, v = (
        _repeat_heads(x, n).transpose(1, 2).flatten(0, 1)
        for x, n in ((query, 1), (key, groups), (value, groups))
    )
    out = varlen_attn(
        q, k, v, borders_flat, borders_flat, longest, longest,
        scale=scale, window_size=(window - 1 if window else -1, 0),
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    rows: torch.Tensor = out.unflatten(0, (batch, length))
    return rows


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_borders: torch.Tensor | None = None,
    document_borders_host: torch.Tensor | None = None,
    longest_document: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers' registry; shapes [b, heads, T, d] -> [b, T, heads, d].

    `document_borders` (int32: where pieces begin and the last one ends, in rows laid end to end)
    come from the trainer through the model's keyword arguments, on the device and on the host.
    Raises TypeError for a kind of attention it would compute wrongly.
    """
    odd = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if odd or attention_mask is not None or not getattr(module, "is_causal", True):
        raise TypeError(f"{NAME} does not do {odd or 'masks'}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or 0
    if torch.is_autocast_enabled(query.device.type):
        # Rotary positions are fp32 and make queries and keys fp32 again.
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if document_borders is None or document_borders_host is None:
        raise TypeError(f"{NAME} was called without the documents' borders")
    host = document_borders_host
    if dropout:
        return _by_document_with_dropout(query, key, value, host, scale, dropout, window), None
    # The kernel knows half precision only.
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(query, key, value, document_borders, longest_document, scale, window), None
    return document_attention(query, key, value, host, scale, window), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Registered as the mask of `packed_attention`: the borders say it all."""


def register() -> None:
    """Make `packed_attention` known to transformers under NAME."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def document_arguments(position_ids: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Keyword arguments that tell `packed_attention` the borders of `position_ids` [b, T] (on CPU)."""
    length = position_ids.shape[1]
    pieces = enumerate(borders(position_ids))
    flat = [row * length + start for row, starts in pieces for start in starts[:-1]]
    host = torch.tensor([*flat, position_ids.numel()], dtype=torch.int32)
    return {
        "document_borders": host.to(device, non_blocking=True),
        "document_borders_host": host,
        # Fixed for a run, so that compiled code is not made anew for every batch.
        "longest_document": length,
    }


def accepts_positions(model: torch.nn.Module) -> bool:
    """Whether the model's forward takes `position_ids`; one that does not cannot be packed."""
    return "position_ids" in inspect.signature(model.forward).parameters
