"""A file that has not changed is not read again, and one that has changed always is."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data import documents, known_files, tokens
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import Prepared

MakeJob = Callable[..., TrainerConfig]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose chunks are read."""
    names: list[str] = []
    real = documents.blocks

    def noting(chunk: documents.Chunk) -> Iterator[bytes]:
        names.append(chunk.path.name)
        return real(chunk)

    monkeypatch.setattr(documents, "blocks", noting)
    return names


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are old enough: the clock is a minute ahead of that of the file system."""
    now = time.time_ns
    monkeypatch.setattr(known_files.time, "time_ns", lambda: now() + 60 * 10**9)


@pytest.fixture
def data(tmp_path: Path, make: SimpleNamespace) -> Path:
    folder = tmp_path / "data"
    for name in ("a", "b"):
        make.texts(folder / f"{name}.jsonl", make.sentences(60, name))
    return folder


def again(config: TrainerConfig, read: list[str]) -> tuple[Prepared, list[str]]:
    """What is prepared, and which files are read for it."""
    read.clear()
    return prepare(config, packs=lambda _: True), sorted(set(read))


def other_text(path: Path) -> bytes:
    """The file's contents with another first document of the same size."""
    content = path.read_bytes()
    assert b"quick" in content
    return content.replace(b"quick", b"quack", 1)


def test_files_that_have_not_changed_are_not_read(
    job: MakeJob, data: Path, read: list[str], later: None
) -> None:
    config = job(data)
    first, names = again(config, read)
    assert names == ["a.jsonl", "b.jsonl"]
    assert again(config, read) == (first, [])


def test_chunks_of_known_files_need_no_other_processes(
    job: MakeJob, data: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(data)
    first = prepare(config, packs=lambda _: True)
    monkeypatch.setattr(tokens, "_ALONE", 1)
    monkeypatch.delattr(tokens, "ProcessPoolExecutor")
    assert prepare(config, packs=lambda _: True, processes=2) == first


def in_place(path: Path) -> None:
    path.write_bytes(other_text(path))


def in_place_with_its_old_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(other_text(path))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def by_another_of_the_same_size_and_time(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(other_text(path))
    shutil.copystat(path, other)
    other.replace(path)


def by_appending(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"text": "one more"}\n')


@pytest.mark.parametrize(
    "change",
    [in_place, in_place_with_its_old_time, by_another_of_the_same_size_and_time, by_appending],
)
def test_a_changed_file_is_read_and_the_others_are_not(
    change: Callable[[Path], None], job: MakeJob, data: Path, read: list[str], later: None
) -> None:
    config = job(data)
    first, _ = again(config, read)
    change(data / "b.jsonl")
    second, names = again(config, read)
    assert names == ["b.jsonl"]
    assert second.data_fingerprint != first.data_fingerprint
    fresh = prepare(job(data, output=data.parent / "fresh"), packs=lambda _: True)
    assert fresh.digest == second.digest


def test_a_file_that_was_changed_just_now_is_not_trusted(
    job: MakeJob, data: Path, read: list[str]
) -> None:
    config = job(data)
    again(config, read)
    assert again(config, read)[1] == ["a.jsonl", "b.jsonl"]
    assert not (config.paths.prepared / known_files.FILE).exists()


@pytest.mark.parametrize(
    ("after", "settled"), [(9.0, False), (10.0, False), (10.1, True), (-5.0, False)]
)
def test_a_change_is_settled_after_a_while(after: float, settled: bool) -> None:
    """Also when the clock of the file system is ahead."""
    changed = 1_700_000_000 * 10**9
    for times in ((changed, changed - 10**12), (changed - 10**12, changed)):
        state = known_files.State(1, *times, 7)
        assert state.settled(changed + int(after * 1e9)) is settled


def test_other_shards_are_not_taken_for_those_of_the_file(
    job: MakeJob,
    data: Path,
    read: list[str],
    later: None,
    make: SimpleNamespace,
    kinds: dict[str, Tokenizer],
) -> None:
    again(job(data), read)
    other = make.model(data.parent / "other", kinds["qwen"])
    assert again(job(data, model=other), read)[1] == ["a.jsonl", "b.jsonl"]


def test_a_shard_that_is_gone_is_made_again(
    job: MakeJob, data: Path, read: list[str], later: None
) -> None:
    config = job(data)
    first, _ = again(config, read)
    shutil.rmtree(first.sources[0].shards[0].parent)
    second, names = again(config, read)
    assert len(names) == 1
    assert second == first


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 1, "options": 3}'])
def test_a_broken_record_is_passed_over(
    text: str, job: MakeJob, data: Path, read: list[str], later: None
) -> None:
    config = job(data)
    first, _ = again(config, read)
    file = config.paths.prepared / known_files.FILE
    whole = json.loads(file.read_bytes())
    file.write_text(text)
    assert again(config, read) == (first, ["a.jsonl", "b.jsonl"])
    assert json.loads(file.read_bytes()) == whole
