"""A team that uses the cluster: a namespace of its own, with claims for models, data and results."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from testnodes.cluster import OWNER, Cluster

ROOT = Path(__file__).parents[2]
TINY = ROOT / "deploy" / "examples" / "tiny.yaml"
VOLUMES = ROOT / "volumes"  # the model and text that `make setup` makes
#: What the platform team gave the chart.
VALUES = {"settings": {"pools": {"default": {}}}}
JOB, ROLE = "training.cptjob.io/job-name", "training.cptjob.io/role"
#: More than half of the two cores, so that a node has room for one worker.
ALONE = {"requests": {"cpu": "1100m"}}
#: About a minute of training.
LONG = {"spec.training.epochs": 3}


class Team:
    """One namespace, which admits restricted pods only."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.volumes = {
            claim: cluster.volume(namespace, claim) for claim in ("models", "data", "results")
        }
        for name in ("models/tiny", "data/domain", "data/general"):
            target = self.volumes[Path(name).parts[0]] / Path(name).name
            shutil.copytree(VOLUMES / name, target)
            for path in (target, *target.rglob("*")):
                shutil.chown(path, OWNER, OWNER)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints in this namespace. Raises KubectlError."""
        return self.cluster.plane.kubectl("-n", self.namespace, *arguments, stdin=stdin)

    def apply(self, name: str, changes: dict[str, Any] | None = None) -> None:
        """Applies `manifest(name, changes)`."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(self.manifest(name, changes)))

    def manifest(self, name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """The tiny example under that name, on a worker on each of two nodes.

        changes: other values by path, as in {"spec.training.epochs": 3}.
        """
        job: dict[str, Any] = yaml.safe_load(TINY.read_text("utf-8"))
        trainer = {"numNodes": 2, "numProcPerNode": 1, "resourcesPerNode": ALONE}
        usual = {"metadata.name": name, "spec.trainer": trainer}
        for path, value in {**usual, **(changes or {})}.items():
            *parents, last = path.split(".")
            place = job
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        return job

    # --- what there is ---

    def job(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.kubectl("get", "cptjob", name, "-o", "json")))

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.job(name).get("status") or {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        conditions = self.status(name).get("conditions", ())
        return next((dict(each) for each in conditions if each["type"] == kind), {})

    def pods(self, name: str, role: str = "worker") -> list[dict[str, Any]]:
        selector = f"{JOB}={name},{ROLE}={role}"
        return list(json.loads(self.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"])

    def living(self, name: str) -> list[dict[str, Any]]:
        """Its workers that run, by index."""
        running = [
            pod
            for pod in self.pods(name)
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        return sorted(running, key=lambda pod: str(pod["metadata"]["name"]))

    def pods_ever(self, name: str, role: str) -> set[str]:
        """Names of all its pods of a role that a node was ever found for, by their Events."""
        events = json.loads(self.kubectl("get", "events", "-o", "json"))["items"]
        known = {each["involvedObject"]["name"] for each in events}
        letter = {"worker": "w", "coordinator": "c"}[role]
        return {each for each in known if re.fullmatch(rf"{name}-\w+-\d+-{letter}\d+-\d+", each)}

    def log(self, pod: dict[str, Any]) -> str:
        return self.kubectl("logs", pod["metadata"]["name"])

    def logs(self, name: str) -> str:
        """All that its workers say that are still there."""
        return "\n".join(self.log(pod) for pod in self.pods(name))

    def output(self, name: str) -> Path:
        return self.volumes["results"] / name

    def saved(self, name: str) -> list[int]:
        """Steps of its complete checkpoints on the volume."""
        manifests = (self.output(name) / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(each.parent.name.split("-")[1].split(".")[0]) for each in manifests)

    def steps(self, name: str) -> list[int]:
        """The steps in its metrics, in the order in which they were written."""
        path = self.output(name) / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [line["step"] for line in map(json.loads, lines) if "loss" in line]

    # --- waiting ---

    def wait(self, happened: Callable[[], object], what: str) -> None:
        self.cluster.wait(happened, what)

    def wait_for(self, name: str, phase: str) -> None:
        """Returns when the job's phase is that one. Raises AssertionError once it has failed."""

        def reached() -> bool:
            status = self.status(name)
            assert phase == "Failed" or status.get("phase") != "Failed", status["conditions"]
            return status.get("phase") == phase

        self.wait(reached, f"{name} to be {phase}")

    def wait_for_checkpoint(self, name: str, step: int) -> int:
        """Returns the newest checkpoint, when one of at least that step is complete."""
        self.wait(lambda: max(self.saved(name), default=0) >= step, f"a checkpoint at {step}")
        return max(self.saved(name))

    def check_that_it_went_on(self, name: str, saved: int) -> None:
        """All steps were made, and none up to `saved`, the last checkpoint, was made again."""
        total = self.status(name)["resolved"]["totalSteps"]
        assert self.steps(name) == list(range(1, total + 1))
        went_on = re.findall(r"continuing after step (\d+)", self.logs(name))
        assert went_on, "some process went on from a checkpoint"
        assert min(int(step) for step in went_on) >= saved
