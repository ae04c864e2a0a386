"""What GitOps tools conclude from a job, each by its own code: kstatus, Flux and Argo CD."""

import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from cptjob_api.conditions import PHASES, Phase, PhaseRow, Reason
from cptjob_operator.plan.standing import conditions
from helmchart import ROOT, Object
from testplane import binaries, definitions
from testplane.plane import ControlPlane, KubectlError

ARGO = ROOT / "deploy" / "argocd" / "argocd-cm.yaml"
ARGO_JOBS = ROOT / "deploy" / "argocd" / "jobs.yaml"
FLUX = ROOT / "deploy" / "flux" / "jobs.yaml"
NOW = datetime(2030, 1, 1, tzinfo=UTC)
ARGO_WORDS = {"Current": "Healthy", "InProgress": "Progressing", "Failed": "Degraded"}

Judge = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="session", name="judges")
def make_judges(
    tmp_path_factory: pytest.TempPathFactory, report: binaries.Report
) -> dict[str, Judge]:
    """What each tool says of objects."""
    programs = binaries.find(["health"], report)
    folder = tmp_path_factory.mktemp("health")
    lua, expressions = folder / "check.lua", folder / "expressions.json"
    data = yaml.safe_load(ARGO.read_text("utf-8"))["data"]
    lua.write_text(data["resource.customizations.health.training.cptjob.io_CPTJob"])
    (check,) = flux_kustomization()["spec"]["healthCheckExprs"]
    expressions.write_text(json.dumps(check))
    return {
        "kstatus": judge(programs["kstatus"]),
        "flux": judge(programs["fluxhealth"], expressions),
        "argo": judge(programs["argohealth"], lua),
    }


def judge(program: Path, *arguments: Path) -> Judge:
    def ask(*objects: Object) -> list[dict[str, str]]:
        done = subprocess.run(
            [program, *arguments],
            input="\n".join(json.dumps(each) for each in objects),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(objects)
        return answers

    return ask


def flux_kustomization() -> Object:
    documents = yaml.safe_load_all(FLUX.read_text("utf-8"))
    (found,) = (each for each in documents if each["kind"] == "Kustomization")
    return dict(found)


def job(status: dict[str, Any] | None, generation: int = 1) -> Object:
    found: Object = {
        "apiVersion": "training.cptjob.io/v1alpha1",
        "kind": "CPTJob",
        "metadata": {"name": "tiny", "namespace": "team", "generation": generation},
        "spec": {},
    }
    return found if status is None else found | {"status": status}


def in_phase(phase: Phase, generation: int = 1) -> Object:
    """A job as the operator reports it in that phase."""
    stated = conditions((), phase, Reason.ACCEPTED, "as it is", 1, NOW)
    status = {
        "observedGeneration": 1,
        "phase": str(phase),
        "conditions": [each.model_dump(mode="json", exclude_none=True) for each in stated],
    }
    return job(status, generation)


@pytest.mark.parametrize("row", PHASES, ids=lambda row: str(row.phase))
def test_every_tool_concludes_what_the_table_says(row: PhaseRow, judges: dict[str, Judge]) -> None:
    found = in_phase(row.phase)
    said = {name: ask(found)[0]["status"] for name, ask in judges.items()}
    assert said == {
        "kstatus": row.kstatus,
        "flux": row.kstatus,
        "argo": ARGO_WORDS[row.kstatus],
    }


FRESH = {
    "as the API server makes it": job({"observedGeneration": -1}),
    "changed after it was complete": in_phase(Phase.COMPLETE, generation=2),
    "changed after it had failed": in_phase(Phase.FAILED, generation=2),
}


@pytest.mark.parametrize("found", FRESH.values(), ids=FRESH)
def test_what_the_operator_has_not_seen_is_never_taken_for_done(
    found: Object, judges: dict[str, Judge]
) -> None:
    said = {name: ask(found)[0]["status"] for name, ask in judges.items()}
    assert said == {"kstatus": "InProgress", "flux": "InProgress", "argo": "Progressing"}


def test_argo_cd_waits_for_a_job_without_a_status(judges: dict[str, Judge]) -> None:
    assert judges["argo"](job(None)) == [
        {"status": "Progressing", "message": "Waiting for the operator"}
    ]


def test_argo_cd_tells_the_phase_and_why(judges: dict[str, Judge]) -> None:
    failed, waiting = judges["argo"](in_phase(Phase.FAILED), in_phase(Phase.PENDING))
    assert failed["message"] == "Failed: as it is"
    assert waiting["message"] == "Pending: as it is"


def test_the_check_is_filed_under_the_name_that_argo_cd_looks_for() -> None:
    (key,) = yaml.safe_load(ARGO.read_text("utf-8"))["data"]
    assert key == "resource.customizations.health.training.cptjob.io_CPTJob"


def test_flux_judges_cptjobs_and_waits_for_them() -> None:
    spec = flux_kustomization()["spec"]
    (check,) = spec["healthCheckExprs"]
    assert (check["apiVersion"], check["kind"]) == ("training.cptjob.io/v1alpha1", "CPTJob")
    assert spec["wait"] is True


# --- the objects of GitOps tools, by their own definitions ----------------------------------------


@pytest.fixture(scope="module", name="tools")
def install_definitions(plane: ControlPlane) -> Iterator[ControlPlane]:
    """A cluster with the definitions of Flux and Argo CD, and their namespaces."""
    namespaces = ("argocd", "flux-system")
    with definitions.installed(plane, ["flux-source", "flux-kustomize", "argo"]):
        for name in namespaces:
            plane.kubectl("create", "namespace", name)
        yield plane
        plane.kubectl("delete", "namespace", *namespaces)


def try_out(plane: ControlPlane, found: Object) -> str:
    """What `kubectl apply` would do. Raises KubectlError with what the API server has against it."""
    how = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    return plane.kubectl(*how, stdin=yaml.safe_dump(found))


OBJECTS = {
    f"{path.parent.name} {each['kind']}": each
    for path in (ARGO, ARGO_JOBS, FLUX)
    for each in yaml.safe_load_all(path.read_text("utf-8"))
}


@pytest.mark.parametrize("found", OBJECTS.values(), ids=OBJECTS)
def test_the_tools_definitions_take_each_object_and_know_each_of_its_fields(
    found: Object, tools: ControlPlane
) -> None:
    assert "serverside-applied" in try_out(tools, found)
    if "spec" in found:
        with pytest.raises(KubectlError, match="targetNamespaces"):
            try_out(tools, found | {"spec": found["spec"] | {"targetNamespaces": ["a"]}})
