"""Preparing is stopped, killed, or done twice at once, and ends the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cptjob_trainer import failpoints
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data import documents
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import Prepared, load_prepared
from cptjob_trainer.errors import Stopped

Job = Callable[..., TrainerConfig]


def test_a_stop_keeps_what_is_finished(
    tmp_path: Path,
    make: SimpleNamespace,
    job: Job,
    tokenised: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 2000)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    with pytest.raises(Stopped, match="run the same command to continue"):
        prepare(job(path), stop=lambda: len(tokenised) == 3, packs=make.packs)
    assert len(tokenised) == 3
    prepared = prepare(job(path), packs=make.packs)
    assert len(tokenised) == len(list(documents.chunks(path)))
    assert prepared.total_steps > 0


@pytest.mark.parametrize("point", ["prepare.tokenize:3", "prepare.publish:1"])
def test_a_killed_preparation_goes_on_and_ends_the_same(
    point: str, tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    data = tmp_path / "data"
    for number in range(5):
        make.texts(data / f"{number}.jsonl", make.sentences(50, f"{number} "))
    config, other = job(data), job(data, output=tmp_path / "other")
    config.dump(tmp_path / "config.json")
    make.remember_packs(config)
    environment = {**os.environ, "CPTJOB_FAILPOINT": point}
    command = [
        sys.executable,
        "-m",
        "cptjob_trainer.data.prepare",
        "--config",
        tmp_path / "config.json",
    ]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    finished = len(list((config.paths.prepared / "shards").glob("[0-9a-f]*")))
    assert finished == (2 if "tokenize" in point else 5)
    ended = subprocess.run(command, capture_output=True, check=False, text=True)
    assert ended.returncode == 0, ended.stderr
    expected = prepare(other, packs=make.packs)
    found = load_prepared(config.paths.prepared / expected.digest)
    assert make.tree(found.directory) == make.tree(expected.directory)
    assert not list((config.paths.prepared / "shards").glob(".*"))


def test_workers_die_with_a_killed_parent(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(120_000))
    config = job(path)
    make.remember_packs(config)
    config.dump(tmp_path / "config.json")
    command = [
        sys.executable,
        "-m",
        "cptjob_trainer.data.prepare",
        "--config",
        tmp_path / "config.json",
    ]
    process = subprocess.Popen(command, start_new_session=True)
    workers: set[int] = set()
    deadline = time.monotonic() + 60
    while not workers and process.poll() is None and time.monotonic() < deadline:
        workers = {
            child
            for child in children(process.pid)
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        }
    assert workers
    process.kill()
    process.wait()
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)


def children(parent: int) -> Iterator[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return
    yield from map(int, text.split())


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_pods_with_one_process_number_prepare_side_by_side(
    tmp_path: Path, make: SimpleNamespace, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pods share `prepared` and both are process 1: the other one starts and ends here while
    this one is about to publish.
    """
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    config = job(path)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    seen: list[tuple[Prepared, int]] = []

    def interrupt(name: str) -> None:
        if name == "prepare.publish" and not seen:
            seen.append((other := prepare_again(), other.directory.stat().st_ino))

    def prepare_again() -> Prepared:
        monkeypatch.setattr(failpoints, "hit", lambda _: None)
        return prepare(config, packs=make.packs)

    monkeypatch.setattr(failpoints, "hit", interrupt)
    mine = prepare(config, packs=make.packs)
    other, number = seen[0]
    assert mine == other
    assert mine.directory.stat().st_ino == number, "what the other one reads is left alone"
    assert not list(config.paths.prepared.glob(".*"))
