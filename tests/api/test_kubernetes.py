"""The definition in the hands of the API server's own code (kubernetes/, in Go).

Building that takes minutes and the Go toolchain, so these run with `make soak`; what they found is
kept by the quick tests beside them.
"""

import json
import os
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from cptjob_api.generate import GENERATED
from testplane import binaries

pytestmark = pytest.mark.soak

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
CRD = ROOT / next(iter(GENERATED))
MakeJob = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session", name="programs")
def build_programs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("programs")
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    subprocess.run(
        [binaries.find_go() or "go", "build", "-o", str(folder), "./..."],
        cwd=HERE / "kubernetes",
        env=environment,
        check=True,
    )
    return folder


def judge(programs: pathlib.Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [programs / "checkcrd", CRD],
        input="\n".join(json.dumps(each) for each in requests),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_api_server_takes_the_definition(programs: pathlib.Path) -> None:
    assert judge(programs) == []


def test_a_sound_job_gets_its_defaults_and_has_no_fault(
    programs: pathlib.Path, job: MakeJob
) -> None:
    (answer,) = judge(programs, {"object": job()})
    assert answer["faults"] == []
    assert answer["object"]["status"]["observedGeneration"] == -1
    assert answer["object"]["spec"]["checkpoint"]["everySteps"] == 2000
    assert answer["object"]["spec"]["training"]["optimizer"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spec.checkpoint.keepLast": 0}, "greater than or equal to 1"),
        ({"spec.datasets[0].weight": 0}, "should be greater than 0"),
        ({"spec.training.learnigRate": 1}, "spec.training.learnigRate: unknown field"),
        ({"metadata.name": "a" * 41}, "metadata.name: must be at most 40 characters"),
        ({"spec.model.storageUri": "file:///x"}, "file:// is for local runs only"),
        ({"spec.model.storageUri": "pvc://a/../b"}, "without '..' in it"),
        ({"spec.scheduling.nodeNames": ["a", "a"]}, "Duplicate value"),
        ({"spec.datasets": []}, "needs at least one data set with role Domain"),
        ({"spec.training.lora": {}}, "spec.training.lora: Invalid value: lora is for method LoRA"),
        (
            {"spec.training.sifting": {"mode": "Unbiased", "betaValue": 1}},
            "mode Unbiased needs a betaValue below 1",
        ),
    ],
    ids=str,
)
def test_the_api_server_refuses_what_we_refuse(
    changes: dict[str, Any], fault: str, programs: pathlib.Path, job: MakeJob
) -> None:
    (answer,) = judge(programs, {"object": job(changes)})
    assert len(answer["faults"]) == 1
    assert fault in answer["faults"][0]


def test_an_accepted_job_is_held_to_what_it_was(programs: pathlib.Path, job: MakeJob) -> None:
    accepted = {"status": {"resolved": {"epochs": 3}}}
    seed = {"spec.training.seed": 1}
    held, fresh, allowed = judge(
        programs,
        {"object": job(accepted | seed), "old": job(accepted)},
        {"object": job(seed), "old": job()},
        {"object": job(accepted | {"spec.suspend": True}), "old": job(accepted)},
    )
    assert ["cannot change once the job is accepted" in each for each in held["faults"]] == [True]
    assert fresh["faults"] == allowed["faults"] == []


def test_the_largest_job_costs_a_small_part_of_the_budget(
    programs: pathlib.Path, job: MakeJob
) -> None:
    datasets = [{"name": f"d{n}", "storageUri": "pvc://d/" + "a/" * 500} for n in range(64)]
    largest = job(
        {
            "status": {"resolved": {"epochs": 3}},
            "spec.datasets": [each | {"weight": 1} for each in datasets],
            "spec.validation.datasets": [each | {"name": f"v{each['name']}"} for each in datasets],
            "spec.trainer.numNodes": 500,
            "spec.scheduling": {
                "mode": "Manual",
                "nodeNames": [f"{n:0250}" for n in range(500)],
            },
        }
    )
    (answer,) = judge(programs, {"object": largest, "old": largest})
    assert answer["faults"] == []
    assert answer["cost"] < 1_000_000  # of 10,000,000


def test_the_golden_file_is_what_kubernetes_reads(programs: pathlib.Path) -> None:
    golden = (HERE / "golden" / "yaml.jsonl").read_text(encoding="utf-8").strip().split("\n")
    said = [json.loads(line) for line in golden]
    done = subprocess.run(
        [programs / "readyaml"],
        input="\n".join(json.dumps(each["in"]) for each in said),
        text=True,
        capture_output=True,
        check=True,
    )
    assert [json.loads(line) for line in done.stdout.strip().split("\n")] == said
