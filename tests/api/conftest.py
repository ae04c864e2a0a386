"""A small sound job, and ways to change it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cptjob_api.fields import Path
from cptjob_api.manifest import as_path

Job = dict[str, Any]
MakeJob = Callable[..., Job]


def put(document: Any, path: Path, value: Any) -> None:
    """Set what is at `path`, making mappings on the way."""
    for part in path[:-1]:
        document = document[part] if isinstance(part, int) else document.setdefault(part, {})
    document[path[-1]] = value


@pytest.fixture(name="job")
def make_job() -> MakeJob:
    """`job({"spec.training.seed": 3})`: a sound job's document with these fields changed."""

    def make(changes: dict[str, Any] | None = None) -> Job:
        document: Job = {
            "apiVersion": "training.cptjob.io/v1alpha1",
            "kind": "CPTJob",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"storageUri": "pvc://models/tiny"},
                "datasets": [{"name": "domain", "storageUri": "pvc://data/domain"}],
            },
        }
        for place, value in (changes or {}).items():
            put(document, as_path(place), copy.deepcopy(value))
        return document

    return make
