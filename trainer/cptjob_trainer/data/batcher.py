"""From step numbers to micro-batches.

Which rows a step takes, and which rank gets which of them, is arithmetic on the step number: the
state of the data pipeline is one integer. A thread reads the next step's rows while this one trains.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cptjob_trainer.data.batch import Batch, BatchShape, empty_row
from cptjob_trainer.data.mix import Mix
from cptjob_trainer.data.rows import Row


@dataclass
class StepRows:
    """What one rank trains in one step: its micro-batches and their counts."""

    micro_batches: list[Batch]
    targets: int = 0
    # Of documents, by position in the list of sources. A repeated system prompt is no part of them.
    tokens_by_source: dict[int, int] = field(default_factory=dict)
    # Places in the arrays: those of tokens, system prompts included, and all, padding included.
    filled: int = 0
    slots: int = 0


class Batcher:
    """The rows of each step for one rank of `world`.

    A step's global rows are [step*B, (step+1)*B); rank r takes those at positions r, r+world, ... .
    Rows beyond the last, and those that fill a world size which does not divide B, have weight 0.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        mix: Mix,
        shape: BatchShape,
        *,
        global_batch: int,
        rank: int,
        world: int,
    ) -> None:
        self.sources, self.mix, self.shape = sources, mix, shape
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rows")

    def step(self, step: int) -> StepRows:
        """Read this rank's rows of 0-based `step`. Every rank gets the same number of micro-batches."""
        result = StepRows([])
        picked: list[Row] = []
        numbers: list[int] = []
        for slot in range(-(-self.global_batch // self.world)):
            position = slot * self.world + self.rank
            number = step * self.global_batch + position
            row = empty_row()
            if position < self.global_batch and number < self.mix.total_rows:
                source, index = self.mix.locate(number)
                row = self.sources[source].row(index)
                known = result.tokens_by_source.get(source, 0)
                result.tokens_by_source[source] = known + len(row.tokens) - int(row.masked.sum())
                result.filled += len(row.tokens)
            picked.append(row)
            numbers.append(number)
        size = self.shape.micro_batch
        for start in range(0, len(picked), size):
            end = start + size
            batch = self.shape.arrange(picked[start:end], numbers[start:end])
            result.micro_batches.append(batch)
            result.targets += batch.targets_count()
            result.slots += batch.ids.numel()
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
