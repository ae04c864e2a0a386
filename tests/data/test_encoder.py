"""Cutting texts into known parts changes nothing but the time."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as cut

from cptjob_trainer.data import encoder
from cptjob_trainer.data.encoder import Encoder
from cptjob_trainer.data.tokenizer import TokenizerInfo

KINDS = ["gpt2", "smollm", "starcoder", "llama3", "cl100k", "o200k", "qwen"]

# Everything that a cut depends on: spaces of all kinds, apostrophes, letters and digits inside and
# outside ASCII, combining marks, characters that NFC turns into ASCII, added and control tokens.
SPACES = [*" \n\t\r", "  ", "\n\n", " \n ", "   ", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000"]
WORDS = [
    *"'.,(/=_-",
    "a",
    "Z",
    "the",
    "'s",
    "'LL",
    "don't",
    "7",
    "42",
    "12345",
    "日本",
    "😀",
    "a b",
]
MARKS = [*"éſ²½٣", "e\u0301", "\u0301", "\u0338", "\u200d", "\u212a", "\u037e", "\u1fef"]
TOKENS = ["<tool_call>", "<|endoftext|>", "</s>", "<s>", "<unk>", "<tool_", "call>"]
PIECES = st.sampled_from([*SPACES, *WORDS, *MARKS, *TOKENS])
TEXTS = st.lists(PIECES | st.characters(codec="utf-8"), max_size=30).map("".join)


def info_of(tokenizer: Tokenizer, path: Path) -> TokenizerInfo:
    tokenizer.save(str(path))
    control = {
        number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and token.content != "<unk>"
    }
    return TokenizerInfo(
        path=path,
        fingerprint="f",
        bos_id=None,
        eos_id=0,
        pad_id=0,
        control=frozenset(control),
        size=tokenizer.get_vocab_size(),
    )


def decoded(encoded: bytes, dtype: str) -> list[int]:
    ids: list[int] = np.frombuffer(encoded, dtype).tolist()
    return ids


@pytest.fixture(scope="module")
def pairs(
    kinds: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Encoder, Encoder]]:
    """An encoder that cuts, and one that does not, of each family."""
    directory = tmp_path_factory.mktemp("tokenizers")
    infos = {kind: info_of(kinds[kind], directory / f"{kind}.json") for kind in KINDS}
    return {kind: (Encoder(info), Encoder(info, cached=False)) for kind, info in infos.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_known_families_are_cut(kind: str, pairs: dict[str, tuple[Encoder, Encoder]]) -> None:
    assert pairs[kind][0].cached


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
@example(texts=["foo\n 1 bar", "a\n\n\n b", "x  \n y", "=\u0338 ≠", "end.\n/path", "5  7   x"])
@example(texts=["", " ", "\n", "  a", "a  ", " 's", "don't'll", "'ſ", "a b c", "   x   y"])
def test_parts_give_the_ids_of_the_whole_text(
    kind: str, texts: list[str], pairs: dict[str, tuple[Encoder, Encoder]]
) -> None:
    fast, plain = pairs[kind]
    # Examples hardly repeat themselves, and those before this one would make it go the plain way.
    fast._plain_left = 0
    assert fast.encode(texts) == plain.encode(texts)


def test_a_tokenizer_that_is_not_known_is_not_cut(llama2: Tokenizer, tmp_path: Path) -> None:
    assert not Encoder(info_of(llama2, tmp_path / "llama2.json")).cached
    tokenizer = Tokenizer.from_str(llama2.to_str())
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = cut.ByteLevel(add_prefix_space=True)
    assert not Encoder(info_of(tokenizer, tmp_path / "prefix.json")).cached


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_text_never_gives_a_control_token(
    text: str, llama2: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    info = info_of(llama2, tmp_path_factory.getbasetemp() / "control.json")
    ids = decoded(Encoder(info).encode([text])[0], info.dtype)
    assert info.control.isdisjoint(ids)


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPACED = {
    "llama 2": (PREPEND, None),
    "metaspace always": (None, cut.Metaspace(prepend_scheme="always", split=False)),
    "metaspace first": (None, cut.Metaspace(prepend_scheme="first")),
    "NFKC and Metaspace": (normalizers.NFKC(), cut.Metaspace(prepend_scheme="always")),
}


def spaced(kind: str) -> Tokenizer:
    """A tokenizer that puts a space in front of each text, with `</s>` a word like any other."""
    letters = "▁abcdefghijklmnopqrstuvwxyz</>"
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁after", -3.0), ("▁before", -3.0)]
    vocabulary = [*words, *((letter, -5.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.normalizer, tokenizer.pre_tokenizer = SPACED[kind]
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize(
    "text",
    ["</s>", "before </s> after", "before</s>after", "</s></s>", " </s> x", "a <s>b</s>", "＜/s＞"],
)
def test_text_around_a_control_token_gets_no_further_space(
    kind: str, text: str, tmp_path: Path
) -> None:
    tokenizer = spaced(kind)
    info = info_of(tokenizer, tmp_path / "tokenizer.json")
    encoded = Encoder(info)
    assert not encoded.cached
    ids = decoded(encoded.encode([text])[0], info.dtype)
    assert info.control.isdisjoint(ids)
    if kind == "NFKC and Metaspace":
        text = unicodedata.normalize("NFKC", text)
    elif not text.isascii():
        return
    expected = text.replace(" ", "▁")
    # Metaspace leaves a text alone that begins with a space.
    if SPACED[kind][1] is None or not text.startswith(" "):
        expected = f"▁{expected}"
    assert "".join(tokenizer.id_to_token(number) for number in ids) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_in_the_text_is_plain_text(
    kind: str, pairs: dict[str, tuple[Encoder, Encoder]], kinds: dict[str, Tokenizer]
) -> None:
    text = "before <|endoftext|> after<|endoftext|>"
    ids = decoded(pairs[kind][0].encode([text])[0], "<u2")
    assert kinds[kind].token_to_id("<|endoftext|>") not in ids
    assert kinds[kind].decode(ids) == text


def test_text_that_does_not_repeat_goes_the_plain_way_and_stays_right(
    kinds: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = info_of(kinds["gpt2"], tmp_path / "tokenizer.json")
    fast, plain = Encoder(info), Encoder(info, cached=False)
    real, cuts = fast._cut, []
    monkeypatch.setattr(fast, "_cut", lambda text: cuts.append(text) or real(text))
    ways = []
    for batch in range(44):
        # Chinese, of which no two texts share a part.
        texts = [chr(0x4E00 + 20 * batch + number) * 9 for number in range(20)]
        assert fast.encode(texts) == plain.encode(texts)
        ways.append("cut" if cuts else "plain")
        cuts.clear()
    assert ways == ["cut"] * 9 + ["plain"] * 32 + ["cut"] + ["plain"] * 2


def test_the_table_of_parts_stays_bounded(
    kinds: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = info_of(kinds["llama3"], tmp_path / "tokenizer.json")
    fast, plain = Encoder(info), Encoder(info, cached=False)
    monkeypatch.setattr(encoder, "_KEPT", 50)
    for batch in range(20):
        texts = [f"word{batch} and word{batch * 31} {'long' * 40}{batch}"]
        assert fast.encode(texts) == plain.encode(texts)
        assert len(fast._parts) <= 50
        assert all(len(part) <= 64 for part in fast._parts)
