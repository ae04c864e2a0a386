"""Rows hold every token of every document once, in order, and say where pieces start."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptjob_trainer.data.rows import LEAST_PIECE, Layout, Source
from cptjob_trainer.errors import NEVER_RETRIED, ConfigError, CPTJobError, DataError

BOS, EOS = 1, 2
LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=40)


def source_of(directory: Path, lengths: list[int], layout: Layout, shards: int = 2) -> Source:
    """Documents of these lengths over some shards; token n of document d is unique."""
    tables = directory / "tables"
    tables.mkdir(parents=True)
    streams: list[list[int]] = [[] for _ in range(shards)]
    table = []
    next_token = 100
    for number, length in enumerate(lengths):
        shard = number * shards // len(lengths)
        table.append((shard, len(streams[shard]), length))
        body = list(range(next_token, next_token + length - 2))
        next_token += length
        streams[shard] += [BOS, *body, EOS]
    paths = []
    for number, stream in enumerate(streams):
        path = directory / f"{number}.bin"
        path.write_bytes(np.array(stream, "<u2").tobytes())
        paths.append(path)
    (tables / "documents.bin").write_bytes(np.array(table, np.int64).tobytes())
    array = np.array(lengths, np.int64)
    parts = (array[at : at + 3] for at in range(0, len(array), 3))
    rows = np.concatenate(list(layout.row_starts(parts)))
    (tables / "rows.bin").write_bytes(np.ascontiguousarray(rows, np.int64).tobytes())
    return Source(
        name="d",
        role="Domain",
        documents=len(lengths),
        tokens=sum(lengths),
        layout=layout,
        tables=tables,
        shards=tuple(paths),
        dtype="<u2",
        row_count=len(rows),
    )


def stream_of(source: Source) -> list[int]:
    return [int(t) for path in source.shards for t in np.fromfile(path, source.dtype)]


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    max_length=st.integers(30, 64),
    packed=st.booleans(),
    prompt=st.integers(0, 12),
    bos=st.booleans(),
)
def test_every_token_of_every_document_is_in_exactly_one_row(
    lengths: list[int],
    max_length: int,
    packed: bool,
    prompt: int,
    bos: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    layout = Layout(max_length, packed, tuple(range(50, 50 + prompt)), bos)
    source = source_of(tmp_path_factory.mktemp("rows"), lengths, layout)
    seen: list[int] = []
    for index in range(source.rows()):
        row = source.row(index)
        assert 0 < len(row.tokens) <= max_length
        assert row.tokens.dtype == row.starts.dtype == np.int64
        assert row.masked.dtype == np.bool_
        assert len(row.masked) == len(row.tokens)
        assert row.starts[0] == 0
        assert packed or len(row.starts) == 1
        assert int(row.masked.sum()) == prompt * len(row.starts)
        seen += row.tokens[~row.masked].tolist()
        for start, end in zip(row.starts, [*row.starts[1:], len(row.tokens)], strict=True):
            check_piece(row.tokens[start:end], row.masked[start:end], layout)
    assert seen == stream_of(source)


def check_piece(tokens: np.ndarray, masked: np.ndarray, layout: Layout) -> None:
    """One document's part: BOS first, then the prompt, then the rest; EOS nowhere but last."""
    body = tokens[~masked].tolist()
    assert BOS not in body[1:]
    assert EOS not in body[:-1]
    if layout.prompt:
        at = 1 if layout.bos and body[0] == BOS else 0
        assert tuple(tokens[at : at + len(layout.prompt)]) == layout.prompt
        assert masked[at : at + len(layout.prompt)].all()
        assert len(body) >= LEAST_PIECE or body[-1] == EOS


def test_packed_rows_are_full_but_for_the_last(tmp_path: Path) -> None:
    source = source_of(tmp_path, [50, 7, 130, 9, 64], Layout(64, True))
    sizes = [len(source.row(index).tokens) for index in range(source.rows())]
    assert sizes == [64, 64, 64, 64, 4]


def test_pieces_start_where_documents_do(tmp_path: Path) -> None:
    source = source_of(tmp_path, [10, 20, 50, 30], Layout(64, True))
    assert source.row(0).starts.tolist() == [0, 10, 30]
    assert source.row(1).starts.tolist() == [0, 16]


def test_unpacked_a_long_document_becomes_several_rows(tmp_path: Path) -> None:
    source = source_of(tmp_path, [10, 70, 5], Layout(32, False))
    sizes = [len(source.row(index).tokens) for index in range(source.rows())]
    assert sizes == [10, 32, 32, 6, 5]


def test_the_prompt_stands_behind_bos_and_in_front_of_a_continuation(tmp_path: Path) -> None:
    layout = Layout(24, False, (50, 51), bos=True)
    source = source_of(tmp_path, [40], layout)
    first, second = source.row(0), source.row(1)
    assert first.tokens[:4].tolist() == [BOS, 50, 51, 100]
    assert first.masked[:4].tolist() == [False, True, True, False]
    assert second.tokens[:3].tolist() == [50, 51, 121]


def test_a_prompt_that_fills_the_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"systemPrompt: takes 50 tokens of maxLength 64"):
        Layout(64, True, tuple(range(50)))


def test_a_row_outside_the_source_is_an_error(tmp_path: Path) -> None:
    source = source_of(tmp_path, [10], Layout(32, True))
    with pytest.raises(IndexError, match="row 1 is outside"):
        source.row(1)


def test_missing_tokens_are_named(tmp_path: Path) -> None:
    source = source_of(tmp_path, [10], Layout(32, True), shards=1)
    source.shards[0].unlink()
    with pytest.raises(DataError, match=r"0\.bin: prepared data that is missing"):
        source.row(0)


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    """Allows this process file numbers below `limit` only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_a_process_may_open_files_are_read(tmp_path: Path) -> None:
    source = source_of(tmp_path, [16] * 1100, Layout(max_length=16, packed=True), shards=1100)
    with open_files(1024):
        found = [int(token) for at in range(source.rows()) for token in source.row(at).tokens]
    assert found == stream_of(source)


def test_too_many_open_files_are_not_called_broken_data(tmp_path: Path) -> None:
    source = source_of(tmp_path, [16] * 4, Layout(max_length=16, packed=True))
    with open_files(1), pytest.raises(CPTJobError, match="too many files are open") as caught:
        source.row(0)
    assert caught.value.exit_code not in NEVER_RETRIED
