"""Builders: tiny tokenizers, a model directory, data files, a configuration."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as cut
from tokenizers.trainers import BpeTrainer

from cptjob_trainer.config import (
    Data,
    DatasetInput,
    ModelInput,
    Paths,
    ResolvedSchedule,
    ResolvedTraining,
    TrainerConfig,
    ValidationInput,
)
from cptjob_trainer.data import documents, tokens
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.rows import Source

END = "<|endoftext|>"
TEXT = (
    "The quick brown fox doesn't jump over 12 lazy dogs; it's 345 of them, and they'll bark.\n"
    "def quick(fox, dogs=12345):\n    return fox + dogs  # they're lazy\n\n\n   Indented text, "
    "e.g. (this) one: naïve café résumé — 日本語 текст. I'M SURE You'Ve seen 'em\t tab\r\n"
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BYTES = cut.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt2": cut.ByteLevel(add_prefix_space=False),
    "smollm": cut.Sequence(
        [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]
    ),
    "starcoder": cut.Sequence(
        [cut.Digits(individual_digits=False), cut.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": cut.Sequence([cut.Split(Regex(LLAMA3), "isolated"), BYTES]),
    "cl100k": cut.Sequence([cut.Split(Regex(LLAMA3), "removed", invert=True), BYTES]),
    "o200k": cut.Sequence([cut.Split(Regex(O200K), "isolated"), BYTES]),
    "qwen": cut.Sequence([cut.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]),
}


def byte_level(kind: str) -> Tokenizer:
    """A tokenizer like that of the named family, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = cut.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if kind == "qwen":
        # Not special, so they are taken out of any text before it is cut.
        tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("a b"), AddedToken("   ")])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """A tokenizer like that of Llama 2: no byte level, BOS, and `</s>` a word like any other."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    characters = sorted(set(TEXT.replace(" ", "▁")))
    fallback = [f"<0x{number:02X}>" for number in range(256)]
    special = ["<unk>", "<s>", "</s>", *fallback]
    trainer = BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=characters)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer | None = None, **config: Any) -> Path:
    """A model directory that prepare accepts. It has hardly any weights: prepare reads none."""
    directory.mkdir(parents=True)
    tokenizer = tokenizer or byte_level("gpt2")
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    special = {"eos_token": END} if tokenizer.token_to_id(END) is not None else ends
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 256,
        "hidden_size": 4,
    }
    (directory / "config.json").write_text(json.dumps(content | config))
    rows = (content | config)["vocab_size"]
    weights = {
        "model.embed_tokens.weight": np.zeros((rows, 4), np.float32),
        "model.norm.weight": np.ones(4, np.float32),
    }
    save_file(weights, directory / "model.safetensors")
    return directory


def write_lines(path: Path, lines: Sequence[str | bytes]) -> Path:
    """Lines as they are, each with a line break."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in whole))
    return path


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    """A valid file with these documents."""
    return write_lines(path, [json.dumps({"text": text}) for text in texts])


def sentences(count: int, salt: str = "") -> list[str]:
    """Different documents of 1 to 40 words."""
    words = TEXT.split()
    return [
        f"{salt}{number}: "
        + " ".join(words[(number * 7 + at) % len(words)] for at in range(1 + number % 40))
        for number in range(count)
    ]


def packs(_: Path) -> bool:
    """Told instead of trying the architecture, which takes torch: documents may share a row."""
    return True


def never_packs(_: Path) -> bool:
    """They may not."""
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


def set_tokenizer(model: Path, **settings: object) -> None:
    """Change tokenizer_config.json."""
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def remember_packs(config: TrainerConfig) -> None:
    """Prepare something else with an answer given, so that torch need not be imported."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
        datasets = (config.datasets[0].model_copy(update={"path": path}),)
        prepare(config.model_copy(update={"datasets": datasets}), packs=packs)
    for entry in (config.paths.prepared / "shards").iterdir():
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The builders of this file."""
    return SimpleNamespace(
        model=write_model,
        lines=write_lines,
        texts=write_texts,
        sentences=sentences,
        packs=packs,
        never_packs=never_packs,
        tree=tree,
        texts_of=texts_of,
        set_tokenizer=set_tokenizer,
        remember_packs=remember_packs,
    )


@pytest.fixture(scope="session")
def kinds() -> dict[str, Tokenizer]:
    """A tokenizer of each family that is cut into parts."""
    return {kind: byte_level(kind) for kind in PRE_TOKENIZERS}


@pytest.fixture(scope="session")
def llama2() -> Tokenizer:
    return sentencepiece_like()


@pytest.fixture
def model(tmp_path: Path, kinds: dict[str, Tokenizer]) -> Path:
    return write_model(tmp_path / "model", kinds["gpt2"])


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Callable[..., TrainerConfig]:
    """job(path, ..., general=[path], held=[path], weights={name: weight}, **training)."""

    def build(
        *paths: Path,
        general: Sequence[Path] = (),
        held: Sequence[Path] = (),
        weights: dict[str, float] | None = None,
        split: float = 10.0,
        data: Data | None = None,
        model: Path = model,
        output: Path = tmp_path / "output",
        **training: Any,
    ) -> TrainerConfig:
        def dataset(path: Path, role: Any) -> DatasetInput:
            name = path.stem
            weight = (weights or {}).get(name)
            return DatasetInput(name=name, uri="pvc://c", path=path, role=role, weight=weight)

        settings: dict[str, Any] = {
            "epochs": 2,
            "max_length": 64,
            "batch_size_per_device": 2,
            "global_batch_size": 4,
            "learning_rate": 1e-4,
            "schedule": ResolvedSchedule(min_learning_rate=1e-5),
        }
        return TrainerConfig(
            name="job",
            uid="uid",
            model=ModelInput(uri="pvc://c/model", path=model),
            datasets=(
                *(dataset(path, "Domain") for path in paths),
                *(dataset(path, "General") for path in general),
            ),
            data=data or Data(),
            validation=ValidationInput(
                datasets=tuple(dataset(path, "Domain") for path in held), split_percent=split
            ),
            training=ResolvedTraining(**(settings | training)),
            paths=Paths(output=output),
        )

    return build


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
