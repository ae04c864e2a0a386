"""kubectl as a person uses it, with the operator at work."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from world import World

from testplane.plane import ControlPlane

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
TINY = EXAMPLES / "tiny.yaml"
REPORT = {
    "currentStep": 100,
    "totalSteps": 100,
    "progressPercentage": 100,
    "estimatedRemainingSeconds": 0,
    "lastCheckpoint": {"step": 80, "time": "2030-01-01T00:00:00Z", "uri": "pvc://results/job"},
}

pytestmark = pytest.mark.usefixtures("operator")


def kubectl(world: World, *arguments: str) -> str:
    return world.plane.kubectl(*arguments, "-n", world.namespace)


def row(world: World, *more: str) -> dict[str, str]:
    """What `kubectl get` shows of the only job; columns are as wide as their widest cell."""
    head, line = kubectl(world, "get", "cpt", *more).splitlines()
    columns = [(each.start(), each[0]) for each in re.finditer(r"\S+", head)]
    ends = [start for start, _ in columns[1:]] + [None]
    return {name: line[start:end].strip() for (start, name), end in zip(columns, ends, strict=True)}


def everything(world: World) -> set[str]:
    """The names of all objects in the namespace but Events, by `kubectl`."""
    listed = world.plane.kubectl("api-resources", "--verbs=list", "--namespaced", "-o", "name")
    kinds = [name for name in listed.split() if not name.startswith("events")]
    return set(kubectl(world, "get", ",".join(kinds), "-o", "name").split())


@pytest.fixture(name="waiting")
def make_waiting(world: World) -> Any:
    """`waiting("Complete")`: kubectl waits for that condition of `job`; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def wait(condition: str) -> subprocess.Popen[str]:
        plane = world.plane
        command = [
            *(str(plane.programs["kubectl"]), "--kubeconfig", str(plane.kubeconfig)),
            *("wait", f"--for=condition={condition}", "cptjob/job", "--timeout=300s"),
            *("-n", world.namespace),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield wait
    for each in started:
        each.kill()
        each.communicate()


def test_kubectl_waits_until_the_job_is_complete(world: World, waiting: Any) -> None:
    world.create("job")
    complete, running = waiting("Complete"), waiting("Running")
    world.prepare("job")
    world.run("job", 1)
    assert running.wait(60) == 0
    assert complete.poll() is None, "a job that runs is not complete"
    world.complete("job")
    assert complete.wait(60) == 0
    assert complete.stdout.read() == "cptjob.training.cptjob.io/job condition met\n"


def test_kubectl_waits_until_a_job_has_failed(world: World, waiting: Any) -> None:
    world.create("job")
    failed = waiting("Failed")
    world.prepare("job")
    (pod,) = world.pods("coordinator")
    said = {"exitCode": 65, "reason": "DataError", "message": "a.jsonl:7: not JSON"}
    world.kubelet.exit(world.namespace, pod.metadata.name, 65, json.dumps(said))
    assert failed.wait(60) == 0
    refused = world.plane.try_kubectl(
        *("wait", "--for=condition=Complete", "cptjob/job", "--timeout=0", "-n", world.namespace)
    )
    assert refused.returncode != 0


def test_a_job_that_is_refused_is_stalled_until_kubectl_mends_it(
    world: World, waiting: Any
) -> None:
    world.create("job", changes={"spec.scheduling": {"pool": "unknown"}})
    assert waiting("Stalled").wait(60) == 0
    assert row(world)["STATE"] == "Pending"
    assert "pool" in world.condition("job", "Ready")["message"]
    assert world.told("job", "InvalidSpec", "unknown")
    assert (world.pods("coordinator"), world.children()) == ([], [])
    change = json.dumps({"spec": {"scheduling": {"pool": None}}})
    kubectl(world, "patch", "cptjob", "job", "--type=merge", "-p", change)
    world.prepare("job")
    world.run("job", 1)
    assert not world.condition("job", "Stalled")


def test_the_columns_tell_a_job_from_its_start_to_its_end(world: World) -> None:
    world.create("job", workers=2)
    world.wait(lambda: row(world)["STATE"] == "Preparing", "it to prepare")
    assert row(world) | {"AGE": ""} == {
        "NAME": "job",
        "STATE": "Preparing",
        "NODES": "2",
        "STEP": "",
        "PROGRESS": "",
        "RESTARTS": "0",
        "CHECKPOINT": "",
        "AGE": "",
    }
    world.prepare("job")
    world.run("job", 2)
    failed = world.living("job")[0].metadata.name
    world.kubelet.exit(world.namespace, failed, 1, "boom")
    world.wait(lambda: row(world)["RESTARTS"] == "1", "the restart")
    assert row(world)["STATE"] == "Restarting"
    world.run("job", 2)
    world.complete("job", REPORT)
    world.wait(lambda: row(world)["STATE"] == "Complete", "it to be complete")
    shown = row(world, "-o", "wide")
    assert re.fullmatch(r"\d+[sm].*", shown.pop("AGE"))
    assert shown == {
        "NAME": "job",
        "STATE": "Complete",
        "NODES": "2",
        "STEP": "100",
        "PROGRESS": "100",
        "RESTARTS": "1",
        "CHECKPOINT": "80",
        "ETA": "0",
        "POOL": "default",
    }


def test_a_running_job_is_not_scaled_and_a_suspended_one_is(world: World) -> None:
    def scale(replicas: int) -> subprocess.CompletedProcess[str]:
        arguments = ("scale", "cptjob/job", f"--replicas={replicas}", "-n", world.namespace)
        return world.plane.try_kubectl(*arguments)

    world.create("job")
    world.prepare("job")
    world.run("job", 1)
    refused = scale(3)
    assert refused.returncode != 0
    assert (
        "spec.trainer.numNodes: can change only with an elasticPolicy or while the job is suspended"
    ) in refused.stderr
    world.suspend("job")
    assert scale(3).stdout == "cptjob.training.cptjob.io/job scaled\n"
    world.suspend("job", on=False)
    world.prepare("job")
    world.run("job", 3)
    assert world.scale("job")["status"]["replicas"] == 3
    selector = world.scale("job")["status"]["selector"]
    assert len(kubectl(world, "get", "pods", "-l", selector, "-o", "name").split()) == 3


def test_kubectl_explains_every_field(plane: ControlPlane) -> None:
    # A field's name stands two spaces in, its sentence four.
    for place in ("spec", "spec.training", "spec.trainer", "spec.scheduling", "status"):
        text = plane.kubectl("explain", f"cptjob.{place}")
        fields = re.split(r"^  (?=\w+\t<)", text.partition("FIELDS:\n")[2], flags=re.MULTILINE)[1:]
        assert len(fields) >= 6
        for field in fields:
            assert re.search(r"^    [A-Z].*?[.:]$", field, re.MULTILINE | re.DOTALL), field


def test_every_example_prepares_once_it_is_applied(world: World) -> None:
    kubectl(world, "apply", "-f", str(EXAMPLES))
    specs = {
        path.stem: yaml.safe_load(path.read_text("utf-8"))["spec"]
        for path in EXAMPLES.glob("*.yaml")
    }
    held = [name for name, spec in specs.items() if spec.get("suspend")]
    assert len(specs) >= 8

    def phases() -> dict[str, str]:
        columns = "custom-columns=:.metadata.name,:.status.phase"
        shown = kubectl(world, "get", "cpt", "--no-headers", "-o", columns)
        return dict(line.split() for line in shown.splitlines())

    prepare = dict.fromkeys(specs, "Preparing")
    suspended = dict.fromkeys(held, "Suspended")
    world.wait(lambda: phases() == prepare | suspended, "the examples to prepare")
    for name in held:
        world.suspend(name, on=False)
    world.wait(lambda: phases() == prepare, "those that were held to go on")


@pytest.mark.parametrize("cascade", ["background", "foreground"])
def test_a_deleted_job_leaves_nothing(lively_world: World, cascade: str) -> None:
    world = lively_world
    before = everything(world)
    kubectl(world, "apply", "-f", str(TINY))
    world.wait(lambda: world.status("tiny").get("phase") == "Running", "it to run")
    assert len(everything(world) - before) >= 6, "the job, two pods, three objects beside them"
    said = kubectl(world, "delete", "-f", str(TINY), f"--cascade={cascade}")
    assert said.startswith('cptjob.training.cptjob.io "tiny" deleted')
    world.wait(lambda: everything(world) == before, "everything of it to go")


def test_kubectl_describe_tells_what_happened(world: World) -> None:
    world.create("job", workers=2)
    world.prepare("job")
    world.run("job", 2)
    failed = world.living("job")[0].metadata.name
    said = {"exitCode": 1, "reason": "Error", "message": "the disk is on fire"}
    world.kubelet.exit(world.namespace, failed, 1, json.dumps(said))
    world.wait(lambda: world.status("job").get("restarts") == 1, "the restart")
    world.run("job", 2)
    world.suspend("job")
    world.suspend("job", on=False)
    world.prepare("job")
    world.run("job", 2)
    world.complete("job")
    lines = [
        "Normal   Accepted  The spec is valid and everything in it is decided.",
        "Normal   Running  2 workers train",
        f"Warning  Restarting  {failed}: the disk is on fire",
        "Normal   Suspended  The job is suspended. No checkpoint was saved.",
        "Normal   Complete  The model is written.",
    ]

    def told() -> bool:
        events = kubectl(world, "describe", "cptjob", "job").partition("\nEvents:")[2]
        words = [line.split() for line in events.splitlines()[2:]]
        # Type, reason, age, from, message.
        shown = [[*each[:2], *each[4:]] for each in words]
        return all(line.split() in shown for line in lines)

    world.wait(told, "the Events to tell it")
