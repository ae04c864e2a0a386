"""The manifests to start from."""

from pathlib import Path

import pytest

from cptjob_api.manifest import load_manifest
from cptjob_api.unsupported import unsupported

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_faultless_manifest_named_like_its_file(path: Path) -> None:
    jobs = load_manifest(path).jobs
    assert [job.metadata.name for job in jobs] == [path.stem]
    assert [unsupported(job) for job in jobs] == [[]]
