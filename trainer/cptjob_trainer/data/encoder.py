"""From text to token ids, several times as fast as the tokenizer alone and with the same result.

Text of words repeats itself. Where the tokenizer's own pre-tokenisation cuts a text at certain
places whatever stands around them, the text is cut there first, and each distinct **part** is
tokenised once and looked up from then on. That holds for the byte-level tokenizers in `_cuts_safely`
(GPT-2, Llama 3, Qwen, SmolLM and their like); all others take the plain way.

Why the cuts are safe, for each pattern in `_ALTERNATIVES`: a match starts afresh at the cut, because
no alternative matches across it, and none looks behind.
- Before a single space between two characters that are no white space: only ` ?` leads a match with
  a space, and no alternative has white space after something else.
- Before the last space of a run, when an ASCII letter follows: `\\s+(?!\\S)` leaves that space over.
- After a single line break before an ASCII letter: nothing but white space follows a line break.
- After a run of ASCII letters or digits, when an ASCII character of another kind follows, other
  than an apostrophe (which may start a contraction): letters and digits end a match.
"""

import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from cptjob_trainer.data.tokenizer import TokenizerInfo

_PARTS = re.compile(
    # Punctuation, before a space: `,` of `, and`.
    r"\s*[^\sA-Za-z0-9]++(?= \S)"
    # A word or number with what stands before it.
    r"|[^A-Za-z0-9\x80-\U0010ffff]*+(?:[A-Za-z]++|[0-9]++)(?=[\x00-&(-\x7f]|\Z)"
    # Anything else, up to a cut at white space.
    r"|\s*\S+(?:(?! \S)(?!\n[A-Za-z])(?!\s+ [A-Za-z])\s+\S+)*"
    r"(?:\n(?=[A-Za-z])|\s+(?= [A-Za-z])|\s+\Z)?"
    r"|\s+"
)

# Alternatives of the pre-tokenisers' patterns for which the cuts are safe. A pattern must have one
# of each kind, so that it leaves no character over.
_SUFFIX = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LETTERS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:{_SUFFIX})?",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:{_SUFFIX})?",
}
_NUMBERS = {r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}"}
_OTHERS = {
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
}
_LINE_BREAKS = {r"\s*[\r\n]+"}
_CONTRACTIONS = {*_SUFFIX.split("|"), f"(?i:{_SUFFIX})"}
# In this order, at the end: the first leaves the last space of a run to the word behind it.
_SPACES = [r"\s+(?!\S)", r"\s+"]

# Texts that go to the tokenizer in one call, in characters.
_CALL = 1 << 18

# Distinct parts that are kept, and how long one may be: some 150 MB.
_KEPT, _KEPT_LENGTH = 400_000, 64

# When this share of a batch's characters had to be tokenised after all, the text is not of the
# kind that repeats (Chinese, base64): the next batches take the plain way.
_POOR, _PLAIN_BATCHES = 0.6, 32


class Encoder:
    """Encodes documents of one tokenizer. Text that spells a control token is plain text."""

    def __init__(self, info: TokenizerInfo, *, cached: bool = True) -> None:
        # Cheaper than numpy for the few ids of a part. Sizes are those of all common machines.
        self._code = "H" if info.dtype == "<u2" else "I"
        self._control = info.control
        self._tokenizer = info.load()
        self._tokenizer.encode_special_tokens = True
        self._spelt = _spellings(self._tokenizer, info.control)
        self._parts: dict[str, bytes] = {}
        content: dict[str, Any] = json.loads(self._tokenizer.to_str())
        self._further = _without_prefix(content)
        self.cached = cached and _cuts_safely(content)
        self._whole = _added_tokens(content)
        self._plain_left = 0
        self._seen_batches = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, little-endian in the shard's type, without BOS and EOS."""
        if not self.cached or self._plain_left > 0:
            self._plain_left -= 1
            return self._encode_plainly(texts)
        parts = [self._cut(text) for text in texts]
        known = self._parts
        missing = set(chain.from_iterable(parts)).difference(known)
        if missing:
            self._learn(sorted(missing), sum(map(len, texts)))
        result = [b"".join(map(known.__getitem__, document)) for document in parts]
        self._forget(missing)
        return result

    def _cut(self, text: str) -> list[str]:
        """The parts of a text; the text itself when it holds a token that must not be cut."""
        if self._whole is not None:
            composed = text if text.isascii() else unicodedata.normalize("NFC", text)
            if self._whole.search(text) or self._whole.search(composed):
                return [text]
        return _PARTS.findall(text)

    def _forget(self, learnt: Iterable[str]) -> None:
        for part in learnt:
            if len(part) > _KEPT_LENGTH:
                del self._parts[part]
        if len(self._parts) > _KEPT:
            self._parts.clear()

    def _learn(self, missing: list[str], characters: int) -> None:
        self._parts.update(zip(missing, self._encode_plainly(missing), strict=True))
        self._seen_batches += 1
        # The first batches have to fill the table.
        if self._seen_batches > 8 and sum(map(len, missing)) > _POOR * characters:
            self._plain_left = _PLAIN_BATCHES

    def _encode_plainly(self, texts: Sequence[str]) -> list[bytes]:
        result = []
        for some in _calls(texts):
            for text, encoding in zip(
                some, self._tokenizer.encode_batch_fast(some, add_special_tokens=False), strict=True
            ):
                ids = encoding.ids
                if not self._control.isdisjoint(ids):
                    ids = self._without_control(text)
                result.append(array(self._code, ids).tobytes())
        return result

    def _without_control(self, text: str) -> list[int]:
        """Vocabularies of some tokenizers hold `</s>` like any word: cut inside each such word."""
        cuts = sorted(
            {match.start() + 1 for spelling in self._spelt for match in spelling.finditer(text)}
        )
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        result: list[int] = []
        for number, piece in enumerate(pieces):
            ids = self._ids(piece, first=number == 0)
            if not self._control.isdisjoint(ids):
                # Only the normaliser made such a word (of full-width letters, say).
                each = [self._ids(one, first=number + at == 0) for at, one in enumerate(piece)]
                ids = [one for some in each for one in some if one not in self._control]
            result += ids
        return result

    def _ids(self, piece: str, *, first: bool) -> list[int]:
        """The ids of a piece of a text; one that is not the first gets no space in front."""
        tokenizer = self._tokenizer if first else self._further
        ids: list[int] = tokenizer.encode(piece, add_special_tokens=False).ids
        return ids


def _calls(texts: Sequence[str]) -> Iterable[list[str]]:
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _CALL:
            yield some
            some, size = [], 0
    if some:
        yield some


def _spellings(tokenizer: Tokenizer, control: frozenset[int]) -> list[re.Pattern[str]]:
    tokens = (tokenizer.id_to_token(number) for number in control)
    return [re.compile(re.escape(token)) for token in tokens if token and len(token) > 1]


def _without_prefix(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer, but that it puts no space in front of a text."""
    tokenizer = Tokenizer.from_str(json.dumps(_unprefixed(content)))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _unprefixed(content: dict[str, Any]) -> dict[str, Any]:
    return content | {
        "normalizer": _step_unprefixed(content.get("normalizer")),
        "pre_tokenizer": _step_unprefixed(content.get("pre_tokenizer")),
    }


def _step_unprefixed(step: Any) -> Any:
    """Normalisers and pre-tokenisers that put a space in front, made to leave that."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    if step.get("type") == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        inner = [_step_unprefixed(each) for each in step[name]]
        return step | {name: [each for each in inner if each is not None]}
    if step.get("type") == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if step.get("type") == "ByteLevel":
        return step | {"add_prefix_space": False}
    return step


# --- which tokenizers ------------------------------------------------------------------------------


def _cuts_safely(content: dict[str, Any]) -> bool:
    """Whether tokenising the parts of `_PARTS` apart gives what tokenising the whole text gives."""
    return (
        _normalizer_is_safe(content.get("normalizer"))
        and _pre_tokenizer_is_safe(content.get("pre_tokenizer"))
        and not (content.get("model") or {}).get("dropout")
    )


def _added_tokens(content: dict[str, Any]) -> re.Pattern[str] | None:
    """Finds tokens that are taken out of a text before it is cut: those added and not special."""
    words = [
        str(token["content"])
        for token in content.get("added_tokens") or []
        if not token.get("special") and token.get("content")
    ]
    return re.compile("|".join(map(re.escape, words))) if words else None


def _normalizer_is_safe(normalizer: dict[str, Any] | None) -> bool:
    """NFC never joins a character with a space or an ASCII character before or behind a cut.

    A letter behind a cut may take a combining mark, which is behind the cut as well.
    """
    return normalizer is None or normalizer.get("type") == "NFC"


def _pre_tokenizer_is_safe(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = (
        pre_tokenizer["pretokenizers"]
        if pre_tokenizer.get("type") == "Sequence"
        else [pre_tokenizer]
    )
    # One step has to cut, and each has to leave the cuts alone.
    return all(_step_is_safe(step) for step in steps) and sum(map(_step_cuts, steps)) == 1


def _step_is_safe(step: dict[str, Any]) -> bool:
    if step.get("type") == "Digits":
        return True
    if step.get("type") == "ByteLevel":
        return not step.get("add_prefix_space")
    if step.get("type") != "Split":
        return False
    pattern = (step.get("pattern") or {}).get("Regex", "")
    whole = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    return whole and _pattern_is_safe(_alternatives(pattern))


def _pattern_is_safe(alternatives: list[str]) -> bool:
    *most, last, very_last = ["", "", *alternatives]
    given = set(most) - {""}
    return (
        [last, very_last] == _SPACES
        and given <= _LETTERS | _NUMBERS | _OTHERS | _LINE_BREAKS | _CONTRACTIONS
        and all(given & kind for kind in (_LETTERS, _NUMBERS, _OTHERS))
    )


def _step_cuts(step: dict[str, Any]) -> bool:
    return step.get("type") == "Split" or (
        step.get("type") == "ByteLevel" and bool(step.get("use_regex", True))
    )


def _alternatives(pattern: str) -> list[str]:
    """Split a pattern at the `|` outside groups and classes."""
    parts, depth, in_class, at = [""], 0, False, 0
    while at < len(pattern):
        character = pattern[at]
        taken = pattern[at : at + 2] if character == "\\" else character
        if character == "[":
            in_class = True
        elif character == "]":
            in_class = False
        elif not in_class and character in "()":
            depth += 1 if character == "(" else -1
        if character == "|" and depth == 0 and not in_class:
            parts.append("")
        else:
            parts[-1] += taken
        at += len(taken)
    return parts
