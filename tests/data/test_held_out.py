"""What is held out of training: a part of each data set, or validation data in its place."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import Prepared
from cptjob_trainer.errors import DataError

Job = Callable[..., TrainerConfig]


def held_texts(make: SimpleNamespace, prepared: Prepared, tokenizer: Tokenizer) -> list[set[str]]:
    end = tokenizer.token_to_id("<|endoftext|>")
    return [set(make.texts_of(source, tokenizer, end)) for source in prepared.heldout]


def test_each_data_set_has_a_part_held_out_that_does_not_depend_on_the_order(
    tmp_path: Path, make: SimpleNamespace, job: Job, kinds: dict[str, Tokenizer]
) -> None:
    domain, general = make.sentences(300), make.sentences(200, "general ")
    first = make.texts(tmp_path / "1" / "domain.jsonl", domain)
    other = make.texts(tmp_path / "1" / "general.jsonl", general)
    prepared = prepare(job(first, general=[other]), packs=make.packs)
    held = held_texts(make, prepared, kinds["gpt2"])
    assert [source.role for source in prepared.heldout] == ["Domain", "General"]
    assert 10 <= len(held[0]) <= 60
    end = kinds["gpt2"].token_to_id("<|endoftext|>")
    assert held[0].isdisjoint(make.texts_of(prepared.sources[0], kinds["gpt2"], end))
    turned = make.texts(tmp_path / "2" / "domain.jsonl", domain[::-1])
    assert held_texts(make, prepare(job(turned), packs=make.packs), kinds["gpt2"])[0] == held[0]


def test_validation_data_takes_the_place_of_the_domain_split(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    domain = make.texts(tmp_path / "domain.jsonl", make.sentences(100))
    general = make.texts(tmp_path / "general.jsonl", make.sentences(100, "general "))
    extra = make.texts(tmp_path / "extra.jsonl", make.sentences(20, "extra "))
    prepared = prepare(job(domain, general=[general], held=[extra]), packs=make.packs)
    assert prepared.sources[0].documents == 100
    assert [(source.name, source.role) for source in prepared.heldout] == [
        ("general", "General"),
        ("extra", "Domain"),
    ]


def test_of_few_documents_one_is_held_out(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(5))
    prepared = prepare(job(path, split=1.0), packs=make.packs)
    assert [prepared.heldout[0].documents, prepared.sources[0].documents] == [1, 4]


def test_one_document_is_trained_on_and_the_missing_split_is_told(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", ["the only document of all"])
    prepared = prepare(job(path), packs=make.packs)
    assert prepared.heldout == ()
    assert any("nothing is held out of the Domain" in warning for warning in prepared.warnings)


def test_a_role_of_which_nothing_is_held_out_is_told_with_what_to_do(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    domain = make.texts(tmp_path / "domain.jsonl", make.sentences(50))
    general = make.texts(tmp_path / "general.jsonl", make.sentences(50, "g"))
    extra = make.texts(tmp_path / "extra.jsonl", make.sentences(5, "e"))
    prepared = prepare(job(domain, general=[general], held=[extra], split=0.0), packs=make.packs)
    told = [warning for warning in prepared.warnings if "held out" in warning]
    assert len(told) == 1
    assert "of the General text, so forgetting will not be measured" in told[0]
    assert "validation.splitPercent above 0, or give validation.datasets of role General" in told[0]


def test_all_data_held_out_is_refused(tmp_path: Path, make: SimpleNamespace, job: Job) -> None:
    path = make.texts(tmp_path / "data.jsonl", ["the same document"] * 9)
    with pytest.raises(DataError, match=r"all data of data is held out: .*lower validation.split"):
        prepare(job(path), packs=make.packs)
