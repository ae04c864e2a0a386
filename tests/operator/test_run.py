"""Who the operator is, as its Deployment tells it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cptjob_operator.run import own_identity

MANIFESTS = Path(__file__).parents[2] / "deploy" / "operator.yaml"


def _environment() -> dict[str, str]:
    """Variables of the operator's container that say something of its pod, and the field of each."""
    with MANIFESTS.open() as file:
        documents: list[dict[str, Any]] = list(yaml.safe_load_all(file))
    (deployment,) = (each for each in documents if each and each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {
        each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"]
        for each in container["env"]
        if "valueFrom" in each
    }


def test_a_container_that_is_started_anew_in_its_pod_keeps_the_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, field in _environment().items():
        monkeypatch.setenv(name, field)
    assert own_identity() == "metadata.name_metadata.uid"
