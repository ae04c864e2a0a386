"""docs/cluster.md is followed by the letter: each of its commands prints what it says."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from guide import Command, File, Happening, matches, steps
from kubernetes import client
from running import RunningOperator

from helmchart import NAME, NAMESPACE, ROOT, Helm
from testplane import binaries, definitions
from testplane.kubelet import Kubelet
from testplane.nodes import Nodes
from testplane.plane import ControlPlane

PAGE = ROOT / "docs" / "cluster.md"
TEAM = "team"
SECONDS = 60.0
#: Asked again until they print what they should: the cluster needs a moment.
ASKING = ("kubectl get", "kubectl describe", "kubectl events", "kubectl auth", "kubectl diff")


class Reader:
    """Somebody who follows the page, and what happens around them."""

    def __init__(self, plane: ControlPlane, helm: Helm, api: Any, folder: Path) -> None:
        self.plane, self.folder = plane, folder
        self.core, self.kubelet = client.CoreV1Api(api), Kubelet(api)
        self.nodes = Nodes(plane, api)
        self.operator: RunningOperator | None = None
        for name in ("charts", "deploy"):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / "bin"
        programs.mkdir()
        (programs / "kubectl").symlink_to(plane.programs["kubectl"])
        (programs / "helm").symlink_to(helm.program)
        for name in ("cptjob", "torchx"):
            (programs / name).symlink_to(Path(sys.executable).with_name(name))
        self._environment = {
            "HOME": str(folder),
            "PATH": f"{programs}:/usr/bin:/bin",
            "KUBECONFIG": str(plane.kubeconfig),
        }

    def follow(self, step: Command | File | Happening) -> None:
        match step:
            case Command():
                self._run(step)
            case File():
                (self.folder / step.name).write_text(step.text)
            case Happening():
                getattr(self, step.words[0])(*step.words[1:])

    def _run(self, command: Command) -> None:
        if command.text.startswith("kubectl logs"):
            # The pods were found; of the nodes, which run no programs, nobody can ask for logs.
            assert "no preferred addresses found" in self._shell(command.text)
            return
        deadline = time.monotonic() + SECONDS
        while True:
            printed = self._shell(command.text)
            if matches(command.output, printed):
                return
            again = command.text.startswith(ASKING) and time.monotonic() < deadline
            assert again, (
                f"{PAGE.name}:{command.line}: {command.text}prints\n{printed}and not\n{command.output}"
            )
            time.sleep(0.2)

    def _shell(self, command: str) -> str:
        # A command that watches goes on until it is stopped.
        seconds = "4" if " -w\n" in command else "120"
        done = subprocess.run(
            ["timeout", seconds, "bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        # What helm's client logs when a watch ends is no word of the command.
        return re.sub(r"^[EWI]\d{4} .*\n", "", done.stdout, flags=re.MULTILINE)

    # --- what happens ---

    def machines(self) -> None:
        """The nodes that the page speaks of, two of them without GPUs for the operators."""
        self.nodes.add(3, pool=None, prefix="gpu-node")
        self.nodes.add(2, pool=None, gpus=0, product=None, instance_type=None, prefix="cpu-node")

    def volumes(self) -> None:
        """A volume for each claim of deploy/storage."""
        for name in ("models", "data", "results", "other-models"):
            volume = {
                "capacity": {"storage": "2Ti"},
                "accessModes": ["ReadWriteMany"],
                "claimRef": {"name": name, "namespace": TEAM},
                "nfs": {"server": "test.invalid", "path": "/"},
            }
            self.core.create_persistent_volume({"metadata": {"name": name}, "spec": volume})

    def claim(self, name: str) -> None:
        """Somebody makes a claim that a job waits for."""
        resources = {"requests": {"storage": "1Gi"}}
        spec = {"accessModes": ["ReadWriteMany"], "resources": resources}
        self.core.create_namespaced_persistent_volume_claim(
            TEAM, {"metadata": {"name": name}, "spec": spec}
        )

    def operate(self) -> None:
        """The operator with the settings, and the rights, that helm gave it.

        The nodes run no programs: in place of its pods it runs here, as one of its own account.
        """
        self.stop()
        data = self.core.read_namespaced_config_map(f"{NAME}-settings", NAMESPACE).data
        settings = yaml.safe_load(data["settings.yaml"])
        settings.pop("serving")
        settings.setdefault("watchedNamespaces", [])
        settings["timing"] = {"backoff": {"baseSeconds": 1.0}}
        kubeconfig = self.plane.write_kubeconfig(
            self.folder / "operator.json", self.plane.token_of(NAMESPACE, NAME)
        )
        self.operator = RunningOperator(
            *(self.plane, self.folder / "operator", NAMESPACE),
            kubeconfig=kubeconfig,
            settings=settings,
        )
        self.operator.start().wait_leading()

    def stop(self) -> None:
        if self.operator is not None:
            self.operator.stop()
            self.operator = None

    def completes(self, job: str, steps: str) -> None:
        """The model is written, after so many steps."""
        report = {
            "currentStep": int(steps),
            "totalSteps": int(steps),
            "progressPercentage": 100,
            "estimatedRemainingSeconds": 0,
            "tokensPerSecond": 182000.0,
            "metrics": {"loss": 1.873},
            "lastCheckpoint": {
                "step": int(steps),
                "time": "2030-01-01T00:00:00Z",
                "uri": f"pvc://results/{job}/checkpoints/step-{steps}.0",
            },
        }
        said = {"exitCode": 0, "reason": "Complete", "message": json.dumps(report)}
        (pod,) = self._pods(job, "coordinator")
        self.kubelet.exit(TEAM, pod, 0, json.dumps(said))

    def fails(self, job: str, *words: str) -> None:
        """A worker of the job ends with these words."""
        said = {"exitCode": 1, "reason": "Error", "message": " ".join(words)}
        self.kubelet.exit(TEAM, self._pods(job, "worker")[0], 1, json.dumps(said))

    def _pods(self, job: str, role: str) -> list[str]:
        selector = f"training.cptjob.io/job-name={job},training.cptjob.io/role={role}"

        def living() -> list[str]:
            pods = self.core.list_namespaced_pod(TEAM, label_selector=selector).items
            return sorted(pod.metadata.name for pod in pods if pod.status.phase == "Running")

        self.plane.wait(living, f"a {role} of {job} to run")
        return living()


@pytest.fixture(name="reader")
def make_reader(helm: Helm, tmp_path: Path, report: binaries.Report) -> Iterator[Reader]:
    """On a control plane of their own: the page ends with a cluster that is as it was before."""
    with (
        ControlPlane(tmp_path / "plane", report=report) as plane,
        plane.api() as api,
        definitions.installed(plane, ["monitoring"]),
    ):
        (tmp_path / "home").mkdir()
        reader = Reader(plane, helm, api, tmp_path / "home")
        yield reader
        reader.stop()


def test_each_command_of_the_page_prints_what_it_says(reader: Reader) -> None:
    followed = list(steps(PAGE))
    assert sum(isinstance(step, Command) for step in followed) > 30
    for step in followed:
        reader.follow(step)
