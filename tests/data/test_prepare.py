"""From files to rows and steps: counted exactly, kept between runs, never half written."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from cptjob_trainer import documents, failpoints, tokens
from cptjob_trainer.config import Data, TrainerConfig
from cptjob_trainer.corpus import VALIDATE, Corpus
from cptjob_trainer.errors import (
    ConfigError,
    CPTJobError,
    DataError,
    OutputError,
    Stopped,
    StorageFullError,
)
from cptjob_trainer.prepare import check, main, prepare
from cptjob_trainer.prepared import Prepared, load_prepared
from cptjob_trainer.rows import Source

Job = Callable[..., TrainerConfig]


def packs(_: Path) -> bool:
    return True


def never_packs(_: Path) -> bool:
    return False


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def texts_of(source: Source, tokenizer: Tokenizer, end: int) -> list[str]:
    """The documents of a packed source without prompt, read back from its rows."""
    stream = [int(t) for index in range(source.rows()) for t in source.row(index).tokens]
    documents: list[list[int]] = [[]]
    for token in stream:
        if token == end:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(ids) for ids in documents[:-1]]


def test_documents_come_back_from_the_rows_as_they_were(
    tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    texts = [
        *make.sentences(200),
        "with <|endoftext|> inside",
        "日本語",
        " leading and trailing \n",
    ]
    path = make.texts(tmp_path / "data.jsonl", texts)
    prepared = prepare(job(path, split=0.0), packs=packs)
    (source,) = prepared.sources
    end = kinds["gpt2"].token_to_id("<|endoftext|>")
    assert texts_of(source, kinds["gpt2"], end) == texts
    assert source.documents == 203
    assert source.tokens == sum(len(source.row(i).tokens) for i in range(source.rows()))


def test_rows_and_steps_are_counted_by_the_definition(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    domain = make.texts(tmp_path / "domain.jsonl", make.sentences(300))
    general = make.texts(tmp_path / "general.jsonl", make.sentences(100, "general "))
    config = job(domain, general=[general], epochs=3, global_batch_size=16)
    prepared = prepare(config, packs=packs)
    rows = {source.name: source.rows() for source in prepared.sources}
    assert prepared.sources[0].rows() == -(-prepared.sources[0].tokens // 64)
    assert prepared.quotas[0] == 3 * rows["domain"]
    assert prepared.total_rows == round(3 * rows["domain"] / 0.95)
    assert prepared.total_steps == -(-prepared.total_rows // 16)
    mix = prepared.mix(seed=0)
    assert mix.total_rows == prepared.total_rows
    for i in range(mix.total_rows):
        source, row = mix.locate(i)
        assert 0 < len(prepared.sources[source].row(row).tokens) <= 64


def one_token_a_byte() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = ["<|endoftext|>"]
    trainer = BpeTrainer(vocab_size=257, special_tokens=end, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("weight", "general_rows", "steps"),
    # 96 x 0.05 / 0.95 = 5.05 rows; 101 rows in batches of 8 are 12.6 steps.
    # 96 x 0.1 / 0.9 = 10.67 rows; 107 rows are 13.4 steps.
    [(None, 5, 13), (0.1, 11, 14)],
)
def test_rows_steps_and_shares_by_hand(
    weight: float | None,
    general_rows: int,
    steps: int,
    tmp_path: Path,
    make: SimpleNamespace,
    job: Job,
) -> None:
    """A document of 15 letters and its end are 16 tokens, half a row of 32.

    95 domain documents are 1520 tokens or 47.5 rows, so 48; two epochs are 96. 60 general ones are
    30 rows.
    """
    model = make.model(tmp_path / "bytes", one_token_a_byte())
    texts = [f"{number:015}" for number in range(155)]
    domain = make.texts(tmp_path / "domain.jsonl", texts[:95])
    general = make.texts(tmp_path / "general.jsonl", texts[95:])
    config = job(
        domain,
        general=[general],
        weights=None if weight is None else {"general": weight},
        model=model,
        split=0.0,
        epochs=2,
        max_length=32,
        global_batch_size=8,
    )
    prepared = prepare(config, packs=packs)
    assert [source.tokens for source in prepared.sources] == [1520, 960]
    assert [source.rows() for source in prepared.sources] == [48, 30]
    assert prepared.quotas == (96, general_rows)
    assert prepared.total_rows == 96 + general_rows
    assert prepared.total_steps == steps

    drawn = [0, 0]
    mix = prepared.mix(seed=3)
    for i in range(mix.total_rows):
        source, row = mix.locate(i)
        drawn[source] += len(prepared.sources[source].row(row).tokens)
    assert drawn[0] == 2 * 1520
    share = 0.05 if weight is None else weight
    assert abs(drawn[1] - share * sum(drawn)) <= 32, "within one row of the share of all tokens"


def test_max_steps_limits_the_steps_and_not_the_order(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(200))
    whole = prepare(job(path), packs=packs)
    cut = prepare(job(path, max_steps=3), packs=packs)
    assert cut.total_steps == 3
    assert cut.total_rows == whole.total_rows
    assert cut.data_fingerprint == whole.data_fingerprint


def test_without_packing_a_row_is_one_document_piece_and_the_reason_is_told(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    prepared = prepare(job(path), packs=never_packs)
    assert not prepared.packed
    assert all(len(prepared.sources[0].row(i).starts) == 1 for i in range(50 // 2))
    assert any("mixes documents" in warning for warning in prepared.warnings)


# --- what is held out ------------------------------------------------------------------------------


def held_texts(prepared: Prepared, tokenizer: Tokenizer) -> list[set[str]]:
    end = tokenizer.token_to_id("<|endoftext|>")
    return [set(texts_of(source, tokenizer, end)) for source in prepared.heldout]


def test_each_data_set_has_a_part_held_out_that_does_not_depend_on_the_order(
    tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    domain, general = make.sentences(300), make.sentences(200, "general ")
    first = make.texts(tmp_path / "1" / "domain.jsonl", domain)
    other = make.texts(tmp_path / "1" / "general.jsonl", general)
    prepared = prepare(job(first, general=[other]), packs=packs)
    held = held_texts(prepared, kinds["gpt2"])
    assert [source.role for source in prepared.heldout] == ["Domain", "General"]
    assert 10 <= len(held[0]) <= 60
    end = kinds["gpt2"].token_to_id("<|endoftext|>")
    assert held[0].isdisjoint(texts_of(prepared.sources[0], kinds["gpt2"], end))
    turned = make.texts(tmp_path / "2" / "domain.jsonl", domain[::-1])
    assert held_texts(prepare(job(turned), packs=packs), kinds["gpt2"])[0] == held[0]


def test_validation_data_takes_the_place_of_the_domain_split(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    domain = make.texts(tmp_path / "domain.jsonl", make.sentences(100))
    general = make.texts(tmp_path / "general.jsonl", make.sentences(100, "general "))
    extra = make.texts(tmp_path / "extra.jsonl", make.sentences(20, "extra "))
    prepared = prepare(job(domain, general=[general], held=[extra]), packs=packs)
    assert prepared.sources[0].documents == 100
    assert [(source.name, source.role) for source in prepared.heldout] == [
        ("general", "General"),
        ("extra", "Domain"),
    ]


def test_of_few_documents_one_is_held_out(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(5))
    prepared = prepare(job(path, split=1.0), packs=packs)
    assert [prepared.heldout[0].documents, prepared.sources[0].documents] == [1, 4]


def test_one_document_is_trained_on_and_the_missing_split_is_told(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", ["the only document of all"])
    prepared = prepare(job(path), packs=packs)
    assert prepared.heldout == ()
    assert any("nothing is held out of the Domain" in warning for warning in prepared.warnings)


def test_a_role_of_which_nothing_is_held_out_is_told_with_what_to_do(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    domain = make.texts(tmp_path / "domain.jsonl", make.sentences(50))
    general = make.texts(tmp_path / "general.jsonl", make.sentences(50, "g"))
    extra = make.texts(tmp_path / "extra.jsonl", make.sentences(5, "e"))
    prepared = prepare(job(domain, general=[general], held=[extra], split=0.0), packs=packs)
    told = [warning for warning in prepared.warnings if "held out" in warning]
    assert len(told) == 1
    assert "of the General text, so forgetting will not be measured" in told[0]
    assert "validation.splitPercent above 0, or give validation.datasets of role General" in told[0]


def test_all_data_held_out_is_refused(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    path = make.texts(tmp_path / "data.jsonl", ["the same document"] * 9)
    with pytest.raises(DataError, match=r"all data of data is held out: .*lower validation.split"):
        prepare(job(path), packs=packs)


# --- what is refused -------------------------------------------------------------------------------


def test_a_row_longer_than_the_positions_is_refused(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    with pytest.raises(ConfigError, match="maxLength: 512 is above the model's 256 positions"):
        check(job(path, max_length=512))


def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    model = make.model(tmp_path / "other", kinds["gpt2"], vocab_size=100)
    with pytest.raises(DataError, match="the model's vocabulary has 100; copy the tokenizer"):
        prepare(job(path, model=model), packs=packs)


def test_only_tolerated_bad_lines_leave_nothing_to_train_on(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.lines(tmp_path / "data.jsonl", ["[]", "{}"])
    with pytest.raises(DataError, match=r"data set data has no usable document[^$]*data.jsonl:1"):
        prepare(job(path, data=Data(max_bad_lines=5)), packs=packs)


def test_what_is_not_supported_yet_is_refused(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    with pytest.raises(ConfigError, match=r"data.deduplicate: Exact is not supported yet"):
        prepare(job(path, data=Data(deduplicate="Exact")), packs=packs)


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda data, model: (data / "2.jsonl").write_text("[]\n"), DataError),
        (lambda data, model: (data / "2.txt").write_text("x"), DataError),
        (lambda data, model: (model / "tokenizer.json").unlink(), CPTJobError),
        (lambda data, model: (model / "model.safetensors").write_bytes(b"x"), DataError),
    ],
)
def test_a_refused_job_leaves_earlier_output_as_it_was(
    break_it: Callable[[Path, Path], object],
    error: type[CPTJobError],
    tmp_path: Path,
    make: SimpleNamespace,
    job: Job,
    model: Path,
) -> None:
    data = tmp_path / "data"
    make.texts(data / "1.jsonl", make.sentences(50))
    config = job(data)
    earlier = prepare(config, packs=packs)
    before = tree(config.paths.output)
    break_it(data, model)
    with pytest.raises(error):
        prepare(config, packs=packs)
    # Shards that are good are kept for the next time.
    assert before.items() <= tree(config.paths.output).items()
    assert load_prepared(earlier.directory) == earlier


def test_an_output_that_cannot_be_written_is_named(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"taken.*cannot be written: .*check the output's path"):
        prepare(job(path, output=tmp_path / "taken"), packs=packs)


def test_a_full_disk_is_named_and_leaves_no_half_shard(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(2000))
    config = job(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageFullError, match=r"no space left .*make room and run again"):
            prepare(config, packs=packs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert tree(config.paths.prepared / "shards") == {}
    assert prepare(config, packs=packs).total_steps > 0


# --- what is kept ----------------------------------------------------------------------------------


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the chunks that had to be tokenised."""
    sizes: list[int] = []
    real = tokens._tokenised

    def counting(chunk: documents.Chunk, *rest: object) -> tokens.Shard:
        sizes.append(chunk.size)
        return real(chunk, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tokens, "_tokenised", counting)
    return sizes


def test_the_second_time_nothing_is_tokenised(
    tmp_path: Path, make: SimpleNamespace, job: Job, tokenised: list[int]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    first = prepare(job(path), packs=packs)
    before = tree(first.directory.parent)
    assert prepare(job(path), packs=packs) == first
    assert len(tokenised) == 1
    assert tree(first.directory.parent) == before


def test_other_settings_use_the_same_shards(
    tmp_path: Path, make: SimpleNamespace, job: Job, tokenised: list[int]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    prepared = [
        prepare(job(path, **settings), packs=packs)
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
    before = prepare(job(path), packs=packs)
    count = len(tokenised)
    assert count > 3
    with path.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    after = prepare(job(path), packs=packs)
    assert len(tokenised) == count + 1
    assert after.data_fingerprint != before.data_fingerprint


def test_a_changed_word_is_another_fingerprint(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    texts = make.sentences(50)
    first = prepare(job(make.texts(tmp_path / "data.jsonl", texts)), packs=packs)
    texts[20] += " changed"
    second = prepare(job(make.texts(tmp_path / "data.jsonl", texts)), packs=packs)
    assert first.data_fingerprint != second.data_fingerprint
    assert first.model_fingerprint == second.model_fingerprint


def test_another_model_with_the_same_data_is_told_apart(
    tmp_path: Path, make: SimpleNamespace, job: Job, model: Path, tokenised: list[int]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    first = prepare(job(path), packs=packs)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    second = prepare(job(path), packs=packs)
    assert first.model_fingerprint != second.model_fingerprint
    assert first.data_fingerprint == second.data_fingerprint
    assert len(tokenised) == 1


def test_other_shares_are_other_data(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    paths = [make.texts(tmp_path / f"{name}.jsonl", make.sentences(50, name)) for name in "ab"]
    first = prepare(job(*paths, weights={"a": 1.0, "b": 1.0}), packs=packs)
    second = prepare(job(*paths, weights={"a": 1.0, "b": 3.0}), packs=packs)
    assert first.total_rows == second.total_rows
    assert first.data_fingerprint != second.data_fingerprint


def test_where_the_data_lies_does_not_matter(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    paths = [make.texts(tmp_path / place / "data.jsonl", make.sentences(50)) for place in "ab"]
    first, second = (
        prepare(job(path, output=tmp_path / f"output-{n}"), packs=packs)
        for n, path in enumerate(paths)
    )
    assert first.digest == second.digest
    assert tree(first.directory) == tree(second.directory)


def test_the_number_of_processes_does_not_matter(
    tmp_path: Path, make: SimpleNamespace, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 20_000)
    monkeypatch.setattr(tokens, "_ALONE", 0)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(1000))
    seen: list[tuple[str, int, int]] = []
    alone = prepare(job(path, output=tmp_path / "1"), processes=1, packs=packs)
    pooled = prepare(
        job(path, output=tmp_path / "2"), lambda *said: seen.append(said), processes=2, packs=packs
    )
    assert tree(alone.directory) == tree(pooled.directory)
    done = [done for what, done, _ in seen if what == "Tokenising"]
    assert done == sorted(done)
    assert done[-1] == path.stat().st_size


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
        prepare(job(path), stop=lambda: len(tokenised) == 3, packs=packs)
    assert len(tokenised) == 3
    prepared = prepare(job(path), packs=packs)
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
    remember_packs(config)
    environment = {**os.environ, "CPTJOB_FAILPOINT": point}
    command = [sys.executable, "-m", "cptjob_trainer.prepare", "--config", tmp_path / "config.json"]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    finished = len(list((config.paths.prepared / "shards").glob("[0-9a-f]*")))
    assert finished == (2 if "tokenize" in point else 5)
    ended = subprocess.run(command, capture_output=True, check=False, text=True)
    assert ended.returncode == 0, ended.stderr
    expected = prepare(other, packs=packs)
    found = load_prepared(config.paths.prepared / expected.digest)
    assert tree(found.directory) == tree(expected.directory)
    assert not list((config.paths.prepared / "shards").glob(".*"))


def remember_packs(config: TrainerConfig) -> None:
    """Prepare something else with an answer given, so that torch need not be imported."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
        datasets = (config.datasets[0].model_copy(update={"path": path}),)
        prepare(config.model_copy(update={"datasets": datasets}), packs=packs)
    for entry in (config.paths.prepared / "shards").iterdir():
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()


def test_workers_die_with_a_killed_parent(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(120_000))
    config = job(path)
    remember_packs(config)
    config.dump(tmp_path / "config.json")
    command = [sys.executable, "-m", "cptjob_trainer.prepare", "--config", tmp_path / "config.json"]
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


def test_broken_prepared_data_is_found_and_made_again(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(100))
    prepared = prepare(job(path), packs=packs)
    rows = prepared.sources[0].tables / "rows.bin"
    good = rows.read_bytes()
    rows.write_bytes(good[:-8])
    with pytest.raises(DataError, match=r"rows\.bin: prepared data has .* bytes instead of"):
        load_prepared(prepared.directory)
    assert prepare(job(path), packs=packs) == prepared
    assert rows.read_bytes() == good
    shard = prepared.sources[0].shards[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match="missing or incomplete; remove"):
        load_prepared(prepared.directory)
    assert prepare(job(path), packs=packs) == prepared


# --- tokens at the ends and in front ---------------------------------------------------------------


def test_bos_starts_a_document_and_never_a_continuation(
    tmp_path: Path, make: SimpleNamespace, job: Job, llama2: Tokenizer
) -> None:
    model = make.model(tmp_path / "llama2", llama2)
    path = make.texts(tmp_path / "data.jsonl", [*make.sentences(60), "long words " * 100])
    prepared = prepare(job(path, model=model, split=0.0), packs=packs)
    source = prepared.sources[0]
    stream = np.concatenate([source.row(i).tokens for i in range(source.rows())])
    assert int((stream == 1).sum()) == int((stream == 2).sum()) == source.documents
    ends = np.flatnonzero(stream == 2)
    assert (stream[ends[:-1] + 1] == 1).all()


def set_tokenizer(model: Path, **settings: object) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_add_bos_token_decides_where_it_is_given(
    tmp_path: Path, make: SimpleNamespace, job: Job, llama2: Tokenizer
) -> None:
    model = make.model(tmp_path / "llama2", llama2)
    set_tokenizer(model, add_bos_token=False)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(5))
    prepared = prepare(job(path, model=model, split=0.0), packs=packs)
    assert 1 not in prepared.sources[0].row(0).tokens


def test_a_tokenizer_without_an_end_is_refused(
    tmp_path: Path, make: SimpleNamespace, job: Job, model: Path
) -> None:
    set_tokenizer(model, eos_token=None)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(5))
    with pytest.raises(DataError, match="no end-of-text token; add eos_token"):
        prepare(job(path), packs=packs)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{{ strftime_now('%d %b %Y') }}"
)


def test_the_system_prompt_is_rendered_by_the_chat_template_and_masked(
    tmp_path: Path, make: SimpleNamespace, job: Job, llama2: Tokenizer
) -> None:
    model = make.model(tmp_path / "llama2", llama2)
    set_tokenizer(model, chat_template=TEMPLATE)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    config = job(path, model=model, max_length=128, system_prompt="Speak of foxes.")
    prepared = prepare(config, packs=packs)
    rendered = "<|system|>Speak of foxes.</s>01 Jan 2025"
    assert list(prepared.prompt_ids) == llama2.encode(rendered, add_special_tokens=False).ids
    row = prepared.sources[0].row(0)
    size = len(prepared.prompt_ids)
    for start in row.starts:
        assert row.tokens[start] == 1
        assert tuple(row.tokens[start + 1 : start + 1 + size]) == prepared.prompt_ids
        assert row.masked[start + 1 : start + 1 + size].all()
    assert int(row.masked.sum()) == size * len(row.starts)


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        (None, None),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves the"),
    ],
)
def test_without_a_template_for_it_the_prompt_is_a_plain_prefix(
    template: str | None,
    warning: str | None,
    tmp_path: Path,
    make: SimpleNamespace,
    job: Job,
    model: Path,
    kinds: dict[str, Tokenizer],
) -> None:
    if template:
        set_tokenizer(model, chat_template=template)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    prepared = prepare(job(path, system_prompt="Be brief."), packs=packs)
    assert kinds["gpt2"].decode(list(prepared.prompt_ids)) == "Be brief.\n\n"
    assert bool(warning) == any(str(warning) in said for said in prepared.warnings)


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
        return prepare(config, packs=packs)

    monkeypatch.setattr(failpoints, "hit", interrupt)
    mine = prepare(config, packs=packs)
    other, number = seen[0]
    assert mine == other
    assert mine.directory.stat().st_ino == number, "what the other one reads is left alone"
    assert not list(config.paths.prepared.glob(".*"))


# --- memory and the command ------------------------------------------------------------------------

MEASURED = """
import resource, sys
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.prepare import prepare
if __name__ == "__main__":
    prepared = prepare(TrainerConfig.load(sys.argv[1]), packs=lambda _: True, processes=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(prepared.sources[0].tokens, peak)
"""


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    """60 MB of text take at most 12 MB more than 5 MB of text do."""
    (tmp_path / "measured.py").write_text(MEASURED)
    texts = [text * 8 for text in make.sentences(5000)]
    content = make.texts(tmp_path / "part.jsonl", texts).read_bytes()
    figures = []
    for size in (5 << 20, 60 << 20):
        data = tmp_path / str(size)
        data.mkdir()
        for number in range(size // len(content) + 1):
            first = b'{"text": "%d"}\n' % number
            (data / f"{number:03}.jsonl").write_bytes(first + content)
        job(data, output=tmp_path / f"output-{size}").dump(tmp_path / "config.json")
        command = [sys.executable, tmp_path / "measured.py", tmp_path / "config.json"]
        ended = subprocess.run(command, capture_output=True, check=True, text=True)
        figures.append([int(word) for word in ended.stdout.split()])
    (few, small), (many, large) = figures
    assert many > 7 * few
    assert large - small < 12 << 20


def test_faults_are_kept_up_to_a_limit_in_all_and_counted_beyond(
    tmp_path: Path, make: SimpleNamespace, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 300)
    path = make.lines(tmp_path / "data.jsonl", ["[]"] * 5000)
    corpus = Corpus(job(path))
    with pytest.raises(DataError, match=r"the data has 5000 faults(.|\n)*and 4980 more"):
        corpus.read(VALIDATE, lambda done, total: None, stop=lambda: False, processes=1)
    assert len(corpus.given[0].shards) > 40
    assert not any(shard.faults for shard in corpus.given[0].shards)
    assert len(corpus.faults.lines) == 200
    assert corpus.faults.bad_lines == 5000


def test_the_command_prepares_checks_and_exits_with_the_fault_code(
    tmp_path: Path, make: SimpleNamespace, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    config = job(path)
    config.dump(tmp_path / "config.json")
    arguments = ["--config", str(tmp_path / "config.json")]
    assert main([*arguments, "--check-only"]) == 0
    assert "data: 50 documents" in capsys.readouterr().out
    assert not config.paths.output.exists()
    remember_packs(config)
    assert main(arguments) == 0
    assert "steps, in " in capsys.readouterr().out
    make.lines(path, ["[]"])
    assert main(arguments) == 65
    assert "data.jsonl:1: is a list" in capsys.readouterr().err


def test_the_data_part_starts_without_torch() -> None:
    program = (
        "import sys, cptjob_trainer.prepare; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


def test_a_slow_tokenizer_is_converted_once(
    tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    model = make.model(tmp_path / "slow", kinds["gpt2"], model_type="gpt2")
    (model / "tokenizer.json").unlink()
    kinds["gpt2"].model.save(str(model))
    set_tokenizer(model, tokenizer_class="GPT2Tokenizer")
    path = make.texts(tmp_path / "data.jsonl", make.sentences(30))
    config = job(path, model=model)
    prepared = prepare(config, packs=packs)
    assert len(list((config.paths.prepared / "tokenizers").glob("*.json"))) == 1
    same = prepare(job(path, output=tmp_path / "fast"), packs=packs)
    rows = [
        [source.row(i).tokens.tolist() for source in each.sources for i in range(source.rows())]
        for each in (prepared, same)
    ]
    assert rows[0] == rows[1]
