"""Reading a manifest: every fault at once, each with its line and the nearest right word.

job.yaml:12: spec.training.learnigRate: unknown field; did you mean learningRate?
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cptjob_api.fields import (
    Path,
    annotation_at,
    as_model,
    bare,
    field_at,
    fields,
    instances,
    parts,
    show,
)
from cptjob_api.job import API_VERSION, GROUP, KIND, CPTJob
from cptjob_api.kubeyaml import Document, documents
from cptjob_api.rules import RULES, Broken
from cptjob_trainer.errors import Fault, ManifestError, MissingInputError, UsageError

# Metadata that any object may have; anything else there is a slip of the pen.
METADATA = (
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)


@dataclass(frozen=True)
class Manifest:
    """The jobs of a file. `notes` says what else was in it and was passed over."""

    path: FilePath
    jobs: tuple[CPTJob, ...]
    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    @property
    def job(self) -> CPTJob:
        """The only job. Raises UsageError when there are several."""
        if len(self.jobs) > 1:
            names = ", ".join(job.metadata.name for job in self.jobs)
            raise UsageError(f"{self.path}: has {len(self.jobs)} jobs ({names}); one is needed")
        return self.jobs[0]

    def line(self, job: CPTJob, place: str) -> int:
        """The line of a field such as `spec.datasets[0].weight`."""
        index = next(number for number, each in enumerate(self.jobs) if each is job)
        return self.documents[index].line_of(as_path(place))


def as_path(place: str) -> Path:
    """`spec.datasets[0].weight` as names and numbers."""
    words = place.replace("[", ".").replace("]", "").split(".")
    return tuple(int(word) if word.isdigit() else word for word in words if word)


def load_manifest(path: FilePath | str) -> Manifest:
    """Read a file. Raises MissingInputError, or ManifestError with every fault that was found."""
    file = FilePath(path)
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(faults=[Fault(str(path), 0, "not UTF-8 text")]) from error
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: str, file: str = "manifest") -> Manifest:
    """Read a manifest's text; `file` is its name in messages."""
    jobs: list[CPTJob] = []
    taken: list[Document] = []
    notes: list[str] = []
    faults: list[Fault] = []
    for document in documents(text, file):
        note = _other_kind(document)
        if note:
            notes.append(f"{file}:{document.line}: {note}")
            continue
        job, found = read_job(document.value)
        faults += [_fault(file, document, each) for each in found]
        taken.append(document)
        if job is not None:
            jobs.append(job)
    if faults:
        raise ManifestError(faults=sorted(faults, key=lambda fault: fault.line))
    if not jobs:
        more = f" ({'; '.join(notes)})" if notes else ""
        raise ManifestError(faults=[Fault(file, 0, f"there is no {KIND} in it{more}")])
    return Manifest(FilePath(file), tuple(jobs), tuple(taken), tuple(notes))


def read_job(value: Any) -> tuple[CPTJob | None, list[Broken]]:
    """A job from a plain document, or everything that is wrong with it."""
    if not isinstance(value, Mapping):
        return None, [Broken((), "must be a mapping with apiVersion, kind, metadata and spec")]
    plain = _without_nulls(value)
    found = _required_words(plain)
    try:
        job = CPTJob.from_json(json.dumps(plain))
    except ValidationError as error:
        found += _explain(error, plain)
        found += _rules_of_sound_parts(plain, found)
        return None, found
    return (None, found) if found else (job, [])


def _other_kind(document: Document) -> str:
    """What a document is when it is surely no CPTJob."""
    value = document.value
    if not isinstance(value, Mapping):
        return ""
    kind, version = str(value.get("kind", "")), str(value.get("apiVersion", ""))
    ours = version.startswith(f"{GROUP}/") or kind == KIND
    slip = bool(difflib.get_close_matches(kind, [KIND], cutoff=0.7)) or not kind or not version
    return "" if ours or slip else f"{version} {kind} is passed over; only {KIND} is read"


def _required_words(plain: Mapping[str, Any]) -> list[Broken]:
    """What the types have a default for and a manifest must say."""
    found = [
        Broken((word,), f"required; write {word}: {right}")
        for word, right in (("apiVersion", API_VERSION), ("kind", KIND))
        if word not in plain
    ]
    metadata = plain.get("metadata")
    if isinstance(metadata, Mapping):
        found += [
            Broken(("metadata", key), _unknown(key, METADATA))
            for key in metadata
            if key not in METADATA
        ]
    return found


def _without_nulls(value: Any) -> Any:
    """The API server drops `field: null` before it applies defaults."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _fault(file: str, document: Document, broken: Broken) -> Fault:
    place = show(broken.path)
    message = f"{place}: {broken.message}" if place else broken.message
    return Fault(file, document.line_of(broken.path), message)


# --- pydantic's faults in our words ---------------------------------------------------------------


def _explain(error: ValidationError, plain: Any) -> list[Broken]:
    found: list[Broken] = []
    for each in error.errors(include_url=False):
        if each["type"] == "rules":
            found += each["ctx"]["broken"]
        else:
            found.append(Broken(_place(each, plain), _words(each)))
    return found


def _place(error: ErrorDetails, plain: Any) -> Path:
    """The path of a fault; pydantic adds `[key]` for faults of a mapping's key."""
    return tuple(part for part in error["loc"] if part != "[key]")


def _words(error: ErrorDetails) -> str:
    path = tuple(error["loc"])
    kind, given, limits = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        model = as_model(annotation_at(CPTJob, path[:-1]))
        return _unknown(str(path[-1]), fields(model) if model else {})
    if kind == "missing":
        return _required(path)
    if kind == "literal_error":
        return _not_among(path, given)
    if kind in _LIMITS:
        bound = next(iter(limits.values()))
        return f"must be {_LIMITS[kind]} {_number(bound)}, not {_number(given)}{_hint(path)}"
    if kind in ("too_long", "too_short"):
        return _length(kind, limits, "items")
    if kind in ("string_too_long", "string_too_short"):
        return _length(kind.removeprefix("string_"), limits, "characters")
    if kind == "string_pattern_mismatch":
        return f"{_shown(given)} does not have the form {limits['pattern']}"
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


def _unknown(word: str, known: Any) -> str:
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


def _required(path: Path) -> str:
    field = field_at(CPTJob, path)
    return (
        f"required: {_uncapital(field.description)}" if field and field.description else "required"
    )


def _not_among(path: Path, given: Any) -> str:
    annotation = bare(annotation_at(CPTJob, path))
    known = get_args(annotation) if get_origin(annotation) is Literal else ()
    near = _nearest(str(given), known)
    advice = f"; did you mean {near}?" if near and near != given else ""
    words = f"one of {', '.join(known)}" if len(known) > 1 else "".join(known)
    return f"must be {words}, not {_shown(given)}{advice}"


def _hint(path: Path) -> str:
    """For a value out of bounds: what leaving it out would mean."""
    field = field_at(CPTJob, path)
    extra = field.json_schema_extra if field else None
    said = extra.get("rule") if isinstance(extra, dict) else None
    return f"; left out, it means: {said}" if said else ""


def _length(kind: str, limits: Mapping[str, Any], what: str) -> str:
    if kind == "too_long":
        return f"must have at most {limits['max_length']} {what}"
    return f"must have at least {limits['min_length']} {what}"


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


# --- rules over the parts that have no fault of their own -----------------------------------------


def _rules_of_sound_parts(plain: Any, found: list[Broken]) -> list[Broken]:
    """Rules that the sound parts of a faulty job break, so that all faults show at once."""
    faulty = [each.path for each in found]
    return list(_broken_in(plain, faulty)) if not _from_rules(found) else []


def _from_rules(found: list[Broken]) -> bool:
    messages = {rule.message for rule in RULES}
    return any(each.message in messages for each in found)


def _broken_in(plain: Any, faulty: list[Path]) -> Iterator[Broken]:
    for rule in RULES:
        if rule.check is None:
            continue
        for path, value in instances(plain, parts(rule.at)):
            if any(_overlap(path, other) for other in faulty):
                continue
            typed: Any = TypeAdapter(annotation_at(CPTJob, path)).validate_json(json.dumps(value))
            if not rule.check(typed):
                yield Broken((*path, *parts(rule.field)), rule.message)


def _overlap(path: Path, other: Path) -> bool:
    shared = min(len(path), len(other))
    return path[:shared] == other[:shared]
