"""A micro-batch: rows of a source laid into arrays, with what the model is told about them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cptjob_trainer.data.rows import Row
from cptjob_trainer.model import attention
from cptjob_trainer.model.loss import IGNORE

# Rows of one document piece are padded to a multiple of this rather than to the full length.
PAD_MULTIPLE = 64


@dataclass(frozen=True)
class Batch:
    """Rows as arrays. ids, positions, targets: int64 [rows, length]; numbers: global row numbers."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    numbers: tuple[int, ...]
    # Keyword arguments naming the documents' borders; empty when rows hold one piece each.
    documents: dict[str, Any] = field(default_factory=dict)

    def targets_count(self) -> int:
        return int((self.targets != IGNORE).sum())

    def head(self, tokens: int) -> "Batch":
        """The first tokens of the first row, each the target of the one before, masked or not."""
        part = (slice(1), slice(tokens))
        ids, positions = self.ids[part], self.positions[part]
        targets = torch.full_like(ids, IGNORE)
        targets[:, :-1] = torch.where(positions[:, 1:] > 0, ids[:, 1:], IGNORE)
        return Batch(ids, positions, targets, self.numbers[:1])

    def to(self, device: torch.device, documents: bool) -> "Batch":
        """On the device; `documents` adds the borders that `packed_attention` wants."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            documents=attention.document_arguments(self.positions, device) if documents else {},
        )


@dataclass(frozen=True)
class BatchShape:
    """How rows are laid into micro-batches: how many, how long, with what as padding."""

    micro_batch: int
    max_length: int
    pad_id: int
    packed: bool
    # Whether anything is dropped in training. Masks are drawn in the shape of the padded row, which
    # must then not depend on the rows beside it.
    dropping: bool = False

    def arrange(self, rows: Sequence[Row], numbers: Sequence[int]) -> Batch:
        """One micro-batch of these rows."""
        return arrange(rows, numbers, self._length(rows), self.pad_id)

    def _length(self, rows: Sequence[Row]) -> int:
        """Always the full one when packed, so that compiled code is reused, and when dropping."""
        if self.packed or self.dropping:
            return self.max_length
        longest = max((len(row.tokens) for row in rows), default=1)
        return min(self.max_length, -(-max(longest, 1) // PAD_MULTIPLE) * PAD_MULTIPLE)


def arrange(rows: Sequence[Row], numbers: Sequence[int], length: int, pad_id: int) -> Batch:
    """Lay rows into arrays of [len(rows), length].

    positions restart at each piece; targets are the next token of the same piece, IGNORE elsewhere
    and where the next token is masked. Padding is one more piece, which no other sees.
    """
    shape = (len(rows), length)
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    for at, row in enumerate(rows):
        n = len(row.tokens)
        positions[at, n:] = np.arange(length - n)
        if n == 0:
            continue
        ids[at, :n] = row.tokens
        ends = np.append(row.starts[1:], n)
        positions[at, :n] = np.arange(n) - np.repeat(row.starts, ends - row.starts)
        follows = positions[at, 1:n] > 0
        targets[at, : n - 1] = np.where(follows & ~row.masked[1:n], row.tokens[1:n], IGNORE)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(targets),
        tuple(numbers),
    )


def empty_row() -> Row:
    """A row of weight 0: it fills a batch and teaches nothing."""
    return Row(
        tokens=np.zeros(0, np.int64), starts=np.zeros(0, np.int64), masked=np.zeros(0, np.bool_)
    )
