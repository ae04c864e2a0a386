"""Which row comes when: a pure function of (seed, global index). A resume needs one integer.

The global rows are cut into blocks of 4096 to 8191. How many rows of a block come from each source
is exact arithmetic, so the shares hold all through the training and not only on average. The order
inside a block is that of a keyed hash; the order of a source's rows in an epoch is a keyed
permutation of its own. Nothing here uses a random number generator of a library: the order must not
change with a version of numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cptjob_trainer.errors import ConfigError

# Blocks are at least this long. A source's count in a block is then never negative, whatever the
# shares, as long as there are at most MAX_SOURCES of them: 4096 / 64 >= 64 - 1.
BLOCK = 4096
MAX_SOURCES = 64

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 4


def splitmix64(value: int) -> int:
    """The finaliser of splitmix64: a permutation of 64-bit integers that looks random."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def splitmix64_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`splitmix64` of each element."""
    values = values + np.uint64(_GAMMA)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key from several integers, order included."""
    result = 0
    for part in parts:
        result = splitmix64(result ^ (part & _MASK))
    return result


def permute(index: int, size: int, permutation_key: int) -> int:
    """Where a keyed permutation of range(size) sends `index`; takes constant time and memory.

    A Feistel network permutes the next power of four; cycle walking brings the result into range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_FEISTEL_ROUNDS):
            mixed = splitmix64(permutation_key ^ (number << 60) ^ right)
            left, right = right, left ^ (mixed & mask)
        index = (left << half) | right
        if index < size:
            return index


@dataclass(frozen=True)
class Place:
    """Where a global row comes from. `epoch` is that of the source, from 0."""

    source: int
    row: int
    epoch: int


class Mix:
    """The order of rows over the whole training.

    `rows_per_source[s]` rows exist in source s; `quotas[s]` of them are drawn over the training, so
    source s is seen quotas[s] / rows_per_source[s] times.
    """

    def __init__(self, rows_per_source: Sequence[int], quotas: Sequence[int], seed: int) -> None:
        if not rows_per_source or len(rows_per_source) != len(quotas):
            raise ValueError("rows_per_source and quotas must be of one length, at least 1")
        if len(quotas) > MAX_SOURCES:
            raise ConfigError(
                f"datasets: at most {MAX_SOURCES} data sets can be mixed, not {len(quotas)}; "
                "join some of them"
            )
        if any(quota < 0 for quota in quotas) or any(
            quota > 0 and rows < 1 for rows, quota in zip(rows_per_source, quotas, strict=True)
        ):
            raise ValueError("a quota needs rows to draw from")
        self.rows_per_source = tuple(rows_per_source)
        self.quotas = tuple(quotas)
        self.seed = seed
        self.total_rows = sum(quotas)
        self._blocks = max(1, self.total_rows // BLOCK)
        self._largest = max(range(len(quotas)), key=lambda source: quotas[source])
        self._block = lru_cache(maxsize=4)(self._compute_block)

    def locate(self, i: int) -> tuple[int, int]:
        """(source, row) of global row `i`. IndexError outside range(total_rows)."""
        place = self.place(i)
        return place.source, place.row

    def place(self, i: int) -> Place:
        """As `locate`, with the source's epoch."""
        if not 0 <= i < self.total_rows:
            raise IndexError(f"global row {i} is outside 0..{self.total_rows - 1}")
        block = ((i + 1) * self._blocks - 1) // self.total_rows
        start = self._start(block)
        sources, numbers = self._block(block)
        source, number = int(sources[i - start]), int(numbers[i - start])
        epoch, index = divmod(number, self.rows_per_source[source])
        permutation_key = key(self.seed, 1, source, epoch)
        return Place(source, permute(index, self.rows_per_source[source], permutation_key), epoch)

    def drawn(self, i: int) -> tuple[int, ...]:
        """Rows of each source that stand before the block border `i`."""
        drawn = [quota * i // self.total_rows for quota in self.quotas]
        drawn[self._largest] += i - sum(drawn)
        return tuple(drawn)

    def _start(self, block: int) -> int:
        return block * self.total_rows // self._blocks

    def _compute_block(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each row of a block: its source, and how many rows of that source came before."""
        start, end = self._start(block), self._start(block + 1)
        first = np.array(self.drawn(start), dtype=np.int64)
        counts = np.array(self.drawn(end), dtype=np.int64) - first
        hashes = splitmix64_array(
            np.arange(end - start, dtype=np.uint64) ^ np.uint64(key(self.seed, 2, block))
        )
        order = np.argsort(hashes, kind="stable")
        sources = np.repeat(np.arange(len(counts)), counts)[order]
        numbers = np.empty(end - start, dtype=np.int64)
        for source in np.flatnonzero(counts):
            places = np.flatnonzero(sources == source)
            numbers[places] = first[source] + np.arange(len(places))
        return sources, numbers
