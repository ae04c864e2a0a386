"""Reading a manifest: every fault at once, each with its line and the nearest right word.

job.yaml:12: spec.training.learnigRate: unknown field; did you mean learningRate?
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cptjob_api.faults import explain, unknown
from cptjob_api.fields import Path, annotation_at, instances, parts, show
from cptjob_api.job import API_VERSION, GROUP, KIND, CPTJob
from cptjob_api.kubeyaml import Document, documents
from cptjob_api.rules import RULES, Broken
from cptjob_trainer.errors import Fault, ManifestError, MissingInputError

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
        """The only job. Raises ManifestError when there are several."""
        if len(self.jobs) > 1:
            further = [
                Fault(
                    str(self.path),
                    document.line,
                    f"a further {KIND} begins here, {job.metadata.name}; one is needed: put each "
                    "into a file of its own",
                )
                for job, document in zip(self.jobs[1:], self.documents[1:], strict=True)
            ]
            raise ManifestError(faults=further)
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
        faults += [fault for each in found for fault in _faults(file, document, each)]
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
        found += explain(error, CPTJob)
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
            Broken(("metadata", key), unknown(key, METADATA))
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


def _faults(file: str, document: Document, broken: Broken) -> Iterator[Fault]:
    for path, words in broken.places or ((broken.path, ""),):
        said = (show(path), f"{words}; {broken.message}" if words else broken.message)
        yield Fault(file, document.line_of(path), ": ".join(each for each in said if each))


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
        for path, value in instances(plain, parts(rule.at)):
            if any(_overlap(path, other) for other in faulty):
                continue
            typed: Any = TypeAdapter(annotation_at(CPTJob, path)).validate_json(json.dumps(value))
            yield from rule.judge(path, typed)


def _overlap(path: Path, other: Path) -> bool:
    shared = min(len(path), len(other))
    return path[:shared] == other[:shared]
