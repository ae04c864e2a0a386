"""Tokens at the ends of documents and in front of them: BOS, EOS, the system prompt."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.errors import DataError

Job = Callable[..., TrainerConfig]


def test_bos_starts_a_document_and_never_a_continuation(
    tmp_path: Path, make: SimpleNamespace, job: Job, llama2: Tokenizer
) -> None:
    model = make.model(tmp_path / "llama2", llama2)
    path = make.texts(tmp_path / "data.jsonl", [*make.sentences(60), "long words " * 100])
    prepared = prepare(job(path, model=model, split=0.0), packs=make.packs)
    source = prepared.sources[0]
    stream = np.concatenate([source.row(i).tokens for i in range(source.rows())])
    assert int((stream == 1).sum()) == int((stream == 2).sum()) == source.documents
    ends = np.flatnonzero(stream == 2)
    assert (stream[ends[:-1] + 1] == 1).all()


def test_add_bos_token_decides_where_it_is_given(
    tmp_path: Path, make: SimpleNamespace, job: Job, llama2: Tokenizer
) -> None:
    model = make.model(tmp_path / "llama2", llama2)
    make.set_tokenizer(model, add_bos_token=False)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(5))
    prepared = prepare(job(path, model=model, split=0.0), packs=make.packs)
    assert 1 not in prepared.sources[0].row(0).tokens


def test_a_tokenizer_without_an_end_is_refused(
    tmp_path: Path, make: SimpleNamespace, job: Job, model: Path
) -> None:
    make.set_tokenizer(model, eos_token=None)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(5))
    with pytest.raises(DataError, match="no end-of-text token; add eos_token"):
        prepare(job(path), packs=make.packs)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{{ strftime_now('%d %b %Y') }}"
)


def test_the_system_prompt_is_rendered_by_the_chat_template_and_masked(
    tmp_path: Path, make: SimpleNamespace, job: Job, llama2: Tokenizer
) -> None:
    model = make.model(tmp_path / "llama2", llama2)
    make.set_tokenizer(model, chat_template=TEMPLATE)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    config = job(path, model=model, max_length=128, system_prompt="Speak of foxes.")
    prepared = prepare(config, packs=make.packs)
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
        make.set_tokenizer(model, chat_template=template)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    prepared = prepare(job(path, system_prompt="Be brief."), packs=make.packs)
    assert kinds["gpt2"].decode(list(prepared.prompt_ids)) == "Be brief.\n\n"
    assert bool(warning) == any(str(warning) in said for said in prepared.warnings)


def test_a_slow_tokenizer_is_converted_once(
    tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    model = make.model(tmp_path / "slow", kinds["gpt2"], model_type="gpt2")
    (model / "tokenizer.json").unlink()
    kinds["gpt2"].model.save(str(model))
    make.set_tokenizer(model, tokenizer_class="GPT2Tokenizer")
    path = make.texts(tmp_path / "data.jsonl", make.sentences(30))
    config = job(path, model=model)
    prepared = prepare(config, packs=make.packs)
    assert len(list((config.paths.prepared / "tokenizers").glob("*.json"))) == 1
    same = prepare(job(path, output=tmp_path / "fast"), packs=make.packs)
    rows = [
        [source.row(i).tokens.tolist() for source in each.sources for i in range(source.rows())]
        for each in (prepared, same)
    ]
    assert rows[0] == rows[1]
