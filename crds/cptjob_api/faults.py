"""pydantic's faults in our words: where they are, what is wrong, the nearest right word."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cptjob_api.fields import Path, annotation_at, as_model, bare, field_at, fields
from cptjob_api.rules import Broken
from cptjob_api.spec import (
    LABEL_VALUE_PATTERN,
    OBJECT_NAME_PATTERN,
    QUANTITY_PATTERN,
    VARIABLE_PATTERN,
)
from cptjob_trainer.config import BANDWIDTH_PATTERN, NAME_PATTERN
from cptjob_trainer.words import counted

#: The type of the whole document.
Root: TypeAlias = type[BaseModel]


def explain(error: ValidationError, root: Root) -> list[Broken]:
    """Every fault that pydantic found in a document for `root`, in our words."""
    found: list[Broken] = []
    for each in error.errors(include_url=False):
        if each["type"] == "rules":
            found += each["ctx"]["broken"]
        else:
            found.append(Broken(_place(each), _words(each, root)))
    return found


def _place(error: ErrorDetails) -> Path:
    """The path of a fault; pydantic adds `[key]` for faults of a mapping's key."""
    return tuple(part for part in error["loc"] if part != "[key]")


def _words(error: ErrorDetails, root: Root) -> str:
    path = tuple(error["loc"])
    kind, given, limits = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        model = as_model(annotation_at(root, path[:-1]))
        return unknown(str(path[-1]), fields(model) if model else {})
    if kind == "missing":
        return _required(path, root)
    if kind == "literal_error":
        return _not_among(path, given, root)
    if kind in _LIMITS:
        bound = next(iter(limits.values()))
        return f"must be {_LIMITS[kind]} {_number(bound)}, not {_number(given)}{_hint(path, root)}"
    if kind in ("too_long", "too_short"):
        return _length(kind, limits, "item")
    if kind in ("string_too_long", "string_too_short"):
        return _length(kind.removeprefix("string_"), limits, "character")
    if kind == "string_pattern_mismatch":
        form = FORMS.get(limits["pattern"])
        said = f"is not {form}" if form else f"does not have the form {limits['pattern']}"
        return f"{_shown(given)} {said}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {_shown(given)}{_quotes(kind, given)}"
    return error["msg"]


_LIMITS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}

_LABEL = "letters, digits, '-', '_' and '.', beginning and ending with a letter or digit"
#: What a person is told in place of a regular expression.
FORMS = {
    QUANTITY_PATTERN: "a quantity; write a number with or without a unit, such as 8Gi, 500m or 2",
    BANDWIDTH_PATTERN: "a number of bytes a second; write it such as 200Mi or 1G",
    NAME_PATTERN: "lower-case letters, digits and '-', beginning and ending with a letter or digit, "
    "such as my-data",
    OBJECT_NAME_PATTERN: "the name of an object; write lower-case letters, digits, '-' and '.', "
    "such as my-secret",
    LABEL_VALUE_PATTERN: f"the value of a label; write {_LABEL}",
    VARIABLE_PATTERN: "the name of a variable; write letters, digits and '_', such as NCCL_DEBUG",
}


def unknown(word: str, known: Any) -> str:
    """What to say of a word that is not among the known ones."""
    near = _nearest(word, known)
    if near:
        return f"unknown field; did you mean {near}?"
    return f"unknown field; known here: {', '.join(sorted(known))}" if known else "unknown field"


def _nearest(word: str, known: Any) -> str:
    """The known word that is most like `word`, whatever its case."""
    by_lower = {str(each).lower(): str(each) for each in known}
    plain = word.lower().replace("_", "").replace("-", "")
    near = difflib.get_close_matches(plain, by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else ""


def _required(path: Path, root: Root) -> str:
    field = field_at(root, path)
    return (
        f"required: {_uncapital(field.description)}" if field and field.description else "required"
    )


def _not_among(path: Path, given: Any, root: Root) -> str:
    annotation = bare(annotation_at(root, path))
    known = get_args(annotation) if get_origin(annotation) is Literal else ()
    near = _nearest(str(given), known)
    advice = f"; did you mean {near}?" if near and near != given else ""
    words = f"one of {', '.join(known)}" if len(known) > 1 else "".join(known)
    return f"must be {words}, not {_shown(given)}{advice}"


def _hint(path: Path, root: Root) -> str:
    """For a value out of bounds: what leaving it out would mean."""
    field = field_at(root, path)
    extra = field.json_schema_extra if field else None
    said = extra.get("rule") if isinstance(extra, dict) else None
    return f"; left out, it means: {said}" if said else ""


def _length(kind: str, limits: Mapping[str, Any], what: str) -> str:
    if kind == "too_long":
        return f"must have at most {counted(limits['max_length'], what)}"
    return f"must have at least {counted(limits['min_length'], what)}"


def _quotes(kind: str, given: Any) -> str:
    """The usual cause of a wrong type is how YAML reads a bare word."""
    if kind == "string_type" and isinstance(given, bool | int | float):
        return "; put it in quotes"
    if isinstance(given, str) and kind != "string_type":
        return "; take away the quotes" if _is_number(given) and "number" in _KINDS[kind] else ""
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(value: Any) -> str:
    return repr(int(value)) if isinstance(value, float) and value.is_integer() else _shown(value)


def _shown(value: Any) -> str:
    """A value in a message, in JSON's words and not too long."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _uncapital(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].removesuffix(".")
