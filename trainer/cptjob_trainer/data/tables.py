"""The tables of a source: which documents it has, which are held out, where its rows start.

    train/<n>/documents.bin, rows.bin      columns: see rows.py
    heldout/<n>/documents.bin, rows.bin

They are made in parts: memory does not grow with the corpus.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from cptjob_trainer.data.rows import DOCUMENT_COLUMNS, Layout, Table
from cptjob_trainer.data.tokens import Shard
from cptjob_trainer.errors import Stopped

# Documents that are looked at in one go: some MB of arrays.
_PART: Final = 1 << 18

# Hashes have 64 bits, so all are below this.
ALL: Final = 1 << 64


@dataclass(frozen=True)
class Part:
    """One part of a data set. `tables` is its directory, relative to that of the digest."""

    tables: str
    documents: int
    tokens: int
    rows: int


def border(shards: Sequence[Shard], percent: float) -> int:
    """Documents with a hash below this are held out; at least one, if there are two."""
    if percent == 0 or sum(shard.documents for shard in shards) < 2:
        return 0
    lowest = min(shard.lowest_hash for shard in shards if shard.documents)
    return max(int(percent / 100 * ALL), lowest + 1)


def write(
    directory: Path,
    number: int,
    shards: Sequence[Shard],
    at: Path,
    limit: int,
    layout: Layout,
    stop: Callable[[], bool],
) -> tuple[Part | None, Part | None]:
    """Write the tables of data set `number`, whose shards lie in `at`: the part that is trained on,
    and the documents with a hash below `limit`. A part without documents is None. Raises Stopped.
    """
    places = [f"train/{number}", f"heldout/{number}"]
    counts = [[0, 0], [0, 0]]
    for place in places:
        (directory / place).mkdir(parents=True)
    files: list[BinaryIO] = [(directory / place / "documents.bin").open("wb") for place in places]
    try:
        for index, shard in enumerate(shards):
            table = _documents(index, shard, at)
            low = _below(shard.hashes(at), limit)
            for part, chosen in enumerate((table[~low], table[low])):
                counts[part][0] += len(chosen)
                counts[part][1] += int(chosen[:, 2].sum())
                files[part].write(np.ascontiguousarray(chosen).tobytes())
            if stop():
                raise Stopped("stopped while preparing; run the same command to continue")
    finally:
        for file in files:
            file.close()
    parts = [
        _part(directory, place, layout, *count) for place, count in zip(places, counts, strict=True)
    ]
    return parts[0], parts[1]


def _documents(index: int, shard: Shard, at: Path) -> Table:
    """[documents, 3] = (shard, offset in it, length)."""
    offsets = shard.offsets(at)
    numbers = np.full(len(offsets) - 1, index, dtype=np.int64)
    return np.stack([numbers, offsets[:-1], np.diff(offsets)], axis=1)


def _below(hashes: npt.NDArray[np.uint64], limit: int) -> npt.NDArray[np.bool_]:
    # No unsigned number of 64 bits reaches ALL.
    if limit >= ALL:
        return np.full(len(hashes), True)
    return np.asarray(hashes < np.uint64(limit))


def _part(directory: Path, place: str, layout: Layout, documents: int, size: int) -> Part | None:
    if documents == 0:
        shutil.rmtree(directory / place)
        return None
    return Part(place, documents, size, _write_rows(directory / place, layout))


def _write_rows(directory: Path, layout: Layout) -> int:
    """Write the row table beside the document table; returns the number of rows."""
    table = np.memmap(directory / "documents.bin", np.int64, "r").reshape(-1, DOCUMENT_COLUMNS)

    def lengths() -> Iterator[Table]:
        for start in range(0, len(table), _PART):
            yield np.array(table[start : start + _PART, 2])

    count = 0
    with (directory / "rows.bin").open("wb") as file:
        for part in layout.row_starts(lengths()):
            file.write(np.ascontiguousarray(part, dtype=np.int64).tobytes())
            count += len(part)
    return count
