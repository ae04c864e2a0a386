"""The manifests to start from."""

from pathlib import Path

import pytest

from cptjob_api.manifest import load_manifest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_faultless_manifest_named_like_its_file(path: Path) -> None:
    assert [job.metadata.name for job in load_manifest(path).jobs] == [path.stem]
