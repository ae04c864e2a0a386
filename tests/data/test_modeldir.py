"""A model directory that cannot be trained is refused with the reason and what to do."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from cptjob_api.facts import ModelFacts
from cptjob_trainer.errors import CPTJobError, DataError, MissingInputError
from cptjob_trainer.model import safetensors_header
from cptjob_trainer.model.modeldir import check_model


def test_a_good_directory_is_described(model: Path) -> None:
    info = check_model(model)
    assert info.architecture == "LlamaForCausalLM"
    assert info.parameters == info.vocab_size * 4 + 4
    assert info.dtype == "float32"
    assert info.max_positions == 256
    assert info.files == (model / "model.safetensors",)


def set_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def only(model: Path, *names: str) -> None:
    for entry in list(model.iterdir()):
        if entry.name not in names:
            entry.unlink()


def shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    save_file({"a": np.zeros(3, np.float32)}, model / "model-1.safetensors")
    save_file({"b": np.zeros(3, np.float16)}, model / "model-2.safetensors")
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def shard_without(model: Path, name: str) -> None:
    shard(model)
    (model / name).unlink()


def shard_with_wrong_index(model: Path) -> None:
    shard(model)
    names = {"a": "model-1.safetensors", "c": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


WEIGHTS = "model.safetensors"
Change = Callable[[Path], object]
REFUSED: dict[str, tuple[Change, type[CPTJobError], str]] = {
    "empty": (lambda m: only(m), MissingInputError, "the model directory is empty"),
    "no config": (
        lambda m: (m / "config.json").unlink(),
        MissingInputError,
        "config.json is missing; name the directory",
    ),
    "broken config": (
        lambda m: (m / "config.json").write_text("{"),
        DataError,
        "config.json: broken JSON",
    ),
    "unsupported architecture": (
        lambda m: set_config(m, architectures=["BertForMaskedLM"]),
        DataError,
        "architecture BertForMaskedLM is not supported; a causal language model",
    ),
    "unknown type": (
        lambda m: set_config(m, model_type="nonsense"),
        DataError,
        "model_type nonsense is not supported",
    ),
    "no type": (
        lambda m: set_config(m, model_type=None),
        DataError,
        "config.json: model_type is missing; copy the file again",
    ),
    "remote code": (
        lambda m: set_config(m, auto_map={"AutoModel": "x.Y"}),
        DataError,
        "code of its own .auto_map., which is never done",
    ),
    "no tokenizer": (
        lambda m: (m / "tokenizer.json").unlink(),
        MissingInputError,
        r"the tokenizer is missing \(tokenizer.json\); copy it from the base model",
    ),
    "no weights": (
        lambda m: (m / WEIGHTS).unlink(),
        MissingInputError,
        "the weights are missing",
    ),
    "a pickle": (
        lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"),
        DataError,
        "pytorch_model.bin: weights as a pickle can run code and are refused; convert them: python",
    ),
    "an archive": (
        lambda m: (only(m), (m / "model.tar.gz").write_bytes(b"\x1f\x8b")),
        DataError,
        "model.tar.gz: the model is compressed; unpack it",
    ),
    "a zip of weights": (
        lambda m: (m / WEIGHTS).rename(m / "model.zip"),
        DataError,
        "model.zip: the model is compressed; unpack it",
    ),
    "gguf": (
        lambda m: (only(m), (m / "model.gguf").write_bytes(b"GGUF")),
        DataError,
        "model.gguf: the model is in GGUF format; convert it",
    ),
    "an adapter": (
        lambda m: (only(m), (m / "adapter_config.json").write_text("{}")),
        DataError,
        "an adapter, not a model; merge it",
    ),
    "an adapter beside the model": (
        lambda m: (m / "adapter_config.json").write_text("{}"),
        DataError,
        "adapter_config.json: an adapter beside the model; merge it",
    ),
    "quantized": (
        lambda m: set_config(m, quantization_config={"quant_method": "gptq"}),
        DataError,
        "config.json: the weights are quantized .*; name the model that they were made from",
    ),
    "encrypted with age": (
        lambda m: (m / WEIGHTS).write_bytes(b"age-encryption.org/v1\n" + os.urandom(99)),
        DataError,
        r"model.safetensors: the model is encrypted \(age\); decrypt it first",
    ),
    "encrypted with openssl": (
        lambda m: (m / "config.json").write_bytes(b"Salted__" + os.urandom(99)),
        DataError,
        r"config.json: the model is encrypted \(openssl\); decrypt it first",
    ),
    "encrypted with gpg": (
        lambda m: (m / WEIGHTS).rename(m / (WEIGHTS + ".gpg")),
        DataError,
        "safetensors.gpg: the model is encrypted; decrypt it first",
    ),
    "encrypted unseen": (
        lambda m: (m / WEIGHTS).write_bytes(b"\x93" * 999),
        DataError,
        "not a safetensors file, truncated or encrypted",
    ),
    "compressed weights": (
        lambda m: (m / WEIGHTS).write_bytes(b"\x1f\x8b" + bytes(99)),
        DataError,
        r"model.safetensors: compressed \(gzip\), not safetensors",
    ),
    "a git lfs pointer": (
        lambda m: (m / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        DataError,
        "Git LFS pointer.*git lfs pull",
    ),
    "truncated weights": (
        lambda m: truncate(m / WEIGHTS),
        DataError,
        "model.safetensors: the file is truncated: .* bytes",
    ),
    "empty weights": (
        lambda m: (m / WEIGHTS).write_bytes(b""),
        DataError,
        "the file is empty or truncated",
    ),
    "a missing shard": (
        lambda m: shard_without(m, "model-2.safetensors"),
        MissingInputError,
        "names weights that are missing: model-2.safetensors",
    ),
    "a missing index": (
        lambda m: shard_without(m, "model.safetensors.index.json"),
        MissingInputError,
        "model.safetensors.index.json is missing",
    ),
    "a vocabulary of other weights": (
        lambda m: set_config(m, vocab_size=1000),
        DataError,
        r"config.json: gives a vocabulary of 1000, and model.embed_tokens.weight in "
        r"model.safetensors has \d+; copy config.json and weights of one model",
    ),
    "a width of other weights": (
        lambda m: set_config(m, hidden_size=576),
        DataError,
        "gives a hidden size of 576, and model.embed_tokens.weight in model.safetensors has 4;",
    ),
    "a wrong index": (shard_with_wrong_index, DataError, "tensor c is missing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_directory_that_is_no_usable_model_is_refused(kind: str, model: Path) -> None:
    change, error, message = REFUSED[kind]
    change(model)
    with pytest.raises(error, match=message):
        check_model(model)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        MissingInputError, match="nowhere: there is no model directory; check model"
    ):
        check_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.tar.gz", b"\x1f\x8b", "the model is compressed; unpack it and name the directory"),
        ("model.zip", b"PK\x03\x04", "the model is compressed"),
        ("model", b"PK\x03\x04", "the model is compressed"),
        ("model.gguf", b"GGUF", "in GGUF format; convert it"),
        ("model.age", b"age-encryption.org/v1", r"the model is encrypted \(age\)"),
        ("model.enc", b"xyz", "the model is encrypted"),
        ("model.safetensors", b"xyz", "a file; name the directory"),
    ],
)
def test_a_file_instead_of_a_directory_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        check_model(tmp_path / name)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root reads everything: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [".", "config.json", WEIGHTS])
def test_what_cannot_be_read_is_named(name: str, model: Path) -> None:
    # The directories of pytest are closed to others.
    with TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        copy = Path(shutil.copytree(model, Path(parent) / "model"))
        (copy / name).chmod(0)
        with (
            without_privileges(),
            pytest.raises(MissingInputError, match=r"Permission denied; check its permissions"),
        ):
            check_model(copy)
        copy.chmod(0o755)


def test_shards_are_counted_together(model: Path) -> None:
    shard(model)
    info = check_model(model)
    assert info.parameters == 6
    assert [file.name for file in info.files] == ["model-1.safetensors", "model-2.safetensors"]


def test_rows_beyond_the_vocabulary_are_right_where_the_architecture_has_them(model: Path) -> None:
    size = check_model(model).vocab_size
    assert size is not None
    set_config(model, model_type="mllama", vocab_size=size - 8)
    assert check_model(model).vocab_size == size - 8


def test_a_projected_embedding_has_a_width_of_its_own(model: Path) -> None:
    set_config(model, model_type="opt", hidden_size=16, word_embed_proj_dim=4)
    assert check_model(model).architecture == "LlamaForCausalLM"


def test_the_fingerprint_tells_models_apart(model: Path) -> None:
    before = check_model(model)
    assert check_model(model).fingerprint == before.fingerprint
    weights = model / WEIGHTS
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    assert check_model(model).fingerprint != before.fingerprint
    set_config(model, transformers_version="9.9")
    assert check_model(model).fingerprint == check_model(model).fingerprint
    set_config(model, rms_norm_eps=0.5)
    assert check_model(model).fingerprint != before.fingerprint
    assert check_model(model).tokenizer_fingerprint == before.tokenizer_fingerprint


def test_of_a_large_file_every_tensor_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptjob_trainer.model.model_weights._SMALL_FILE", 0)
    tensors = {f"t{number}": np.zeros(5000, np.float32) for number in range(5)}
    save_file(tensors, model / WEIGHTS)
    before = check_model(model).fingerprint
    tensors["t3"][:] = 1e-3
    save_file(tensors, model / WEIGHTS)
    assert check_model(model).fingerprint != before


def test_a_model_without_architectures_is_known_by_its_type(model: Path) -> None:
    set_config(model, architectures=None, model_type="gpt2")
    assert check_model(model).architecture == "GPT2LMHeadModel"


POSITIONS = st.dictionaries(
    st.sampled_from(
        [
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"),
            *("seq_length", "max_sequence_length"),
        ]
    ),
    st.integers(1, 9999) | st.none(),
    max_size=3,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(outer=POSITIONS, inner=POSITIONS)
def test_the_client_reads_the_same_facts_as_prepare(
    outer: dict[str, int | None], inner: dict[str, int | None], model: Path
) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    whole = config | outer | {"text_config": inner}
    (model / "config.json").write_text(json.dumps(whole))
    info, facts = check_model(model), ModelFacts.from_directory(model)
    assert (facts.max_positions, facts.parameters) == (info.max_positions, info.parameters)


def test_a_header_is_read_with_places_in_the_file(model: Path) -> None:
    with (model / WEIGHTS).open("rb") as file:
        header = safetensors_header.read(file)
        for tensor in header.tensors:
            file.seek(tensor.start)
            with safe_open(model / WEIGHTS, "np") as opened:
                assert (
                    file.read(tensor.end - tensor.start) == opened.get_tensor(tensor.name).tobytes()
                )
    assert header.needed == header.size
