"""Rows and steps are counted exactly, and documents come back from the rows."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepare import prepare

Job = Callable[..., TrainerConfig]


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
    prepared = prepare(job(path, split=0.0), packs=make.packs)
    (source,) = prepared.sources
    end = kinds["gpt2"].token_to_id("<|endoftext|>")
    assert make.texts_of(source, kinds["gpt2"], end) == texts
    assert source.documents == 203
    assert source.tokens == sum(len(source.row(i).tokens) for i in range(source.rows()))


def test_rows_and_steps_are_counted_by_the_definition(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    domain = make.texts(tmp_path / "domain.jsonl", make.sentences(300))
    general = make.texts(tmp_path / "general.jsonl", make.sentences(100, "general "))
    config = job(domain, general=[general], epochs=3, global_batch_size=16)
    prepared = prepare(config, packs=make.packs)
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
    prepared = prepare(config, packs=make.packs)
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
    whole = prepare(job(path), packs=make.packs)
    cut = prepare(job(path, max_steps=3), packs=make.packs)
    assert cut.total_steps == 3
    assert cut.total_rows == whole.total_rows
    assert cut.data_fingerprint == whole.data_fingerprint


def test_without_packing_a_row_is_one_document_piece_and_the_reason_is_told(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    prepared = prepare(job(path), packs=make.never_packs)
    assert not prepared.packed
    assert all(len(prepared.sources[0].row(i).starts) == 1 for i in range(50 // 2))
    assert any("mixes documents" in warning for warning in prepared.warnings)


def test_epochs_that_max_steps_cuts_off_are_not_warned_of(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    path = make.texts(tmp_path / "law.jsonl", make.sentences(300))
    whole = prepare(job(path, epochs=9), packs=make.packs)
    assert any("datasets: law is seen 9 times; " in warning for warning in whole.warnings)
    short = prepare(job(path, epochs=9, max_steps=2), packs=make.packs)
    assert not any("is seen" in warning for warning in short.warnings)
