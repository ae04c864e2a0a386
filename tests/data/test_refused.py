"""What cannot be prepared is refused with its reason, and earlier output stays."""

import json
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from cptjob_trainer.config import Data, TrainerConfig
from cptjob_trainer.data import documents
from cptjob_trainer.data.corpus import VALIDATE, Corpus
from cptjob_trainer.data.prepare import check, prepare
from cptjob_trainer.data.prepared import load_prepared
from cptjob_trainer.errors import ConfigError, CPTJobError, DataError, OutputError, StorageFullError

Job = Callable[..., TrainerConfig]


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
        prepare(job(path, model=model), packs=make.packs)


@pytest.mark.parametrize("only_check", [False, True])
def test_a_system_prompt_beyond_the_vocabulary_is_refused(
    only_check: bool, tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    tokenizer = Tokenizer.from_str(kinds["gpt2"].to_str())
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<|beyond|>"])
    model = make.model(tmp_path / "other", tokenizer, vocab_size=size)
    (model / "chat_template.jinja").write_text("<|beyond|>{{ messages[0]['content'] }}")
    said = f"the system prompt holds token {size}, and the model's vocabulary has {size}; copy"
    given = job(path, model=model, system_prompt="Be brief.")
    work = check if only_check else partial(prepare, packs=make.packs)
    with pytest.raises(DataError, match=said):
        work(given)


def test_a_padding_token_beyond_the_vocabulary_is_left_aside(
    tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    tokenizer = Tokenizer.from_str(kinds["gpt2"].to_str())
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<pad>"])
    model = make.model(tmp_path / "other", tokenizer, vocab_size=size)
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<pad>"}))
    assert prepare(job(path, model=model), packs=make.packs).pad_id < size


@pytest.mark.parametrize("text", ["{}", "cut"])
def test_a_broken_tokenizer_is_refused_by_the_check_too(
    text: str, tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    model = make.model(tmp_path / "other", kinds["gpt2"])
    file = model / "tokenizer.json"
    file.write_text(file.read_text("utf-8")[:500] if text == "cut" else text, "utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json: .*copy it from the base model"):
        check(job(path, model=model))


def test_only_tolerated_bad_lines_leave_nothing_to_train_on(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.lines(tmp_path / "data.jsonl", ["[]", "{}"])
    with pytest.raises(DataError, match=r"data set data has no usable document[^$]*data.jsonl:1"):
        prepare(job(path, data=Data(max_bad_lines=5)), packs=make.packs)


def test_what_is_not_supported_yet_is_refused(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    with pytest.raises(ConfigError, match=r"data.deduplicate: Exact is not supported yet"):
        prepare(job(path, data=Data(deduplicate="Exact")), packs=make.packs)


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
    earlier = prepare(config, packs=make.packs)
    before = make.tree(config.paths.output)
    break_it(data, model)
    with pytest.raises(error):
        prepare(config, packs=make.packs)
    # Shards that are good are kept for the next time.
    assert before.items() <= make.tree(config.paths.output).items()
    assert load_prepared(earlier.directory) == earlier


def test_an_output_that_cannot_be_written_is_named(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(9))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"taken.*cannot be written: .*check the output's path"):
        prepare(job(path, output=tmp_path / "taken"), packs=make.packs)


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
            prepare(config, packs=make.packs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert make.tree(config.paths.prepared / "shards") == {}
    assert prepare(config, packs=make.packs).total_steps > 0


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
