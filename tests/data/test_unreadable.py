"""What cannot be read at one moment is not called broken: it stays, and the next start finds it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data import documents, rows, tokens
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import Prepared, found_whole, load_prepared
from cptjob_trainer.errors import NEVER_RETRIED, DataError, MissingInputError, UnreadableError

Job = Callable[..., TrainerConfig]


@contextmanager
def faulty(path: Path) -> Iterator[None]:
    """Within, the kernel answers whoever opens or looks at `path` with an error, also to root."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    path.symlink_to(path.name)
    yield
    path.unlink()
    aside.rename(path)


@pytest.fixture
def config(tmp_path: Path, make: SimpleNamespace, job: Job) -> TrainerConfig:
    return job(make.texts(tmp_path / "data.jsonl", make.sentences(100)))


@pytest.fixture
def prepared(config: TrainerConfig, make: SimpleNamespace) -> Prepared:
    return prepare(config, packs=make.packs)


FILES: dict[str, Callable[[Prepared], Path]] = {
    "prepared.json": lambda prepared: prepared.directory / "prepared.json",
    "rows.bin": lambda prepared: prepared.sources[0].tables / "rows.bin",
    "shard.json": lambda prepared: prepared.sources[0].shards[0].with_name("shard.json"),
    "tokens.bin": lambda prepared: prepared.sources[0].shards[0],
}


def test_a_restart_may_help_what_cannot_be_read() -> None:
    assert UnreadableError.exit_code not in NEVER_RETRIED


@pytest.mark.parametrize("name", FILES)
def test_prepared_data_that_cannot_be_read_at_the_moment_stays(
    name: str,
    prepared: Prepared,
    config: TrainerConfig,
    make: SimpleNamespace,
    tokenised: list[int],
) -> None:
    before = make.tree(config.paths.prepared)
    with faulty(FILES[name](prepared)):
        for look in (load_prepared, found_whole, lambda _: prepare(config, packs=make.packs)):
            with pytest.raises(UnreadableError, match=r"cannot be read at this moment.*run again"):
                look(prepared.directory)
    assert make.tree(config.paths.prepared) == before
    assert prepare(config, packs=make.packs) == prepared
    assert tokenised == []


@pytest.mark.parametrize("name", ["rows.bin", "tokens.bin"])
def test_a_row_that_cannot_be_read_at_the_moment_is_not_called_broken(
    name: str, prepared: Prepared
) -> None:
    with (
        faulty(FILES[name](prepared)),
        pytest.raises(UnreadableError, match=f"{name}: cannot be read at this moment"),
    ):
        prepared.sources[0].row(0)
    FILES[name](prepared).unlink()
    rows._table.cache_clear()
    with pytest.raises(DataError, match=f"{name}: prepared data that is missing"):
        prepared.sources[0].row(0)


def test_an_array_of_a_shard_is_broken_when_it_is_missing_or_short(prepared: Prepared) -> None:
    path = prepared.sources[0].shards[0].with_name("hashes.npy")
    shard = tokens.Shard(path.parent.name)
    with faulty(path), pytest.raises(UnreadableError, match=r"hashes\.npy"):
        shard.hashes(path.parent.parent)
    for damage in (lambda: path.write_bytes(b""), path.unlink):
        damage()
        with pytest.raises(DataError, match=r"hashes\.npy: a token shard that is missing or"):
            shard.hashes(path.parent.parent)


def test_a_data_file_that_cannot_be_read_is_named_and_not_the_output(
    config: TrainerConfig, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config.datasets[0].path

    def break_before_the_second_reading(point: str) -> None:
        if point == "prepare.tokenize":
            broken.__enter__()

    broken = faulty(path)
    monkeypatch.setattr(tokens.failpoints, "hit", break_before_the_second_reading)
    with pytest.raises(UnreadableError, match=r"data\.jsonl: cannot be read at this moment"):
        prepare(config, processes=1, packs=make.packs)


def test_a_data_file_that_goes_away_while_it_is_read_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for read in (documents.chunks(path), documents.blocks(documents.Chunk(path, 0, 9))):
        with pytest.raises(MissingInputError, match=r"data\.jsonl: went away"):
            list(read)
    path.symlink_to(path.name)
    with pytest.raises(UnreadableError, match=r"data\.jsonl: cannot be read at this moment"):
        list(documents.chunks(path))
