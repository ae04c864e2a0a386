"""The manifests that the pages show, in front of a real API server and with Kueue's definitions."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from testplane import definitions
from testplane.plane import ControlPlane, KubectlError

ROOT = Path(__file__).parents[2]
# Whole manifests: what has a kind. Values of the chart have none.
MANIFESTS = {
    f"{page.name} {each['kind']} {each['metadata']['name']}": each
    for page in sorted((ROOT / "docs").glob("*.md"))
    for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    for each in yaml.safe_load_all(block)
    if "kind" in each
}


@pytest.fixture(scope="module", name="server")
def serve_kueue(plane: ControlPlane) -> Iterator[ControlPlane]:
    with definitions.installed(plane, ["kueue"]):
        yield plane


def try_out(plane: ControlPlane, namespace: str, manifest: dict[str, object]) -> str:
    """What `kubectl apply` would do; raises KubectlError with what the server has against it."""
    where = dict(manifest["metadata"])  # type: ignore[call-overload]
    where.pop("namespace", None)  # of the page's reader
    how = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-n", namespace)
    stdin = yaml.safe_dump(manifest | {"metadata": where})
    return plane.kubectl(*how, "-f", "-", stdin=stdin)


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_the_server_takes_each_manifest_and_knows_each_of_its_fields(
    manifest: dict[str, object], server: ControlPlane, namespace: str
) -> None:
    assert "serverside-applied" in try_out(server, namespace, manifest)
    with pytest.raises(KubectlError, match="notAField"):
        try_out(server, namespace, manifest | {"notAField": {"a": 1}})
