"""Dropout whose masks belong to the rows, not to the process.

A mask is drawn from a generator seeded by (seed, global row, place in the network). So a row is
dropped the same way whichever rank, micro-batch or world size it is trained in, and again when
activation checkpointing computes a layer a second time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F


class _Place:
    """Where the forward pass is: which rows, which layer, and which dropout of it comes next."""

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        self.seed, self.rows = seed, rows
        self.layer, self.count = 0, 0

    def enter_layer(self, layer: int) -> None:
        # Counting anew in each layer gives a recomputed layer the numbers it had the first time.
        self.layer, self.count = layer, 0

    def next(self) -> tuple[int, int]:
        self.count += 1
        return self.layer, self.count


# One process trains one model, and the backward pass (which recomputes layers) runs in another
# thread on a GPU: so this is a plain module value, not a thread's.
_place: _Place | None = None
_plain_dropout = F.dropout


def _seed(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def next_place() -> tuple[int, ...]:
    """The next place in the network, for a caller that drops row by row under one place."""
    return _place.next() if _place is not None else ()


def apply(x: torch.Tensor, p: float) -> torch.Tensor:
    """Drop elements of x [b, ...] (or [b*T, ...], row after row) with probability p, and scale up."""
    if p == 0.0:
        return x
    if _place is None:
        return _plain_dropout(x, p, training=True)
    place, rows = _place.next(), len(_place.rows)
    shaped = x if x.shape[0] == rows else x.unflatten(0, (rows, -1))
    mask = torch.stack([keep_mask(part, p, at, place) for at, part in enumerate(shaped)])
    return (shaped * mask).view_as(x)


def keep_mask(x: torch.Tensor, p: float, row: int, place: tuple[int, ...]) -> torch.Tensor:
    """0 for what is dropped and 1 / (1 - p) for the rest, in the shape of x, which is of one row.

    `row` is its position in the micro-batch.
    """
    mask = torch.empty_like(x, requires_grad=False)
    if _place is None:
        return mask.bernoulli_(1.0 - p).div_(1.0 - p)
    generator = torch.Generator(device=x.device)
    generator.manual_seed(_seed(_place.seed, _place.rows[row], *place))
    return mask.bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def _functional(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return apply(input, p) if training else input


@contextmanager
def keyed(seed: int, rows: Sequence[int], enabled: bool) -> Iterator[None]:
    """Within, every `F.dropout` (and so `nn.Dropout`) draws the masks of these global rows."""
    global _place
    if not enabled:
        yield
        return
    _place = _Place(seed, rows)
    F.dropout = _functional
    try:
        yield
    finally:
        F.dropout = _plain_dropout
        _place = None


def mark_layers(layers: Sequence[torch.nn.Module]) -> None:
    """Tell the masks which layer the forward pass is in."""

    def hook(number: int) -> Any:
        def enter(*_: Any) -> None:
            if _place is not None:
                _place.enter_layer(number)

        return enter

    for number, layer in enumerate(layers, start=1):
        layer.register_forward_pre_hook(hook(number))
