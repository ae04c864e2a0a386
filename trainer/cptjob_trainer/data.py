"""From global row numbers to micro-batches on the device.

Which rows a step takes, and which rank gets which of them, is arithmetic on the step number: the
state of the data pipeline is one integer. A thread reads the next step's rows while this one trains.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cptjob_trainer import attention
from cptjob_trainer.loss import IGNORE
from cptjob_trainer.mix import Mix
from cptjob_trainer.model import Batch
from cptjob_trainer.rows import Row

# Rows of one document piece are padded to a multiple of this rather than to the full length.
PAD_MULTIPLE = 64


@dataclass(frozen=True)
class Rows:
    """Rows as arrays. ids, positions, targets: int64 [rows, length]; numbers: global row numbers."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    numbers: tuple[int, ...]

    def targets_count(self) -> int:
        return int((self.targets != IGNORE).sum())

    def head(self, tokens: int) -> "Rows":
        """The first tokens of the first row, each the target of the one before, masked or not."""
        part = (slice(1), slice(tokens))
        ids, positions = self.ids[part], self.positions[part]
        targets = torch.full_like(ids, IGNORE)
        targets[:, :-1] = torch.where(positions[:, 1:] > 0, ids[:, 1:], IGNORE)
        return Rows(ids, positions, targets, self.numbers[:1])


@dataclass
class StepRows:
    """What one rank trains in one step: its micro-batches and their counts."""

    micro_batches: list[Rows]
    targets: int = 0
    # Tokens and padding, by position in the list of sources.
    tokens_by_source: dict[int, int] = field(default_factory=dict)
    tokens: int = 0
    slots: int = 0


def arrange(rows: Sequence[Row], numbers: Sequence[int], length: int, pad_id: int) -> Rows:
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
    return Rows(
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


def padded_length(rows: Sequence[Row], max_length: int, packed: bool) -> int:
    """Length of a micro-batch: always the full one when packed, so that compiled code is reused."""
    if packed:
        return max_length
    longest = max((len(row.tokens) for row in rows), default=1)
    return min(max_length, -(-max(longest, 1) // PAD_MULTIPLE) * PAD_MULTIPLE)


class Batcher:
    """The rows of each step for one rank of `world`.

    A step's global rows are [step*B, (step+1)*B); rank r takes those at positions r, r+world, ... .
    Rows beyond the last, and those that fill a world size which does not divide B, have weight 0.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        mix: Mix,
        *,
        global_batch: int,
        micro_batch: int,
        max_length: int,
        pad_id: int,
        packed: bool,
        rank: int,
        world: int,
    ) -> None:
        self.sources, self.mix = sources, mix
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.max_length, self.pad_id, self.packed = max_length, pad_id, packed
        self.rank, self.world = rank, world
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rows")

    def step(self, step: int) -> StepRows:
        """Read this rank's rows of 0-based `step`. Every rank gets the same number of micro-batches."""
        per_rank = -(-self.global_batch // self.world)
        result = StepRows([])
        picked: list[Row] = []
        numbers: list[int] = []
        for slot in range(per_rank):
            position = slot * self.world + self.rank
            number = step * self.global_batch + position
            row = empty_row()
            if position < self.global_batch and number < self.mix.total_rows:
                source, index = self.mix.locate(number)
                row = self.sources[source].row(index)
                result.tokens += len(row.tokens)
                result.tokens_by_source[source] = result.tokens_by_source.get(source, 0) + len(
                    row.tokens
                )
            picked.append(row)
            numbers.append(number)
        for start in range(0, per_rank, self.micro_batch):
            part = picked[start : start + self.micro_batch]
            length = padded_length(part, self.max_length, self.packed)
            rows = arrange(part, numbers[start : start + self.micro_batch], length, self.pad_id)
            result.micro_batches.append(rows)
            result.targets += rows.targets_count()
            result.slots += rows.ids.numel()
        return result

    def steps(self, first: int, last: int) -> Iterator[StepRows]:
        """Steps first..last-1, each read while the one before it trains."""
        if first >= last:
            return
        pending = self._reader.submit(self.step, first)
        for step in range(first, last):
            ready = pending.result()
            if step + 1 < last:
                pending = self._reader.submit(self.step, step + 1)
            yield ready

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)


def to_device(rows: Rows, device: torch.device, documents: bool) -> Batch:
    """Copy to the device; `documents` adds the borders that `packed_attention` wants."""
    extra = attention.document_arguments(rows.positions, device) if documents else {}
    copy = {"device": device, "non_blocking": True}
    return Batch(
        ids=rows.ids.to(**copy),  # type: ignore[call-overload]
        positions=rows.positions.to(**copy),  # type: ignore[call-overload]
        targets=rows.targets.to(**copy),  # type: ignore[call-overload]
        rows=rows.numbers,
        documents=extra,
    )
