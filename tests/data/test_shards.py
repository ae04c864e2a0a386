"""What was prepared is found again where it is the same, and told apart where it is not."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data import documents, tokens
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import load_prepared
from cptjob_trainer.errors import DataError

Job = Callable[..., TrainerConfig]


def test_the_second_time_nothing_is_tokenised(
    tmp_path: Path, make: SimpleNamespace, job: Job, tokenised: list[int]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    first = prepare(job(path), packs=make.packs)
    before = make.tree(first.directory.parent)
    assert prepare(job(path), packs=make.packs) == first
    assert len(tokenised) == 1
    assert make.tree(first.directory.parent) == before


def test_other_settings_use_the_same_shards(
    tmp_path: Path, make: SimpleNamespace, job: Job, tokenised: list[int]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    prepared = [
        prepare(job(path, **settings), packs=make.packs)
        for settings in ({}, {"max_length": 32}, {"split": 0.0}, {"system_prompt": "Be brief."})
    ]
    assert len(tokenised) == 1
    assert len({each.data_fingerprint for each in prepared}) == 4
    assert len({each.directory for each in prepared}) == 4


def test_appended_lines_leave_earlier_chunks_alone(
    tmp_path: Path,
    make: SimpleNamespace,
    job: Job,
    tokenised: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 2000)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    before = prepare(job(path), packs=make.packs)
    count = len(tokenised)
    assert count > 3
    with path.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    after = prepare(job(path), packs=make.packs)
    assert len(tokenised) == count + 1
    assert after.data_fingerprint != before.data_fingerprint


def test_a_changed_word_is_another_fingerprint(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    texts = make.sentences(50)
    first = prepare(job(make.texts(tmp_path / "data.jsonl", texts)), packs=make.packs)
    texts[20] += " changed"
    second = prepare(job(make.texts(tmp_path / "data.jsonl", texts)), packs=make.packs)
    assert first.data_fingerprint != second.data_fingerprint
    assert first.model_fingerprint == second.model_fingerprint


def test_another_model_with_the_same_data_is_told_apart(
    tmp_path: Path, make: SimpleNamespace, job: Job, model: Path, tokenised: list[int]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    first = prepare(job(path), packs=make.packs)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    second = prepare(job(path), packs=make.packs)
    assert first.model_fingerprint != second.model_fingerprint
    assert first.data_fingerprint == second.data_fingerprint
    assert len(tokenised) == 1


def test_other_shares_are_other_data(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    paths = [make.texts(tmp_path / f"{name}.jsonl", make.sentences(50, name)) for name in "ab"]
    first = prepare(job(*paths, weights={"a": 1.0, "b": 1.0}), packs=make.packs)
    second = prepare(job(*paths, weights={"a": 1.0, "b": 3.0}), packs=make.packs)
    assert first.total_rows == second.total_rows
    assert first.data_fingerprint != second.data_fingerprint


def test_where_the_data_lies_does_not_matter(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    paths = [make.texts(tmp_path / place / "data.jsonl", make.sentences(50)) for place in "ab"]
    first, second = (
        prepare(job(path, output=tmp_path / f"output-{n}"), packs=make.packs)
        for n, path in enumerate(paths)
    )
    assert first.digest == second.digest
    assert make.tree(first.directory) == make.tree(second.directory)


def test_the_number_of_processes_does_not_matter(
    tmp_path: Path, make: SimpleNamespace, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 20_000)
    monkeypatch.setattr(tokens, "_ALONE", 0)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(1000))
    seen: list[tuple[str, int, int]] = []
    alone = prepare(job(path, output=tmp_path / "1"), processes=1, packs=make.packs)
    pooled = prepare(
        job(path, output=tmp_path / "2"),
        lambda *said: seen.append(said),
        processes=2,
        packs=make.packs,
    )
    assert make.tree(alone.directory) == make.tree(pooled.directory)
    done = [done for what, done, _ in seen if what == "Tokenising"]
    assert done == sorted(done)
    assert done[-1] == path.stat().st_size


def test_broken_prepared_data_is_found_and_made_again(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    prepared = prepare(job(path), packs=make.packs)
    rows = prepared.sources[0].tables / "rows.bin"
    good = rows.read_bytes()
    rows.write_bytes(good[:-8])
    with pytest.raises(DataError, match=r"rows\.bin: prepared data has .* bytes instead of"):
        load_prepared(prepared.directory)
    assert prepare(job(path), packs=make.packs) == prepared
    assert rows.read_bytes() == good
    shard = prepared.sources[0].shards[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match="missing or incomplete; remove"):
        load_prepared(prepared.directory)
    assert prepare(job(path), packs=make.packs) == prepared
