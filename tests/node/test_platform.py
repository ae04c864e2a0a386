"""Where pods go, what they run, and what is said when they cannot."""

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from team import LONG, VALUES, Team

from helmchart import CHART, NAME, NAMESPACE, Helm
from testplane.plane import KubectlError

pytestmark = pytest.mark.soak


def test_manual_mode_lands_on_exactly_the_named_nodes(team: Team) -> None:
    manual = {"spec.scheduling": {"mode": "Manual", "nodeNames": ["node-b"]}}
    trainer = {"spec.trainer": {"numNodes": 1, "numProcPerNode": 1}}
    team.apply("manual", manual | trainer)
    team.wait_for("manual", "Complete")
    assert [pod["spec"]["nodeName"] for pod in team.pods("manual")] == ["node-b"]


@pytest.mark.parametrize(
    ("changes", "phase", "kind", "reason", "words"),
    [
        (
            {"spec.model.storageUri": "pvc://models/not-there"},
            "Failed", "Failed", "ModelMissing", "not-there",
        ),
        (
            {"spec.model.storageUri": "pvc://nothing/tiny"},
            "Pending", "Ready", "WaitingForClaim", "nothing",
        ),
        (
            {"spec.trainer.image": "registry.invalid/trainer:none"},
            "Pending", "Ready", "ImagePullFailed", "registry.invalid/trainer:none",
        ),
    ],
    ids=["model", "claim", "image"],
)  # fmt: skip
def test_what_is_missing_is_told_and_nothing_is_held(
    team: Team, changes: dict[str, object], phase: str, kind: str, reason: str, words: str
) -> None:
    team.apply("job", changes)
    team.wait(lambda: team.condition("job", kind).get("reason") == reason, f"it to say {reason}")
    assert words in team.condition("job", kind)["message"]
    assert not team.pods("job")
    if phase == "Failed":
        assert team.status("job")["phase"] == "Failed"


def test_a_running_job_keeps_its_image_when_the_default_changes(team: Team, helm: Helm) -> None:
    team.apply("job", LONG)
    team.wait_for("job", "Running")
    image = team.status("job")["resolved"]["image"]
    upgrade = ["upgrade", NAME, str(CHART), "-n", NAMESPACE, "--wait", "--timeout", "2m"]
    try:
        helm.run(*upgrade, values=VALUES | {"trainerImage": {"tag": "another"}})
        team.kubectl("delete", "pod", team.living("job")[0]["metadata"]["name"], "--wait=false")
        team.wait_for("job", "Complete")
    finally:
        helm.run(*upgrade, values=VALUES)
    pods = [*team.pods("job"), *team.pods("job", "coordinator")]
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {image}
    assert team.status("job")["resolved"]["image"] == image


def test_another_number_of_nodes_takes_effect_when_a_suspended_job_goes_on(team: Team) -> None:
    one = {"numNodes": 1, "numProcPerNode": 1}
    team.apply("job", LONG | {"spec.trainer": one})
    for workers in (1, 2):
        _train_on(team, workers)
        stop = '{"spec":{"suspend":true}}'
        team.kubectl("patch", "cptjob", "job", "--type=merge", "-p", stop)
        team.wait_for("job", "Suspended")
    _train_on(team, 1)
    team.wait_for("job", "Complete")
    total = team.status("job")["resolved"]["totalSteps"]
    assert team.steps("job") == list(range(1, total + 1))


def _train_on(team: Team, workers: int) -> None:
    """Lets the job go on with so many workers; returns after twenty steps."""
    change = {"suspend": False, "trainer": {"numNodes": workers}}
    patch = json.dumps({"spec": change})
    team.kubectl("patch", "cptjob", "job", "--type=merge", "-p", patch)
    team.wait_for("job", "Running")
    assert len(team.living("job")) == workers
    made = len(team.steps("job"))
    team.wait(lambda: len(team.steps("job")) >= made + 20, "twenty steps more")


def test_tensorboard_shows_the_curves_while_the_job_trains_and_after(team: Team) -> None:
    team.apply("job", LONG | {"spec.tracking": {"tensorBoard": True}})
    team.wait_for("job", "Running")
    team.wait(lambda: _shown_from(team, team.living("job")[0]), "the first points of its loss")
    team.wait_for("job", "Complete")
    total = team.status("job")["resolved"]["totalSteps"]
    team.wait(lambda: _shown_here(team)[-1:] == [total], "the last point")
    assert _shown_here(team) == list(range(1, total + 1))
    assert {team.status("job")["pods"][each] for each in ("active", "failed")} == {0}
    team.kubectl("delete", "cptjob", "job", "--wait")
    team.wait(lambda: not team.kubectl("get", "pods", "-l", OF_TENSORBOARD), "its pod to go")


OF_TENSORBOARD = "training.cptjob.io/tensorboard"
POINTS = "/data/plugin/scalars/scalars?run=.&tag=train%2Floss"
PORT = 6006


def _shown_from(team: Team, pod: dict[str, Any]) -> list[int]:
    """Steps of the loss that the Service shows to a pod of the cluster; none before it answers."""
    url = f"http://job-tensorboard.{team.namespace}.svc:{PORT}{POINTS}"
    code = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=5).read().decode())"
    with contextlib.suppress(KubectlError):
        return _steps(team.kubectl("exec", pod["metadata"]["name"], "--", "python", "-c", code))
    return []


def _shown_here(team: Team) -> list[int]:
    """The same through a forwarded port, as a person opens it."""
    plane = team.cluster.plane
    command = [str(plane.programs["kubectl"]), "--kubeconfig", str(plane.kubeconfig)]
    command += ["-n", team.namespace, "port-forward", "service/job-tensorboard", f":{PORT}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
        assert forward.stdout is not None
        try:
            said = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
            assert said, "kubectl forwards a port"
            with urllib.request.urlopen(f"http://127.0.0.1:{said[1]}{POINTS}", timeout=30) as page:
                return _steps(page.read())
        finally:
            forward.terminate()


def _steps(points: str | bytes) -> list[int]:
    return [step for _, step, _ in json.loads(points)]


def test_torchx_runs_a_job_and_reads_what_its_pods_say(team: Team, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("torchx"))
    environment = os.environ | {"KUBECONFIG": str(team.cluster.plane.kubeconfig)}

    def torchx(*arguments: str) -> str:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = tmp_path / "job.json"
    file.write_text(json.dumps(team.manifest("first")))
    place = ("-s", "cptjob", "-cfg", f"namespace={team.namespace}")
    given = ("--manifest", str(file), "--name", "by-torchx")
    handle = torchx("run", *place, "cptjob.train", *given).strip()
    assert handle == f"cptjob://torchx/{team.namespace}:by-torchx"
    followed = [line.partition(" ") for line in torchx("log", "--tail", handle).splitlines()]
    assert {pod for pod, _, _ in followed} == {"coordinator/0", "worker/0", "worker/1"}
    total = team.status("by-torchx")["resolved"]["totalSteps"]
    assert any(f"step {total} of {total}" in text for _, _, text in followed)
    prepared = torchx("log", "--regex", "prepared", f"{handle}/coordinator/0").splitlines()
    assert prepared
    assert all(line.startswith("coordinator/0 ") and "prepared" in line for line in prepared)
    team.wait_for("by-torchx", "Complete")
    assert "State: SUCCEEDED" in torchx("status", handle)
