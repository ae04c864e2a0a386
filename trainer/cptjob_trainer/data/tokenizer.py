"""The model's tokenizer, without transformers: its file, its special tokens and the system prompt.

`tokenizer.json` is read by the `tokenizers` library directly. A model that has only a slow
tokenizer's files is converted once by transformers.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cptjob_trainer import unfinished
from cptjob_trainer.errors import DataError
from cptjob_trainer.json_file import json_object
from cptjob_trainer.model import tokenizer_files


@dataclass(frozen=True)
class TokenizerInfo:
    """What a worker needs to tokenise. `control` are ids that a document's text never gives;
    `size` is one more than the highest id.
    """

    path: Path
    fingerprint: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    control: frozenset[int]
    size: int

    @property
    def dtype(self) -> str:
        """Type of an id in a token shard."""
        return "<u2" if self.size <= 1 << 16 else "<u4"

    def load(self) -> Tokenizer:
        """The tokenizer, without truncation and padding."""
        return _load(self.path)


def load(model: Path, cache: Path) -> TokenizerInfo:
    """Read the tokenizer of a model directory; a converted one is kept under `cache`."""
    digest = tokenizer_files.fingerprint(model)
    path = model / "tokenizer.json"
    if not path.is_file():
        path = _converted(model, cache / f"tokenizer-{digest}.json")
    tokenizer = _load(path)
    settings = _settings(model)
    eos = _id(tokenizer, settings, "eos_token")
    if eos is None:
        raise DataError(
            f"{model}: the tokenizer names no end-of-text token; add eos_token to "
            "tokenizer_config.json"
        )
    special = {
        number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    bos = _bos(tokenizer, settings, special)
    pad = _id(tokenizer, settings, "pad_token")
    unknown = _id(tokenizer, settings, "unk_token")
    control = (special - {unknown}) | {eos} | ({bos} if bos is not None else set())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return TokenizerInfo(
        path=path,
        fingerprint=digest,
        bos_id=bos,
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        control=frozenset(control),
        size=max(vocabulary.values(), default=0) + 1,
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json_object(path) if path.is_file() else {}


def _load(path: Path) -> Tokenizer:
    text = tokenizer_files.read(path)
    try:
        tokenizer = Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{path}: cannot be read as a tokenizer: {error}; copy it from the base model"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _converted(model: Path, target: Path) -> Path:
    """A fast tokenizer made from a slow one's files."""
    if target.is_file():
        return target
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        text = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # whatever a converter raises, the advice is the same
        raise DataError(
            f"{model}: there is no tokenizer.json, and the slow tokenizer cannot be converted "
            f"({error}); save the model with a fast tokenizer"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished.path_in(target.parent)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def _settings(model: Path) -> dict[str, Any]:
    """Special tokens by name; tokenizer_config.json wins over the older file."""
    return _read_json(model / "special_tokens_map.json") | {
        name: value
        for name, value in _read_json(model / "tokenizer_config.json").items()
        if value is not None
    }


def _content(settings: dict[str, Any], name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _id(tokenizer: Tokenizer, settings: dict[str, Any], name: str) -> int | None:
    content = _content(settings, name)
    found: int | None = None if content is None else tokenizer.token_to_id(content)
    return found


def _bos(tokenizer: Tokenizer, settings: dict[str, Any], special: set[int]) -> int | None:
    """The token in front of a document: `add_bos_token` decides, else what the tokenizer adds."""
    named = _id(tokenizer, settings, "bos_token")
    wanted = settings.get("add_bos_token")
    if wanted is not None:
        return named if wanted else None
    ids: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    added = ids[0] if ids and ids[: len(plain)] != plain else None
    return added if added is not None and (added == named or added in special) else None


# --- the system prompt ----------------------------------------------------------------------------


def prompt_ids(info: TokenizerInfo, model: Path, prompt: str, warn: list[str]) -> tuple[int, ...]:
    """The system prompt as tokens, without BOS (a row puts that in front by itself).

    It is rendered by the model's chat template with the one message {role: system}. Where there is
    no template, or it takes no such message, the prompt and an empty line stand as plain text.
    """
    tokenizer = info.load()
    template = _template(model)
    rendered = None
    if template is not None:
        rendered = _rendered(template, prompt, _settings(model), warn)
    if rendered is None:
        tokenizer.encode_special_tokens = True
        rendered = prompt + "\n\n"
    ids: list[int] = tokenizer.encode(rendered, add_special_tokens=False).ids
    if info.bos_id is not None and ids[:1] == [info.bos_id]:
        ids = ids[1:]
    return tuple(ids)


def _template(model: Path) -> str | None:
    file = model / "chat_template.jinja"
    if file.is_file():
        return tokenizer_files.read(file).decode()
    value = _read_json(model / "chat_template.json").get("chat_template")
    value = value or _read_json(model / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        value = _named_template(value)
    return value if isinstance(value, str) else None


def _named_template(templates: Iterable[Any]) -> str | None:
    """Of several templates, the one named default."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    return None


def _rendered(template: str, prompt: str, settings: dict[str, Any], warn: list[str]) -> str | None:
    """Render as transformers does, but with a fixed date: the tokens must not change over night."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, indent=options.get("indent")
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _fixed_date
    tokens = {name: _content(settings, name) for name in settings if name.endswith("_token")}
    try:
        text = environment.from_string(template).render(
            messages=[{"role": "system", "content": prompt}],
            add_generation_prompt=False,
            tools=None,
            documents=None,
            **{name: token for name, token in tokens.items() if token is not None},
        )
    except Exception as error:  # a template is a program: it may raise anything
        warn.append(
            f"training.systemPrompt: the chat template takes no system message ({error}); the "
            "prompt is used as plain text"
        )
        return None
    if prompt.strip() not in text:
        warn.append(
            "training.systemPrompt: the chat template leaves the system message out; the prompt "
            "is used as plain text"
        )
        return None
    return text


def _fixed_date(layout: str) -> str:
    import datetime

    return datetime.date(2025, 1, 1).strftime(layout)
