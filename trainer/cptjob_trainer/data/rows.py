"""Rows: what the model is trained on, cut from documents.

A **document** is its tokens, BOS and EOS included, in one of the token shards. A **piece** is a
part of a document in a row, the system prompt in front of it where there is one. A **row** is at
most `max_length` tokens: several pieces when packed, else one.

A source keeps two tables on disk, both memory-mapped, so that nothing in memory grows with the
corpus: documents.bin, int64 [documents, 3] = (shard, offset in it, length), and rows.bin, int64
[rows, 2] = (document, offset in it) where each row starts.
"""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cptjob_trainer.disk import is_missing, unreadable
from cptjob_trainer.errors import ConfigError, CPTJobError, DataError

DOCUMENT_COLUMNS = 3
ROW_COLUMNS = 2

Table = npt.NDArray[np.int64]

# Behind a system prompt, a piece has at least this many tokens of its document (or its whole rest):
# rather a short row than a prompt for one token.
LEAST_PIECE = 16


@dataclass(frozen=True)
class Row:
    """tokens int64 [n <= max_length]; starts int64 [pieces], the offset of each piece (positions
    restart there); masked bool [n], True where a token is no target (the system prompt).
    """

    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    masked: npt.NDArray[np.bool_]


class Piece(NamedTuple):
    """Tokens [offset, offset + length) of a document."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class Layout:
    """How documents are cut into rows. `bos` says that documents start with a BOS token, which
    stays in front of the prompt.
    """

    max_length: int
    packed: bool
    prompt: tuple[int, ...] = ()
    bos: bool = False

    def __post_init__(self) -> None:
        if self.prompt and self.room <= LEAST_PIECE:
            raise ConfigError(
                f"training.systemPrompt: takes {len(self.prompt)} tokens of maxLength "
                f"{self.max_length}; shorten it or raise maxLength to at least "
                f"{len(self.prompt) + LEAST_PIECE + 1}"
            )

    @property
    def room(self) -> int:
        """Tokens of documents that fit into a row of one piece."""
        return self.max_length - len(self.prompt)

    def pieces(self, document: int, offset: int, lengths: Sequence[int] | Table) -> list[Piece]:
        """The pieces of the row that starts at (document, offset).

        `lengths` are those of `document` and the ones after it, as many as there are or may fit.
        """
        pieces: list[Piece] = []
        space = self.max_length
        for number, length in enumerate(lengths):
            rest = int(length) - offset
            space -= len(self.prompt)
            if space < min(rest, LEAST_PIECE if self.prompt else 1):
                break
            taken = min(rest, space)
            pieces.append(Piece(document + number, offset, taken))
            space -= taken
            offset = 0
            if taken < rest or not self.packed:
                break
        return pieces

    def row_starts(self, lengths: Iterator[Table]) -> Iterator[Table]:
        """The row table, in parts, from the lengths of all documents, in parts. All are above 0."""
        if not self.packed:
            return self._one_piece_each(lengths)
        if self.prompt:
            return self._packed_with_prompt(lengths)
        return self._packed(lengths)

    def _one_piece_each(self, parts: Iterator[Table]) -> Iterator[Table]:
        base = 0
        for lengths in parts:
            counts = -(-lengths // self.room)
            documents = np.repeat(np.arange(len(lengths)), counts)
            first = np.repeat(np.cumsum(counts) - counts, counts)
            offsets = (np.arange(len(documents)) - first) * self.room
            yield np.stack([documents + base, offsets], axis=1)
            base += len(lengths)

    def _packed(self, parts: Iterator[Table]) -> Iterator[Table]:
        """Rows start at every max_length-th token of the documents laid end to end."""
        base = tokens = 0
        for lengths in parts:
            ends = tokens + np.cumsum(lengths)
            first = -(-tokens // self.max_length) * self.max_length
            places = np.arange(first, int(ends[-1]), self.max_length)
            documents = np.searchsorted(ends, places, side="right")
            offsets = places - (ends - lengths)[documents]
            yield np.stack([documents + base, offsets], axis=1)
            base, tokens = base + len(lengths), int(ends[-1])

    def _packed_with_prompt(self, parts: Iterator[Table]) -> Iterator[Table]:
        """One document after the other, as each needs a prompt in each row."""
        space, document = 0, 0
        overhead = len(self.prompt)
        for lengths in parts:
            starts: list[tuple[int, int]] = []
            for length in lengths.tolist():
                offset = 0
                while offset < length:
                    if space - overhead < min(length - offset, LEAST_PIECE):
                        starts.append((document, offset))
                        space = self.max_length
                    taken = min(length - offset, space - overhead)
                    offset += taken
                    space -= overhead + taken
                    if offset < length:
                        space = 0
                document += 1
            yield np.array(starts, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Source:
    """One data set's part: training or held-out. Reads its tables and shards lazily."""

    name: str
    role: str
    documents: int
    tokens: int
    layout: Layout
    tables: Path
    shards: tuple[Path, ...] = field(repr=False)
    dtype: str
    row_count: int

    def rows(self) -> int:
        """How many rows there are."""
        return self.row_count

    def row(self, index: int) -> Row:
        """Read one row. IndexError outside range(rows())."""
        if not 0 <= index < self.row_count:
            raise IndexError(f"{self.name}: row {index} is outside 0..{self.row_count - 1}")
        pieces = self.pieces(index)
        overhead = len(self.layout.prompt)
        sizes = np.array([piece.length + overhead for piece in pieces], dtype=np.int64)
        ends = np.cumsum(sizes)
        tokens = np.empty(int(ends[-1]), dtype=np.int64)
        masked = np.zeros(len(tokens), dtype=np.bool_)
        for piece, end, size in zip(pieces, ends.tolist(), sizes.tolist(), strict=True):
            self._write(piece, tokens[end - size : end], masked[end - size : end])
        return Row(tokens, ends - sizes, masked)

    def pieces(self, index: int) -> list[Piece]:
        """Which parts of which documents make up a row."""
        rows = _table(self.tables / "rows.bin", ROW_COLUMNS)
        document, offset = rows[index].tolist()
        last = int(rows[index + 1, 0]) if index + 1 < self.row_count else self.documents - 1
        lengths = _table(self.tables / "documents.bin", DOCUMENT_COLUMNS)[document : last + 1, 2]
        return self.layout.pieces(document, offset, lengths)

    def _write(
        self, piece: Piece, tokens: npt.NDArray[np.int64], masked: npt.NDArray[np.bool_]
    ) -> None:
        """BOS (of a piece that starts its document), prompt, document."""
        shard, start, _ = _table(self.tables / "documents.bin", DOCUMENT_COLUMNS)[
            piece.document
        ].tolist()
        start += piece.offset
        words = _tokens(self.shards[shard], self.dtype)[start : start + piece.length]
        prompt = self.layout.prompt
        at = 1 if prompt and self.layout.bos and piece.offset == 0 else 0
        tokens[:at] = words[:at]
        tokens[at : at + len(prompt)] = prompt
        masked[at : at + len(prompt)] = True
        tokens[at + len(prompt) :] = words[at:]


# Each file that is mapped keeps a file open, and a process may open 1024 by default: both caches
# together stay far below that. To map one anew takes microseconds.
_MAPPED = 256


@lru_cache(maxsize=_MAPPED)
def _table(path: Path, columns: int) -> Table:
    try:
        return np.memmap(path, dtype=np.int64, mode="r").reshape(-1, columns)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


@lru_cache(maxsize=_MAPPED)
def _tokens(path: Path, dtype: str) -> npt.NDArray[np.integer]:
    try:
        return np.memmap(path, dtype=np.dtype(dtype), mode="r")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> CPTJobError:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return CPTJobError(
            f"{path}: cannot be opened, as too many files are open; raise the limit (ulimit -n) "
            "and run again"
        )
    if isinstance(error, OSError) and not is_missing(error):
        return unreadable(path, error)
    return DataError(
        f"{path}: prepared data that is missing or broken; remove the directory prepared/ of the "
        "output and run again"
    )
