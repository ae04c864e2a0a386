"""The manifests to start from."""

import re
from pathlib import Path

import pytest
import yaml

from cptjob_api.manifest import load_manifest
from cptjob_api.unsupported import unsupported
from cptjob_operator.plan.accept import Accepted, accept
from cptjob_operator.settings import Settings

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_faultless_manifest_named_like_its_file(path: Path) -> None:
    jobs = load_manifest(path).jobs
    assert [job.metadata.name for job in jobs] == [path.stem]
    assert [unsupported(job) for job in jobs] == [[]]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_accepted_by_an_operator_with_its_own_settings(path: Path) -> None:
    (job,) = load_manifest(path).jobs
    assert isinstance(accept(job, Settings()), Accepted)


def test_the_claims_of_the_examples_are_among_those_to_start_from() -> None:
    claims = yaml.safe_load_all((ROOT / "deploy" / "storage" / "claims.yaml").read_text("utf-8"))
    names = {claim["metadata"]["name"] for claim in claims}
    for path in EXAMPLES:
        assert set(re.findall(r"pvc://([^/\s]+)", path.read_text("utf-8"))) - {"CLAIM"} <= names
